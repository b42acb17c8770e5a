"""Rewrite rules of onnxscript as a pass (the extra `onnxscript`)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from graphopt import files, ir
from graphopt._foreign import ForeignPass
from graphopt.errors import MissingError
from graphopt.pass_manager import Pass


def onnxscript_pass(rules: Any, name: str = "onnxscript-rules") -> Pass:
    """A pass from an onnxscript rewrite rule, a list of them, or a `RewriteRuleSet`.

    `name` is how reports call the pass. Running it raises GraphoptError where a rule fails.

    Raises:
        MissingError: onnxscript is not installed.
    """
    try:
        rewriter: Any = importlib.import_module("onnxscript.rewriter")
    except ImportError:
        raise MissingError(
            "onnxscript is not installed: pip install 'graphopt[onnxscript]'"
        ) from None
    if not isinstance(rules, rewriter.RewriteRuleSet):
        several: list[Any] = [*rules] if isinstance(rules, list | tuple) else [rules]
        rules = rewriter.RewriteRuleSet(several)
    return _OnnxscriptPass(name, rules)


@dataclass(frozen=True)
class _OnnxscriptPass(ForeignPass):
    rules: Any

    def result(self, model: ir.Model) -> ir.Model:
        changed = files.copy(model)
        self.rules.apply_to_model(changed)
        return changed
