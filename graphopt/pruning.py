"""`prune`: a model in, a smaller dense one out, with what that cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt import files, ir
from graphopt.accuracy import sampled_top1
from graphopt.errors import GateError, GraphoptError, InputError
from graphopt.losses import measure_loss
from graphopt.lowrank import is_plane, sides
from graphopt.measurement import measure
from graphopt.optimization import optimize
from graphopt.pruner.distillation import train, why_not
from graphopt.pruner.pruning import Options, Pruning, Survey, parse_ratios, silent, survey
from graphopt.pruner.records import record_of
from graphopt.pruner.recovery import Recovery
from graphopt.pruner.reporting import PruneReport
from graphopt.pruner.selection import Unreachable
from graphopt.pruner.splitting import weight_shape
from graphopt.rounds import Outcome, Rounds
from graphopt.samples import Samples, SamplesLike, open_samples
from graphopt.target import Target
from graphopt.timing import Plan

__all__ = ["PruneReport", "prune"]

Tell = Callable[[str], None]

_ATTEMPTS = 6
_FASTER = 0.97
_BATCH = 32


@ir.paused_gc()
def prune(
    model: files.ModelLike,
    *,
    ratio: float = 0.5,
    criterion: str = "auto",
    scope: str = "auto",
    ratios: Sequence[str] = (),
    params: float = 0.0,
    flops: float = 0.0,
    size: float = 0.0,
    latency: float = 0.0,
    max_drop: float | None = None,
    round_to: int = 0,
    least: float = 0.1,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    exact: bool = False,
    iterations: int = 1,
    keep_resolution: bool = False,
    data: SamplesLike | None = None,
    recover: bool | Recovery = False,
    target: str | Target = "portable",
    benchmark: bool = True,
    scan: str = "",
    seed: int = 0,
    progress: Tell | None = None,
    report: PruneReport | None = None,
) -> ir.Model:
    """Take the least important channels, heads and units out of a model, which is left as it is.

    Args:
        model: a path, bytes, an `onnx.ModelProto`, an `onnx_ir.Model` or torch's `ONNXProgram`.
        ratio: share of each family of coupled channels that goes, 0 to 1.
        criterion: l1, l2, lp:P, median, bn-scale or random; with data activation, apoz,
            hessian, reconstruction or taylor. `auto` is reconstruction where there is recovery,
            else l2.
        scope: `uniform`; `global`: the least important of all; `sensitivity`: ratios by what each
            family's loss does to the outputs on data. `auto` is sensitivity where a budget is to be
            met with recovery, else uniform. With recovery and a budget of sizes, layers may also
            become two of a lower rank where that costs less than channels do.
        ratios: ratios of their own for weights: `conv1*=0.3`.
        params, flops, size: in place of a ratio the share to keep of parameters, operations or
            bytes of weights.
        latency: in place of a ratio the share of the median latency to get down to, measured on
            the target.
        max_drop: the most to lose (accuracy where the data have labels, else agreement with the
            original, else relative error), 0 to 1. Alone, the largest ratio within it is sought;
            beside a budget it is a gate.
        round_to: keep multiples of so many channels; 0: the target's alignment, or 2 to 8.
        least: no family keeps less than this share.
        ignore, only: patterns of nodes and weights that stay as they are, or are the only to go.
        exact: leave alone what statistics such as LayerNormalization's run over.
        iterations: in so many rounds of pruning (and recovery).
        keep_resolution: never make images smaller inside. Otherwise, with data, that is one of the
            ways to `flops`, `latency` or `max_drop`, unless layers are named or there are several
            iterations; the one that loses least on the data is gone.
        data: samples, see `graphopt.samples.open_samples`.
        recover: refit what is left on the data; True, or how.
        target: where latency is measured (portable: this machine) and what is rounded for.
        benchmark: measure latency before and after.
        scan: file that keeps what the sensitivity scan found, to go on from there.
        seed: of the criterion random.
        progress: called with what is being done.
        report: filled with what was done.

    Raises:
        InputError: options that do not fit, data missing, or nothing that can be pruned.
        GateError: `max_drop` or `latency` cannot be met.
        VerificationError: the result is not the masked original.
    """
    report = report if report is not None else PruneReport()
    original = files.load(model)
    report.source = str(model) if isinstance(model, str | Path) else original.graph.name or ""
    aim = Target.parse(target)
    if criterion == "auto":
        criterion = "reconstruction" if recover else "l2"
    if scope == "auto":
        budget = params or flops or size or latency or max_drop is not None
        scope = "sensitivity" if recover and budget else "uniform"
    alignment = aim.alignment if aim.alignment > 1 else 0
    options = Options(
        ratio=ratio,
        criterion=criterion,
        scope=scope,
        round_to=round_to or alignment,
        least=least,
        ignore=tuple(ignore),
        only=tuple(only),
        ratios=parse_ratios(ratios),
        params=params,
        flops=flops,
        size=size,
        exact=exact,
        seed=seed,
        scan=scan,
        ranks=_makes_thin(recover) and not latency,
    )
    _check(max_drop, latency, iterations)
    samples = None if data is None else open_samples(data, original)
    if (recover or scope == "sensitivity") and samples is None:
        wanted = "recovery" if recover else "scope sensitivity"
        raise InputError(f"{wanted} needs data: --data")
    how = Recovery() if recover is True else recover or None
    tell = progress or silent
    rounds = Rounds(samples, how, tell, resizing=not keep_resolution and iterations == 1)
    job = _Job(original, options, samples, how, iterations, aim, tell, report, rounds)
    return job.run(latency, max_drop, benchmark)


def _makes_thin(recover: bool | Recovery) -> bool:
    """Whether recovery refits layers, so that it can make two thinner ones of one."""
    return recover.method != "statistics" if isinstance(recover, Recovery) else recover


def _check(max_drop: float | None, latency: float, iterations: int) -> None:
    if max_drop is not None and not 0 <= max_drop <= 1:
        raise InputError(f"max_drop is between 0 and 1, not {max_drop:g}")
    if not 0 <= latency < 1:
        raise InputError(f"latency is the share to get down to, between 0 and 1, not {latency:g}")
    if iterations < 1:
        raise InputError(f"iterations are at least 1, not {iterations}")


@dataclass
class _Job:
    """One call of `prune`."""

    original: ir.Model
    options: Options
    samples: Samples | None
    recovery: Recovery | None
    iterations: int
    target: Target
    tell: Tell
    report: PruneReport
    rounds: Rounds
    surveyed: Survey | None = None
    """Of the cleaned model, once it was needed."""
    accuracy: float | None = None
    """Of the original, once it was needed."""

    def run(self, latency: float, max_drop: float | None, benchmark: bool) -> ir.Model:
        """Prune by ratio or budget, or look for what a limit allows; then take the figures."""
        self.tell("cleaning up")
        clean = optimize(self.original, level=1, verify="end")
        budget = self.options.params or self.options.flops or self.options.size
        if max_drop is not None and not budget and not latency:
            result = self._within_drop(clean, max_drop)
        elif latency:
            result = self._within_latency(clean, latency)
        else:
            result = self._rounds(clean, self.options)
        self._train(result)
        self.tell("comparing with the original")
        self._judge(result)
        if max_drop is not None and (self.report.drop or 0.0) > max_drop:
            raise GateError(f"the drop is {self.report.drop:.4f}, more than {max_drop:g} allowed")
        if benchmark and self.report.latency_ratio is None:
            self._time(result)
        return result

    def _rounds(self, clean: ir.Model, options: Options) -> ir.Model:
        """All rounds of pruning and recovery, noted in the report."""
        share = 1 / self.iterations
        part = dataclasses.replace(
            options,
            ratio=1 - (1 - options.ratio) ** share,
            ratios={k: 1 - (1 - v) ** share for k, v in options.ratios.items()},
            **{k: getattr(options, k) ** share for k in ("params", "flops", "size")},
        )
        if self.surveyed is None:  # the same for each ratio that is tried
            self.surveyed = survey(files.copy(clean), part, self.samples, self.tell)
        model, first = clean, None
        for _ in range(self.iterations):
            found = survey(model, part, self.samples, self.tell) if first else self.surveyed
            done = self.rounds.best(found, part)
            self._note(done, first)
            first = first or done.pruning
            model = done.pruning.model
        return model

    def _train(self, result: ir.Model) -> None:
        """Train the result once, as that takes longer than all else and is no part of a search."""
        record = record_of(result)
        if self.recovery is None or self.samples is None or record is None:
            return
        report = self.report
        report.training = train(result, record, self.samples, self.recovery, self.tell)
        if report.training is None and self.recovery.epochs < 0:
            report.notes.append(f"not trained: {why_not(result)}")

    def _note(self, outcome: Outcome, first: Pruning | None) -> None:
        report, done = self.report, outcome.pruning
        report.fits, report.after = outcome.fits, done.after
        if first is None:
            report.before, report.families, report.ranks = done.before, done.counts, {}
            report.notes = list(done.notes)
            if not done.changed and outcome.resolution is None:
                report.notes.append("the ratio is too small for any group: nothing was pruned")
        else:
            report.families = {
                name: (count, done.counts.get(name, (0, left))[1])
                for name, (count, left) in report.families.items()
            }
        smaller = outcome.resolution.resized if outcome.resolution is not None else []
        report.resized = {item.input: (item.before, item.after) for item in smaller}
        for node, rank in done.ranks.items():
            shape = weight_shape(node)
            name = node.inputs[1].name if node.inputs[1] is not None else None
            report.ranks[name or ""] = min(sides(node, shape, plane=is_plane(node, shape))), rank
        report.frozen = {**done.groups.frozen, **self.rounds.refused}
        report.unknown = dict(done.groups.unknown)
        report.masked_error = done.error
        if first is None and self.surveyed is not None:
            report.curves = self.surveyed.curves or {}

    def _within_drop(self, clean: ir.Model, limit: float) -> ir.Model:
        """The largest ratio whose drop stays within the limit, by bisection."""
        if self.samples is None:
            raise InputError("a limit on the drop (--max-drop) needs data: --data")
        low, high = 0.0, 0.9
        best: ir.Model | None = None
        kept: dict[str, Any] = {}
        for _ in range(_ATTEMPTS):
            ratio = (low + high) / 2
            self.tell(f"trying ratio {ratio:.3f}")
            candidate = self._rounds(clean, dataclasses.replace(self.options, ratio=ratio))
            self._judge(candidate)
            if (self.report.drop or 0.0) <= limit:
                low, best = ratio, candidate
                kept = dict(vars(self.report))
            else:
                high = ratio
        lost = self.report.drop or 0.0
        smaller = self._fewer_pixels(limit)
        if smaller is not None:
            after = None if best is None else kept["after"]
            if after is None or smaller.pruning.after.flops < after.flops:
                self._note(smaller, None)
                return smaller.pruning.model
        if best is None:
            raise GateError(f"even ratio {high:.3f} loses {lost:.4f}, more than {limit:g} allowed")
        for name, value in kept.items():
            setattr(self.report, name, value)
        return best

    def _fewer_pixels(self, limit: float) -> Outcome | None:
        """The smallest images at which the drop stays within the limit, all channels left."""
        best: Outcome | None = None
        assert self.surveyed is not None
        for outcome in self.rounds.smaller(self.surveyed, self.options):
            self._judge(outcome.pruning.model)
            if (self.report.drop or 0.0) > limit:
                break
            best = outcome
        return best

    def _within_latency(self, clean: ir.Model, limit: float) -> ir.Model:
        """As few operations less as bring the latency down, by measuring."""
        share, got = limit, 1.0
        for _ in range(_ATTEMPTS):
            self.tell(f"trying {share:.0%} of the operations")
            try:
                candidate = self._rounds(clean, dataclasses.replace(self.options, flops=share))
            except Unreachable as error:
                raise GateError(f"a latency of {limit:.0%} cannot be reached: {error}") from error
            self._time(candidate)
            got = self.report.latency_ratio or 1.0
            if got <= limit:
                return candidate
            share *= 0.97 * limit / got
        raise GateError(
            f"the latency comes down to {got:.0%} of the original's, not to {limit:.0%}"
        )

    def _judge(self, result: ir.Model) -> None:
        """The outputs beside the original's, and the accuracy where there are labels."""
        report, samples = self.report, self.samples
        report.loss = measure_loss("prune", self.original, result, samples)
        if samples is None or samples.labels is None:
            return
        if self.accuracy is None:
            self.accuracy = sampled_top1(self.original, samples)
        report.accuracy = self.accuracy, sampled_top1(result, samples)

    def _time(self, result: ir.Model) -> None:
        """Latency before and after, interleaved."""
        self.tell("measuring latency")
        report = self.report
        target = "cpu" if self.target.device == "any" else self.target
        feeds = None if self.samples is None else next(iter(self.samples))
        plan = Plan(seconds=1.0, runs=30)
        try:
            found = measure(
                {"before": self.original, "after": result},
                feeds,
                target=target,
                process=False,
                plan=plan,
            )
        except GraphoptError as error:
            report.notes.append(f"the latency could not be measured: {error}")
            return
        old, new = found.models
        if old.latency is None or new.latency is None or new.ratio is None:
            return
        report.latency_ms = (old.latency.p50_ms, new.latency.p50_ms)
        report.latency_ratio = new.ratio.value
        if report.latency_ratio > _FASTER:
            hint = "" if self.target.alignment > 1 else "; --target cpu keeps channels that fit it"
            share = f"{report.latency_ratio:.0%} of the original's latency"
            report.notes.append(f"the result is not faster: {share}{hint}")
