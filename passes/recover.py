"""Refit what is left of a pruned model to what the whole one computed.

Why: a pruned model has lost accuracy that its other weights can make up for, on data without
labels: each layer is solved anew by least squares, from the first to the last.
Numerics: lossy; it brings the results closer to those of the model before pruning.
Needs: `prune-channels` earlier in the same pipeline, and data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.pass_manager import Pass
from graphopt.pruner.distillation import for_refitting, train
from graphopt.pruner.records import record_of
from graphopt.pruner.recovery import Recovery
from graphopt.pruner.recovery import recover as refit


@dataclass(frozen=True)
class Recover(Pass):
    """Reconstruct layers behind pruned channels from data without labels."""

    lossy: ClassVar[bool] = True

    method: str = "reconstruct"
    """reconstruct (weights and biases), bias, or statistics (of BatchNormalizations)."""
    samples: int = 512
    """At most so many samples are used."""
    ridge: float = 1e-3
    """How strongly weights are held where they are."""
    rows: int = 256
    """Positions of a sample that enter the fit of a layer."""
    epochs: int = -1
    """Then train all weights on the unpruned model's results, so often through the data; -1: as
    often as a few minutes allow."""
    rate: float = 5e-3
    """Of that training, relative to the weights."""

    def run(self, context: Context) -> None:
        """Refit the context's model.

        Raises:
            InputError: no data, or an option that does not fit.
        """
        options = Recovery(
            self.method,
            self.samples,
            self.ridge,
            self.rows,
            epochs=self.epochs,
            rate=self.rate,
        )
        record = record_of(context.model)
        if record is None:
            context.record.refusals.setdefault("nothing was pruned before it", set()).add("model")
            return
        if context.samples is None:
            raise InputError("recover needs data: --data")
        data, _ = for_refitting(context.model, record, context.samples, options)
        for fit in refit(context.model, record, data, options):
            if fit.after < fit.before:
                context.changed(
                    "recover", [f"{fit.name}: {fit.before:.3g}"], [f"{fit.name}: {fit.after:.3g}"]
                )
        trained = train(context.model, record, context.samples, options, None)
        if trained is not None:
            first, last = trained
            context.changed("train", [f"outputs: {first:.3g}"], [f"outputs: {last:.3g}"])
