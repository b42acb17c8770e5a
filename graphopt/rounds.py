"""One round of pruning and recovery: the best of several ways to meet a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from graphopt.pruner.distillation import for_refitting
from graphopt.pruner.fitting import Fit
from graphopt.pruner.pruning import Options, Pruning, Survey, cut
from graphopt.pruner.records import RECORD, Record, record_of
from graphopt.pruner.recovery import Recovery
from graphopt.pruner.recovery import recover as refit
from graphopt.pruner.selection import Unreachable
from graphopt.pruner.sensitivity import gap
from graphopt.resolution import Resolution, Resolutions
from graphopt.samples import Samples

__all__ = ["Outcome", "Rounds"]

Tell = Callable[[str], None]


@dataclass
class Outcome:
    """A pruned model, refitted where that was asked for."""

    pruning: Pruning
    fits: list[Fit]
    resolution: Resolution | None
    loss: float
    """Of the outputs, on samples that were not fitted to; 0 where nothing else was tried."""


@dataclass
class Rounds:
    """What all rounds have in common."""

    samples: Samples | None
    recovery: Recovery | None
    tell: Tell
    resizing: bool = False
    """Whether the resolution may be reduced where there are operations to save."""
    resolutions: Resolutions | None = None
    """Of the first model, once they were needed."""

    @property
    def refused(self) -> dict[str, str]:
        """Inputs of images that could not be made smaller, and why."""
        return {} if self.resolutions is None else self.resolutions.refused

    def best(self, found: Survey, options: Options) -> Outcome:
        """What loses least of all that was tried, by samples that nothing was fitted to.

        Raises:
            Unreachable: nothing meets the budget.
        """
        best: Outcome | None = None
        failed: Unreachable | None = None
        for outcome in self._tried(found, options):
            if isinstance(outcome, Unreachable):
                failed = failed or outcome
            elif best is None or outcome.loss < best.loss:
                best = outcome
        if best is None:
            assert failed is not None
            raise failed
        return best

    def _tried(self, found: Survey, options: Options) -> Iterator[Outcome | Unreachable]:
        """Channels with ranks and without, smaller images alone, and both.

        What ranks cost one by one says less than for channels, whose loss the layers behind them
        make up for. Where images go half the way, channels go the rest.
        """
        smaller = self._resolutions(found, options) if options.flops else None
        compared = bool(found.layers) or smaller is not None
        ways, least, thin = [options], math.inf, False
        for way in ways:
            outcome = self._try(found, way, compared)
            yield outcome
            if isinstance(outcome, Outcome) and outcome.loss < least:
                least, thin = outcome.loss, bool(outcome.pruning.ranks)
            if isinstance(outcome, Outcome) and outcome.pruning.ranks:
                ways.append(dataclasses.replace(way, ranks=False))
        if smaller is None:
            return
        for resolution in smaller.within(options.flops):
            yield self._try(found, _nothing(options), compared, resolution)
        half = smaller.between(options.flops)
        if half is not None:
            rest = dataclasses.replace(options, flops=options.flops / half.work, ranks=thin)
            yield self._try(found, rest, compared, half)

    def smaller(self, found: Survey, options: Options) -> Iterator[Outcome]:
        """The model with all channels on smaller and smaller images."""
        resolutions = self._resolutions(found, options)
        for resolution in resolutions.descending() if resolutions is not None else ():
            outcome = self._try(found, _nothing(options), False, resolution)
            assert isinstance(outcome, Outcome)
            yield outcome

    def _resolutions(self, found: Survey, options: Options) -> Resolutions | None:
        """The model at other resolutions; None where they do not serve, or cannot be judged."""
        asked = options.params or options.size or options.only or options.ratios
        if not self.resizing or asked or self.samples is None or self.samples.random:
            return None
        if self.resolutions is None:
            self.resolutions = Resolutions(found.groups.model, self.samples)
        return self.resolutions

    def _try(
        self, found: Survey, way: Options, compared: bool, resolution: Resolution | None = None
    ) -> Outcome | Unreachable:
        """Prune, reduce the resolution, refit; and see what that loses, where it is compared."""
        try:
            done = cut(found, way, self.samples, self.tell)
        except Unreachable as error:
            return error
        record = record_of(done.model)
        assert record is not None
        near = record
        if resolution is not None and self.resolutions is not None:
            work = round(done.after.flops * resolution.work)
            done.after = dataclasses.replace(done.after, flops=work)
            done.model = self.resolutions.apply(done.model, resolution)
            near = Record(resolution.model, record.kept, record.ranks)
        if self.samples is None:
            return Outcome(done, [], resolution, 0.0)
        fits, judged = list[Fit](), self.samples
        if self.recovery is not None:
            data, judged = for_refitting(
                done.model, record, self.samples, self.recovery, spare=compared
            )
            if done.changed:
                fits = refit(done.model, near, data, self.recovery, self.tell)
        done.model.meta[RECORD] = record
        loss = gap(record.teacher, done.model, judged) if compared else 0.0
        return Outcome(done, fits, resolution, loss)


def _nothing(options: Options) -> Options:
    """The same, but nothing goes."""
    return dataclasses.replace(options, flops=0.0, ratio=0.0, ranks=False)
