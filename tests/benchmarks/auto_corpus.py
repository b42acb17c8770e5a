"""`--backend auto` on the corpus: latency over ONNX Runtime on the models as they are.

    python -m tests.benchmarks.auto_corpus [--threads 1] [--tune MINUTES] [--json FILE] [MODEL …]

What was chosen is measured again, in turns with the original, in processes of their own. With TVM
installed it is among the choices.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from graphopt import artifact, compilation, npz
from graphopt.errors import GraphoptError
from graphopt.report import Report
from graphopt.timing import Plan, benchmark, ratio
from graphopt.worker import Worker
from tests._shared import shared

PLAN = Plan(0.2, 5, 2.0, 30)


def main() -> None:
    """One line per model, and the geometric mean."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tune", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in sorted(shared("corpus/models").iterdir()):
        if not options.models or path.name in options.models:
            row = {"model": path.name, **measure(path, options.threads, options.tune)}
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    ratios = [row["ratio"] for row in rows if "ratio" in row]
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    print(f"{len(ratios)} models, geometric mean {mean:.3f}, worst {max(ratios, default=0):.3f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


def measure(path: Path, threads: int, minutes: float) -> dict[str, Any]:
    """Compile one model in the fastest way, and measure that again beside the original."""
    feeds, how = npz.read(path / "inputs.npz"), {"threads": threads}
    report = Report()
    with tempfile.TemporaryDirectory() as scratch:
        base, best = Path(scratch) / "base", Path(scratch) / "best"
        model = path / "model.onnx"
        try:
            compilation.compile(model, "cpu", base, backend="ort", options=how, level=0)
            compilation.compile(
                *(model, "cpu", best),
                backend="auto",
                options=how,
                feeds=feeds,
                tune=minutes,
                time_limit=600,
                report=report,
            )
            with Worker(base) as one, Worker(best) as other:
                first, second = benchmark([one, other], [feeds] * 2, PLAN)
        except GraphoptError as error:
            return {"error": str(error)}
        found = ratio(first, second, PLAN)
        return {
            "ratio": round(found.value, 3),
            "between": [round(found.low, 3), round(found.high, 3)],
            "chosen": report.notes[0].removesuffix(" was taken"),
            "measured": artifact.read(best).measured,
        }


if __name__ == "__main__":
    main()
