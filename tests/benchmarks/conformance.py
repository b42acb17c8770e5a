"""All ONNX node tests through the optimizer: `python tests/benchmarks/conformance.py [NAME...]`.

Prints, for each variant, how many failed, how many were wrong, and the nodes left of how many.
With names, or parts of them, only those cases run. Exit code 1 where anything is wrong.
"""

from __future__ import annotations

import collections
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests._conformance import Outcome


def main(names: list[str]) -> int:
    """Run the cases whose names hold one of `names`; all without."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests._conformance import VARIANTS, check, node_tests, variants

    warnings.simplefilter("ignore")
    start = time.process_time()
    outcomes: dict[str, list[Outcome]] = collections.defaultdict(list)
    for case in node_tests():
        if names and not any(name in case.name for name in names):
            continue
        for variant, model, feeds in variants(case):
            outcome = check(model, feeds)
            outcomes[variant].append(outcome)
            if outcome.problem:
                note = "" if outcome.ran else " (ONNX Runtime cannot run it)"
                print(f"{case.name} {variant}{note}: {outcome.problem}", flush=True)
    print(
        f"{'':8}{'cases':>8}{'failed':>8}{'wrong':>8}{'left':>8}{'of':>8}{'empty':>8}{'not run':>9}"
    )
    for variant in VARIANTS:
        ran = [o for o in outcomes[variant] if o.ran]
        failed = sum(o.failed for o in ran)
        wrong = sum(bool(o.problem) for o in ran) - failed
        left, total = sum(o.after for o in ran), sum(o.before for o in ran)
        empty = sum(o.after == 0 for o in ran)
        others = [o for o in outcomes[variant] if not o.ran]
        broken = f"{sum(bool(o.problem) for o in others)}/{len(others)}"
        print(f"{variant:8}{len(ran):8}{failed:8}{wrong:8}{left:8}{total:8}{empty:8}{broken:>9}")
    print(f"{time.process_time() - start:.0f} CPU-s")
    return int(any(o.problem for all_ in outcomes.values() for o in all_))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
