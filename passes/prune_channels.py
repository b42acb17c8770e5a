"""Prune channels, neurons, attention heads and recurrent units.

Why: the model becomes smaller and faster by itself, in any runtime: its tensors get smaller.
Numerics: lossy; what is left computes what the original computes with the rest set to zero, apart
from statistics (LayerNormalization, means) over pruned channels. `recover` makes up for much of it.
Needs: weights of known shape; data for the criteria that look at activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt import files
from graphopt.context import Context
from graphopt.pass_manager import Pass
from graphopt.pruner.pruning import Options, parse_ratios, prune_once


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Take out the least important share of each family of coupled channels."""

    lossy: ClassVar[bool] = True

    ratio: float = 0.5
    """Share of channels that goes."""
    criterion: str = "l2"
    """l1, l2, lp:P, median, bn-scale, random; on data activation, apoz, hessian, reconstruction,
    taylor."""
    scope: str = "uniform"
    """uniform, global (the least important of all), sensitivity (measured on data)."""
    round_to: int = 0
    """Keep multiples of so many channels; 0 takes the target's alignment, without one 2 to 8."""
    least: float = 0.1
    """No family keeps less than this share."""
    params: float = 0.0
    """In place of a ratio: the share of parameters to keep."""
    flops: float = 0.0
    """In place of a ratio: the share of operations to keep."""
    size: float = 0.0
    """In place of a ratio: the share of the weights' bytes to keep."""
    ignore: tuple[str, ...] = ()
    """Patterns of nodes and weights that stay as they are."""
    only: tuple[str, ...] = ()
    """Patterns of nodes and weights; all others stay as they are."""
    ratios: tuple[str, ...] = ()
    """Ratios of their own: 'PATTERN=0.3'."""
    exact: bool = False
    """Leave alone what statistics such as LayerNormalization's run over."""
    scan: str = ""
    """File that keeps the sensitivity scan."""
    seed: int = 0
    """Of the criterion random."""

    def run(self, context: Context) -> None:
        """Prune the context's model.

        Raises:
            InputError: an option that does not fit, or nothing can be pruned.
            VerificationError: the result is not the masked original.
        """
        alignment = context.target.alignment
        options = Options(
            ratio=self.ratio,
            criterion=self.criterion,
            scope=self.scope,
            round_to=self.round_to or (alignment if alignment > 1 else 0),
            least=self.least,
            ignore=self.ignore,
            only=self.only,
            ratios=parse_ratios(self.ratios),
            params=self.params,
            flops=self.flops,
            size=self.size,
            exact=self.exact,
            seed=self.seed,
            scan=self.scan,
        )
        done = prune_once(files.copy(context.model), options, context.samples)
        context.model = done.model
        context.refresh()
        for name, (count, left) in done.counts.items():
            if left < count:
                context.changed("prune-channels", [f"{name}: {count}"], [f"{name}: {left}"])
        for name, reason in done.groups.frozen.items():
            context.record.refusals.setdefault(reason, set()).add(name)
