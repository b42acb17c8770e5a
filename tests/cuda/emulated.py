"""Compile the models of a folder with TVM for a GPU, or run what was compiled on one.

    python emulated.py compile|run FOLDER

For each NAME.onnx there is NAME.npz, its inputs; NAME.out will hold its outputs, pickled, and what
`benchmark` and `profile` gave. Needs the environment of `emulator`.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from graphopt import compilation, npz

if __name__ == "__main__":
    verb, where = sys.argv[1:]
    for path in sorted(Path(where).glob("*.onnx")):
        folder = path.with_suffix(".d")
        if verb == "compile":
            compilation.compile(
                path, "cuda:sm_89", folder, backend="tvm", fallback=False, cache=False, check=False
            )
            continue
        executable = compilation.load(folder)
        feeds = npz.read(path.with_suffix(".npz"))
        found = executable.run(feeds)
        times = executable.benchmark(feeds, 2)
        rows = [(row.op, row.device) for row in executable.profile(feeds, 1)]
        path.with_suffix(".out").write_bytes(pickle.dumps((found, times, rows)))
