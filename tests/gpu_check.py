"""Run everything that takes a GPU, and write what came of it into one JSON file.

    python tests/gpu_check.py [FILE.json]

The tests are those marked `gpu`; a machine without one skips them, and the file says why. Exit
code 1 where one failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends import _cuda_driver
from graphopt.machine import Machine

ROOT = Path(__file__).resolve().parents[1]


class Collector:
    """A pytest plugin that keeps outcomes and what tests recorded."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called after each phase of each test."""
        if report.when == "call" or not report.passed:
            text = report.longreprtext.strip().splitlines() if report.failed else []
            if report.skipped and isinstance(report.longrepr, tuple):
                text = [report.longrepr[2]]
            self.rows.append(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "seconds": round(report.duration, 3),
                    "figures": dict(report.user_properties),
                    "reason": text[-1] if text else "",
                }
            )


def main() -> int:
    """The exit code."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "gpu_check.json")
    collector = Collector()
    code = pytest.main(["-m", "gpu", "-q", str(ROOT / "tests")], plugins=[collector])
    missing = _cuda_driver.missing()
    data = {
        "gpu": missing or _cuda_driver.architecture(),
        "machine": vars(Machine.here()),
        "passed": sum(row["outcome"] == "passed" for row in collector.rows),
        "failed": sum(row["outcome"] == "failed" for row in collector.rows),
        "skipped": sum(row["outcome"] == "skipped" for row in collector.rows),
        "tests": collector.rows,
    }
    out.write_text(json.dumps(data, indent=2, default=str) + "\n", "utf-8")
    print(f"{out}: {data['passed']} passed, {data['failed']} failed, {data['skipped']} skipped")
    return int(code in (1, 2, 3))


if __name__ == "__main__":
    sys.exit(main())
