"""The passes, a module each, and the order in which they run at each level.

A pass that is in no pipeline runs when it is asked for by name.
"""

from __future__ import annotations

_CLEAN = (
    "inline-functions",
    "inline-if",
    "fold-constants",
    "fold-shapes",
    "eliminate-identity",
    "eliminate-zero-state",
    "eliminate-sequence",
    "eliminate-common",
    "dedupe-initializers",
    "eliminate-dead",
)

_FUSE = (
    "inline-functions",
    "inline-if",
    "unroll-loop",
    "hoist-invariants",
    "fuse-recurrent",
    "merge-recurrent",
    "fold-constants",
    "fold-shapes",
    "eliminate-identity",
    "eliminate-zero-state",
    "eliminate-sequence",
    "eliminate-arithmetic",
    "eliminate-einsum",
    "eliminate-expand",
    "eliminate-negation",
    "merge-reshapes",
    "merge-transposes",
    "merge-slices",
    "merge-gathers",
    "merge-copies",
    "merge-reductions",
    "merge-clips",
    "merge-quantize",
    "sink-quantize",
    "sink-transposes",
    "sink-views",
    "fuse-conv-batchnorm",
    "fuse-conv-affine",
    "fuse-batchnorm-affine",
    "merge-branches",
    "fuse-channel-shuffle",
    "fuse-pad",
    "fuse-unfold",
    "fuse-space-to-depth",
    "fuse-matmul-add",
    "fuse-matmul-scale",
    "merge-gemms",
    "fuse-gelu",
    "fuse-instancenorm",
    "fuse-groupnorm",
    "fuse-layernorm",
    "fuse-rmsnorm",
    "fuse-average-pool",
    "fuse-softmax",
    "fuse-rotary",
    "fuse-attention",
    "fuse-activation",
    "merge-constants",
    "eliminate-common",
    "eliminate-division",
    "merge-matmuls",
    "merge-convs",
    "sink-splits",
    "dedupe-initializers",
    "eliminate-dead",
)

_LAST = (
    "convert-opset{version=23,at_least=true}",
    *_FUSE[: _FUSE.index("fuse-recurrent")],
    "fuse-recurrent{nonempty=true}",
    *_FUSE[_FUSE.index("fuse-recurrent") + 1 : _FUSE.index("fuse-average-pool")],
    "fuse-average-pool{everywhere=true}",
    "fuse-lpnorm",
    *_FUSE[_FUSE.index("fuse-average-pool") + 1 :],
)
"""From opset 20 there is Gelu, from 23 RMSNormalization, RotaryEmbedding and Attention."""

PIPELINES: tuple[tuple[str, ...], ...] = ((), _CLEAN, _FUSE, _LAST)
"""Passes by level, 0 to 3, as pipeline text."""
