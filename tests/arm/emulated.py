"""Run artifacts as an ARM machine does: `python emulated.py FOLDER INPUTS OUTPUTS …`, in threes.

INPUTS are .npz files; OUTPUTS are pickles, since what a model puts out may be no array.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path

from graphopt import compilation, npz
from graphopt.errors import GraphoptError

if __name__ == "__main__":
    arguments = sys.argv[1:]
    for folder, inputs, outputs in zip(*(arguments[k::3] for k in range(3)), strict=True):
        start = time.perf_counter()
        try:
            found = compilation.load(folder, trust=True).run(npz.read(Path(inputs)))
            Path(outputs).write_bytes(pickle.dumps(found))
        except GraphoptError as error:
            print(f"{folder}: {error}", flush=True)
        else:
            print(f"{folder}: ran in {time.perf_counter() - start:.1f} s", flush=True)
