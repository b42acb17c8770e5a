"""Whether a difference between two models' results is more than the original's own noise.

An output that differs by more than its tolerance gets a second look: how far does the *original*
lie from itself, run again, run under ONNX Runtime's own optimizations, run on inputs that differ
in the last place, and with its long sums in float64? A network with roundings inside (quantized,
arg-max, thresholds) answers a change of one unit in the last place with a visible difference, and
no rewrite can be asked to do better than that: twice this noise is allowed, up to a tenth of the
output's scale. Beyond that, and where the original does not even repeat itself, the output counts
as not checked.

Integer outputs are compared exactly. Those that come of near ties (ArgMax, TopK, quantized bytes)
fall under the same rule: as many elements may differ as twice those that differ in the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from graphopt import ir
from graphopt.closeness import Gauge
from graphopt.errors import GraphoptError
from graphopt.execute import captured, deterministic
from graphopt.report import OutputComparison
from graphopt.runner import Runner
from graphopt.wide_sums import wide_sums

Feeds = Mapping[str, ir.Array]
Outputs = Mapping[str, object]

_MOST_NOISE = 0.1
_STANDARD = ("", "ai.onnx", "ai.onnx.ml")
_COMPUTED = frozenset(
    (ir.DataType.DOUBLE, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
)


@dataclass
class Verdict:
    """Outputs that were compared, and those that could not be, each with its reason."""

    outputs: list[OutputComparison] = field(default_factory=list[OutputComparison])
    unchecked: dict[str, str] = field(default_factory=dict[str, str])


@dataclass
class Trial:
    """The original on some inputs, ready to be run again in other ways."""

    model: ir.Model
    feeds: Sequence[Feeds]
    threads: int = 1

    def run(
        self, *, optimize: bool = False, change: Callable[[Feeds], Feeds] | None = None
    ) -> list[Outputs]:
        """Outputs for each of the feeds. Raises GraphoptError where the model does not run."""
        runner = Runner(self.model, threads=self.threads, optimize=optimize)
        names = set(runner.inputs)
        results: list[Outputs] = []
        for feeds in self.feeds:
            usable = {key: value for key, value in feeds.items() if key in names}
            results.append(runner.run(change(usable) if change else usable))
        return results

    def variations(self) -> Iterator[list[Outputs]]:
        """Optimized by ONNX Runtime, on inputs one place away, with wide sums; up to a failure."""
        try:
            yield self.run(optimize=True)
            yield self.run(change=nudge)
            wide = wide_sums(self.model)
            if wide is not None:
                yield replace(self, model=wide).run()
        except GraphoptError:
            return


def judge(
    trial: Trial | None,
    expected: Sequence[Outputs],
    got: Sequence[Outputs],
    *,
    computed: frozenset[ir.DataType],
    tolerance: float | None = None,
    share: float = 1.0,
) -> Verdict:
    """Compare results by name; `trial` made the expected ones, and may be run again.

    It is None where all that is expected is constant.

    `computed` are the floating types inside the models (`computed_types`), which set the limit
    together with the outputs' own; `tolerance` replaces it. `share` of it applies.
    """

    def measure(other: Sequence[Outputs]) -> dict[str, OutputComparison]:
        measured: dict[str, OutputComparison] = {}
        for name in expected[0]:
            if name in got[0] and name in other[0]:
                gauge = Gauge(name, computed, tolerance, share)
                for one, two in zip(expected, other, strict=True):
                    gauge.add(one[name], two[name])
                measured[name] = gauge.finish()
        return measured

    measured = measure(got)
    verdict = Verdict()
    if trial is None or all(output.ok for output in measured.values()):
        verdict.outputs = list(measured.values())
        return verdict
    again = measure(trial.run())
    others = [measure(outputs) for outputs in trial.variations()]
    for name, output in measured.items():
        reason = None
        if not output.ok:
            noise = [other[name] for other in others if name in other]
            reason = _random(trial.model, name) or _second_look(
                output, again.get(name), noise, fixed=tolerance is not None
            )
        if reason is None:
            verdict.outputs.append(output)
        else:
            verdict.unchecked[name] = reason
    return verdict


def _second_look(
    output: OutputComparison,
    again: OutputComparison | None,
    others: Sequence[OutputComparison],
    *,
    fixed: bool,
) -> str | None:
    """Widen an output's tolerance by the original's noise, or say why it cannot be judged.

    `fixed`: the caller set the tolerance, and it holds as it is.
    """
    if again is not None and not again.ok:
        return "the original does not repeat its own result"
    unsteady = next((other.reason for other in others if other.reason), "")
    if unsteady and output.reason:
        return f"the original itself is unsteady on these inputs ({unsteady})"
    noise = max((other.max_rel for other in others), default=0.0)
    if output.reason or fixed or noise <= output.tolerance / 2:
        return None
    if noise > _MOST_NOISE:
        return f"rounding alone moves the original by {noise:.2g} of its scale"
    output.noise = noise
    output.tolerance = 2 * noise
    output.ok = output.max_rel <= output.tolerance
    return None


def _random(model: ir.Model, name: str) -> str | None:
    """Whether an output depends on an operator that is random on purpose."""
    stack = [value for value in model.graph.outputs if value.name == name]
    seen = set(stack)
    while stack:
        node = stack.pop().producer()
        if node is None:
            continue
        function = model.functions.get(node.op_identifier())
        inner = [node] if function is None else list(function)
        if any(n.domain in _STANDARD and not deterministic(n) for n in inner):
            return f"it depends on the random operator {ir.label(node)!r}"
        new = {v for v in (*node.inputs, *captured(node)) if v is not None} - seen
        seen |= new
        stack += new
    return None


def nudge(feeds: Feeds) -> Feeds:
    """Every floating input one unit in the last place up or down, by a fixed pattern."""
    nudged = dict(feeds)
    for name, array in feeds.items():
        if array.dtype.kind == "f":
            up = np.arange(array.size).reshape(array.shape) % 3 == 0
            toward = np.where(up, np.inf, -np.inf).astype(array.dtype)
            moved = np.asarray(np.nextafter(array, toward), array.dtype)
            nudged[name] = np.where(array == 0, array, moved)
    return nudged


def computed_types(model: ir.Model) -> frozenset[ir.DataType]:
    """The 16-bit and wider floating types that the model computes in.

    Evidence are its inputs, casts of what is not constant, and constants used by anything but a
    Cast: weights that are stored in float16 and cast before use do not count as computing in it.
    """
    found = {value.dtype for value in model.graph.inputs}
    for node in ir.all_nodes(model):
        if node.op_type == "Cast" and not node.domain:
            if ir.constant(node.inputs[0]) is None:
                target = ir.attribute(node, "to")
                found.add(ir.DataType(target) if isinstance(target, int) else None)
            continue
        for value in node.inputs:
            constant = ir.constant(value)
            if constant is not None:
                found.add(constant.dtype)
    return _COMPUTED.intersection(dtype for dtype in found if dtype is not None)
