"""What the models that torch writes have in common: fresh weights, the legacy exporter, options.

Needs torch and onnx, and nothing of graphopt, so that models can be made in an environment of
their own.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

torch: Any = importlib.import_module("torch")


def varied(model: Any) -> Any:
    """A module, ready to be exported, of whose weights no two are equal."""
    for parameter in model.parameters():  # equal ones, such as fresh biases, would be shared
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def write(
    model: Any,
    inputs: Mapping[str, Any],
    path: Path,
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    opset: int,
) -> None:
    """Write a module as torch's legacy exporter does; `inputs` are examples by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )


def main(
    text: str | None,
    export: Callable[[Path, int, int, int], None],
    layers: int = 24,
    hidden: int = 64,
) -> None:
    """The command of a model, told by the first line of a text: `export` writes it."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--opset", type=int, default=17)
    options = parser.parse_args()
    export(options.out, options.layers, options.hidden, options.opset)
