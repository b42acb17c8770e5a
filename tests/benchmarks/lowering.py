"""All ONNX node tests through a backend, by default with inputs but the first as initializers.

    python -m tests.benchmarks.lowering onnxruntime
    python -m tests.benchmarks.lowering tvm [--target arm64] [--variant A] [--json FILE] [NAME …]
    python -m tests.benchmarks.lowering tensorrt --target cuda:sm_89

Prints what was not built whole, with the reason, and how many of each kind there are; those that
run here are compared with ONNX Runtime, or with what the case expects. With (parts of) names,
only those cases are taken.
Cases that the JSON file has already are not run again.
Exit code 1 where anything crashed, failed without a reason or is wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from tests._conformance import node_tests
from tests._lowering import KINDS, Lowered, lower_all, preload

_SAVE_EVERY = 50


def _read(path: Path | None) -> dict[str, Lowered]:
    if path is None or not path.exists():
        return {}
    return {name: Lowered(**row) for name, row in json.loads(path.read_text()).items()}


def _write(path: Path | None, rows: dict[str, Lowered]) -> None:
    if path is not None:
        found: dict[str, Any] = {name: dataclasses.asdict(row) for name, row in rows.items()}
        path.write_text(json.dumps(found, indent=1))


def main() -> int:
    """Lower the cases one after the other."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--variant", choices=("A", "B"), default="B", help="A: inputs stay")
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    warnings.simplefilter("ignore")
    cases = [
        case
        for case in node_tests()
        if not options.names or any(name in case.name for name in options.names)
    ]
    try:
        preload(options.backend)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    rows = _read(options.json)
    cases = [case for case in cases if case.name not in rows]
    for name, row in lower_all(cases, options.backend, options.target, options.variant):
        rows[name] = row
        if len(rows) % _SAVE_EVERY == 0:
            _write(options.json, rows)
        if row.kind != "built":
            last = row.reason.strip().rpartition("\n")[2]
            print(f"{name}: {row.kind}: {last}", flush=True)
    counts = collections.Counter(row.kind for row in rows.values())
    compared = sum(row.compared for row in rows.values())
    print(
        f"{len(rows)} cases for {options.target}: "
        + ", ".join(f"{counts[kind]} {kind}" for kind in KINDS)
        + f"; {compared} ran and agree"
    )
    _write(options.json, rows)
    return int(any(counts[kind] for kind in ("crashed", "failed", "wrong")))


if __name__ == "__main__":
    sys.exit(main())
