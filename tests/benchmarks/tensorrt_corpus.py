"""Build an engine of every model of the corpus, without a GPU: what builds, what falls back, why.

    python -m tests.benchmarks.tensorrt_corpus [--target cuda:sm_89] [--json FILE] [MODEL …]

Free sizes get a range from those of the model's sample inputs up to four times the batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from graphopt import artifact, compilation, files, npz
from graphopt.errors import GraphoptError
from tests._shared import shared


def main() -> None:
    """One line per model, and the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--target", default="cuda:sm_89")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in sorted(shared("corpus/models").iterdir()):
        if not options.models or path.name in options.models:
            rows.append({"model": path.name, **build(path, options.target)})
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    good = [row for row in rows if not row["error"]]
    whole = [row for row in good if not row["fallback"]]
    print(f"{len(good)} of {len(rows)} build, {len(whole)} of them without fallback")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def build(path: Path, target: str) -> dict[str, Any]:
    """Compile one model."""
    row: dict[str, Any] = {"error": "", "fallback": {}}
    model, start = path / "model.onnx", time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            folder = compilation.compile(
                *(model, target, Path(scratch) / "a"),
                backend="tensorrt",
                options={"shapes": ranges(model, path / "inputs.npz")},
                cache=False,
                time_limit=600,
            )
        except GraphoptError as error:
            row["error"] = str(error)
        else:
            found = artifact.read(folder)
            row["fallback"] = dict(found.fallback)
            parts = list(artifact.compiled(found.parts))
            native = sum(part.nodes for part in parts if part.backend == "tensorrt")
            row["nodes"] = [native, sum(part.nodes for part in parts)]
            sizes = (file.stat().st_size for file in folder.rglob("*") if file.is_file())
            row["megabytes"] = round(sum(sizes) / 1e6, 1)
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def ranges(model: Path, inputs: Path) -> str:
    """Ranges of the free sizes of a model's inputs."""
    feeds, items = npz.read(inputs), list[str]()
    for value in files.load(model).graph.inputs:
        name = value.name or ""
        if value.shape is None or name not in feeds:
            continue
        if all(isinstance(dim, int) for dim in value.shape):
            continue
        least, most = list(feeds[name].shape), list(feeds[name].shape)
        for index, dim in enumerate(value.shape):
            if not isinstance(dim, int) and (index == 0 or str(dim.value).startswith("batch")):
                most[index] *= 4
        low, high = ("x".join(map(str, sizes)) for sizes in (least, most))
        items.append(f"{name}={low}/{low}/{high}")
    return ",".join(items)


if __name__ == "__main__":
    main()
