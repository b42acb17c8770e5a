"""Store weights with 2, 4 or 8 bits; activations stay floats.

Why: a model that waits for its weights, or that has to be small, gains what they lose in bits.
Numerics: lossy.
Needs: float32 weights that one operator uses; samples for gptq, adaround and an average of bits
that is spent where it helps most; in bodies of If and Loop weights are rounded without. Opset 21
for 4 bits, 25 for 2, unless the target has MatMulNBits.

Formats: DequantizeLinear with a scale per channel (Conv, ConvTranspose, LSTM, GRU) or per block of
the inputs that an output adds up (Gemm, MatMul); on targets with ONNX Runtime's own operators
MatMulNBits and GatherBlockQuantized.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from graphopt import ir
from graphopt.context import Context
from graphopt.errors import InputError
from graphopt.gram import weight_matrix
from graphopt.pass_manager import Pass
from graphopt.passes.convert_opset import ConvertOpset
from graphopt.quantizer import storage
from graphopt.quantizer.measuring import is_large
from graphopt.quantizer.reconstruction import METHODS, reconstruct, rounded
from graphopt.quantizer.rounding import Codes, Scheme, nearest
from graphopt.quantizer.weights import RECURRENT, Chosen, average_bits, choose, spend
from graphopt.wildcards import check

Array = npt.NDArray[Any]

_PART = 1 << 18  # weights that are rounded at a time


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Weight-only quantization."""

    lossy: ClassVar[bool] = True

    bits: int = 4
    """2, 4 or 8."""
    block: int = 32
    """Weights of a row of a matrix that share a scale; 0 for the whole row."""
    symmetric: bool = False
    method: str = ""
    """rtn, mse, hqq, gptq or adaround; by default adaround with samples, else mse, as also where
    there is more than 1 GB of weights."""
    average: float = 0.0
    """Bits a weight may take on average, scales included: layers get 8 bits up to it."""
    layers: tuple[str, ...] = ()
    """`PATTERN=BITS` for nodes by name; 32 leaves them as they are."""
    keep: tuple[str, ...] = ()
    """Patterns of names of nodes that stay in floats."""
    tables: bool = True
    """Embeddings too."""
    level: int = 4
    """MatMulNBits' accuracy level: 4 rounds activations to 8 bits per block, 0 keeps floats."""
    sequential: bool = True
    """Each layer makes up for the errors of those before it."""

    def nodes(self, context: Context) -> list[ir.Node]:
        """The linear operators whose weights are rounded."""
        scheme = Scheme(self.bits, self.symmetric, self.block)
        chosen = choose(context, scheme, bits=self._bits(), keep=self.keep)
        return [node for node, _ in (*chosen.linear, *chosen.inner, *chosen.recurrent)]

    def run(self, context: Context) -> None:
        """Round the weights of the main graph and of bodies in it, and store them."""
        check(context.model, (*self.keep, *self._bits()))
        method = self._method(context)
        scheme = Scheme(self.bits, self.symmetric, self.block)
        storage.dtype_of(scheme)
        vendor = "com.microsoft" in context.target.domains
        bits = self._bits()
        self._raise_opset(
            context, choose(context, scheme, bits=bits, keep=self.keep), vendor=vendor
        )
        chosen = choose(context, scheme, bits=bits, keep=self.keep, tables=self.tables)
        if self.average:
            chosen.linear = spend(
                context, chosen.linear, self.average, context.samples, progress=context.tell
            )
            taken = average_bits(chosen.linear)
            if taken > self.average:
                raise InputError(
                    f"weights of {self.bits} bits take {taken:.2f} with their "
                    f"scales, more than the average of {self.average:g}: choose larger blocks"
                )
        simple = method if method in ("rtn", "hqq") else "mse"
        codes_of = itertools.chain(
            self._rounded(context, chosen.linear, method),
            self._alone(context, chosen.inner, simple),
        )
        for node, codes in codes_of:
            label = ir.label(node)
            made = storage.store(context, node, codes, vendor=vendor, level=self.level)
            context.changed(f"{codes.scheme.bits} bits", [label], [made])
        for node, own in chosen.tables:
            self._store_table(context, node, own, simple, vendor=vendor)
        for node, own in chosen.recurrent:
            for index in (1, 2):
                weights = ir.array(node.inputs[index])
                assert weights is not None
                rows = nearest(weights, own, search=simple != "rtn")
                storage.dequantized(context, node, index, rows, weights.shape)
            context.changed(f"{own.bits} bits", [node], [node])

    def _rounded(
        self, context: Context, layers: Sequence[tuple[ir.Node, Scheme]], method: str
    ) -> Iterator[tuple[ir.Node, Codes]]:
        """The codes of each layer; without samples one after the other, each stored by itself."""
        simple = method in ("rtn", "hqq") or (method == "mse" and is_large(context.model))
        if context.samples is not None and not simple:
            yield from reconstruct(
                context,
                layers,
                method,
                context.samples,
                sequential=self.sequential,
                progress=context.tell,
            ).items()
            return
        yield from self._alone(context, layers, method)

    def _alone(
        self, context: Context, layers: Sequence[tuple[ir.Node, Scheme]], method: str
    ) -> Iterator[tuple[ir.Node, Codes]]:
        """The codes of each layer, without a look at what it reads."""
        for node, scheme in layers:
            context.check_time()
            context.tell(f"rounding: {ir.label(node)}")
            weights = ir.array(node.inputs[1])
            assert weights is not None
            yield node, _in_parts(weight_matrix(node, weights), scheme, method)

    def _method(self, context: Context) -> str:
        careful = context.samples is not None and not is_large(context.model)
        method = self.method or ("adaround" if careful else "mse")
        if method not in METHODS:
            raise InputError(f"weights are rounded by {', '.join(METHODS)}, not by {method!r}")
        if method in ("gptq", "adaround") and context.samples is None:
            raise InputError(f"quantize-weights by {method} needs data: --data")
        return method

    def _bits(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for item in self.layers:
            pattern, _, bits = item.rpartition("=")
            if not pattern or bits not in ("2", "4", "8", "32"):
                raise InputError(f"a layer's bits are PATTERN=2, 4, 8 or 32, not {item!r}")
            found[pattern] = int(bits)
        return found

    def _raise_opset(self, context: Context, chosen: Chosen, *, vendor: bool) -> None:
        """Convert the model to the opset that the formats need."""
        wanted = 0
        for node, own in (*chosen.linear, *chosen.inner, *chosen.recurrent):
            weights = ir.array(node.inputs[1])
            assert weights is not None
            if vendor and storage.fits_nbits(node, own):
                continue
            rows = weights if node.op_type in RECURRENT else weight_matrix(node, weights)
            groups = 1 if node.op_type == "Conv" else len(rows)  # its channels lie on one axis
            wanted = max(wanted, storage.opset_needed(own, rows.shape[2], groups))
        if wanted > ir.opset(context.model.graph):
            ConvertOpset(wanted, at_least=True).run(context)
            if ir.opset(context.model.graph) < wanted:
                raise InputError(
                    f"{self.bits} bits need opset {wanted}, and the model stays below it"
                )

    def _store_table(
        self, context: Context, node: ir.Node, own: Scheme, method: str, *, vendor: bool
    ) -> None:
        table = ir.array(node.inputs[0])
        assert table is not None
        label = ir.label(node)
        if vendor and own.block >= 16 and own.bits in (4, 8):
            codes = nearest(table[None], own, search=method != "rtn")
            made = storage.gather_blocks(context, node, codes)
        else:
            rows = Scheme(8, symmetric=True)
            made = storage.gather_rows(context, node, nearest(table[None], rows, search=False))
        context.changed(f"{own.bits} bits", [label], [made])


def _in_parts(matrix: Array, scheme: Scheme, method: str) -> Codes:
    """Codes of a matrix [groups, out, k], so many rows at a time as stay in the cache."""
    step = max(1, _PART // (matrix.shape[0] * matrix.shape[2]))
    starts = range(0, matrix.shape[1], step)
    parts = [rounded(matrix[:, start : start + step], scheme, method) for start in starts]
    codes, scale, zero = (
        np.concatenate([getattr(part, name) for part in parts], axis=1)
        for name in ("codes", "scale", "zero")
    )
    return Codes(scheme, codes, scale, zero)
