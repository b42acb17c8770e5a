"""The rewrites that make models faster in ONNX Runtime, on top of what it does itself.

Each pass states its own conditions. Those whose gain depends on sizes carry what was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.pass_manager import Pass

_OPSET = 23
"""It has Attention, RotaryEmbedding and RMSNormalization, Gelu and LayerNormalization: for all of
them the kernels are at least as fast as those of com.microsoft. Attention against its parts, 8 to
1024 tokens, 2 to 12 heads, with and without mask, takes 0.75 to 0.98 of the time (ONNX Runtime
1.32, one thread of a Zen 5, AVX-512); MultiHeadAttention 0.81 to 1.05, and 1.0 with a mask."""

_CPU = (
    "fold-dequantize",
    "fuse-cdist",
    "fuse-one-hot",
    "fuse-shortcut",
    "widen-conv",
    "convert-max-conv",
    "convert-resize",
    "split-skip-layernorm",
    "fuse-matmul-transpose",
    "fuse-bias-gelu",
    "fuse-quick-gelu",
    "fuse-conv-activation",
)
"""In order; they run after the passes of a level, round after round until nothing changes."""


def passes(target: Target) -> tuple[Pass, ...]:
    """The passes for a device that ONNX Runtime runs on."""
    from graphopt.pass_manager import load_pass  # loading an artifact does without

    if target.device != "cpu":
        return ()
    opset = load_pass("convert-opset", {"version": min(_OPSET, target.opset[1]), "at_least": True})
    return (opset, *(load_pass(name) for name in _CPU))
