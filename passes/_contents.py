"""Keys by which tensors are equal: dtype, shape and every bit."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import ir

_SHORT = 256
"""Bytes that are their own key; longer ones are hashed."""
_SAMPLES = 32
_SAMPLE_BYTES = 64


def content(tensor: ir.TensorProtocol) -> Hashable:
    """A key that tensors of the same dtype, shape and bits share."""
    kind = tensor.dtype, tuple(tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING:
        return *kind, tuple(tensor.numpy().ravel().tolist())
    data = _bytes(tensor)
    if data.nbytes <= _SHORT:
        return *kind, data.tobytes()
    return *kind, hashlib.blake2b(memoryview(cast(Any, data)), digest_size=32).digest()


def sample(tensor: ir.TensorProtocol) -> Hashable:
    """A key that equal tensors share and others hardly ever do; reads a few pages of the file."""
    kind = tensor.dtype, tuple(tensor.shape.numpy())
    if tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < 8:
        return content(tensor)
    data = _bytes(tensor)
    step = max(1, len(data) // _SAMPLES)
    runs = [data[i : i + _SAMPLE_BYTES].tobytes() for i in range(0, len(data), step)]
    return *kind, *runs, data[-8:].tobytes()


def _bytes(tensor: ir.TensorProtocol) -> npt.NDArray[np.uint8]:
    if tensor.dtype.bitwidth < 8:
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
