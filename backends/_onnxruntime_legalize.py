"""The rewrites that make models faster in ONNX Runtime, on top of what it does itself.

Each pass states its own conditions. Those whose gain depends on sizes carry what was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.pass_manager import Pass

_CPU = (
    "fold-dequantize",
    "fuse-cdist",
    "fuse-one-hot",
    "fuse-shortcut",
    "widen-conv",
    "convert-max-conv",
    "convert-resize",
)
"""In order; they run after the passes of a level, round after round until nothing changes."""


def passes(target: Target) -> tuple[Pass, ...]:
    """The passes for a device that ONNX Runtime runs on."""
    from graphopt.pass_manager import load_pass  # loading an artifact does without

    return tuple(load_pass(name) for name in _CPU) if target.device == "cpu" else ()
