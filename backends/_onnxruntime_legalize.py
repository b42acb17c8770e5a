"""The rewrites that make models faster in ONNX Runtime, on top of what it does itself.

Each pass states its own conditions. Operators of com.microsoft are taken where the CPU provider has
a kernel that was measured to be no slower than what it stands for; `MEASURED` is the record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.target import Target

if TYPE_CHECKING:
    from graphopt.pass_manager import Pass

_OPSET = 23
"""It has Attention, RotaryEmbedding, RMSNormalization, Gelu and LayerNormalization, whose kernels
are at least as fast as those of com.microsoft for the same."""


@dataclass(frozen=True)
class Measured:
    """Time of an operator over that of what it stands for: least and most of the sizes tried."""

    operator: str
    least: float
    most: float
    sizes: str


MEASURED = (
    Measured("Attention-23", 0.75, 0.98, "8 to 1024 tokens, 2 to 12 heads, with and without mask"),
    Measured("Attention-23", 0.29, 0.86, "1 to 128 tokens after 16 to 2048, 8 to 32 heads"),
    Measured("RotaryEmbedding-23", 0.32, 0.66, "1 to 256 tokens, 8 heads of 64"),
    Measured("CDist", 0.02, 0.05, "1 and 100 points against 812 of 64, as a Scan"),
    Measured("QuickGelu", 0.72, 0.74, "3 k and 196 k elements"),
    Measured("BiasGelu", 1.00, 1.08, "the same, against Add and Gelu-20; fused at load anyway"),
    Measured("FusedMatMul", 0.93, 1.07, "8 to 512 rows of 384 and 768; fused at load anyway"),
    Measured("FusedConv", 1.00, 1.00, "fused at load anyway"),
    Measured("MultiHeadAttention", 0.81, 1.14, "as Attention-23; never below it"),
    Measured("GroupQueryAttention", 0.27, 1.12, "as Attention-23 with a past; below it once"),
    Measured("MatMulNBits", 0.98, 4.9, "4 bits, 1 and 128 rows; at load, with int8 sums, 1.0"),
    Measured("EmbedLayerNormalization", 1.32, 1.71, "16 and 128 tokens of 384"),
    Measured("SkipLayerNormalization", 1.9, 6.7, "8 to 1024 rows of 384 and 768"),
    Measured("SkipSimplifiedLayerNormalization", 1.2, 1.8, "the same"),
)
"""ONNX Runtime 1.32, one thread, x86 (Zen 5, AVX-512), medians of interleaved runs of models of one
block. ARM was not measured.

Two are never made. BiasSoftmax has no kernel on CPUs: a session with one is refused. QLinearMatMul
and its like ONNX Runtime makes at load itself, of the QDQ nodes that stay; their sums, scaled at
once, round ties otherwise than the float operators do (a sum of exactly 102.5 steps becomes 103,
where these give 102), so that a result with them would not verify against the original."""

_NEUTRAL = 1.1
"""Up to here a ratio is noise: such operators spare a later fusion and a node."""

_CPU = (
    "fold-dequantize",
    "fuse-one-hot",
    "fuse-shortcut",
    "widen-conv",
    "convert-max-conv",
    "convert-resize",
    "expand-softmax",
)
"""In order; all run after the passes of a level, round after round until nothing changes."""

_MICROSOFT = {
    "fuse-cdist": "CDist",
    "fuse-matmul-transpose": "FusedMatMul",
    "fuse-bias-gelu": "BiasGelu",
    "fuse-quick-gelu": "QuickGelu",
    "fuse-conv-activation": "FusedConv",
    "fuse-multi-head-attention": "MultiHeadAttention",
    "fuse-skip-layernorm": "SkipLayerNormalization",
}
"""Passes after those, by what they make; they run where that pays."""


def passes(target: Target) -> tuple[Pass, ...]:
    """The passes for a device that ONNX Runtime runs on."""
    from graphopt.pass_manager import load_pass  # loading an artifact does without

    if target.device != "cpu":
        return ()
    opset = load_pass("convert-opset", {"version": min(_OPSET, target.opset[1]), "at_least": True})
    # its kernels for float16 are ARM's; elsewhere it converts around each operator, which takes
    # 1.04 to 1.2 times as long as float32 throughout
    half = target.arch == "aarch64" and "float16" in target.dtypes
    wide = () if half else ("convert-float32",)
    vendor = [name for name, operator in _MICROSOFT.items() if _pays(operator)]
    apart = () if _pays("SkipLayerNormalization") else ("split-skip-layernorm",)
    return (opset, *(load_pass(name) for name in (*wide, *_CPU, *apart, *vendor)))


def _pays(operator: str) -> bool:
    return all(row.most <= _NEUTRAL for row in MEASURED if row.operator == operator)
