"""Instructions that multiply small integers and add groups of products to int32 sums.

A dot broadcasts `group` elements of a row to all lanes and multiplies them with as many weights of
each lane's column. All are exact: where an instruction would saturate in between (x86's pmaddubsw),
16-bit integers are multiplied instead.

Sources: Intel's Intrinsics Guide (VPDPBUSD, VPDPWSSD, PMADDWD), Arm's A64 reference (SDOT, USDOT).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from graphopt.target import Target

_script: Any = importlib.import_module("tvm.script")
_s_tir: Any = importlib.import_module("tvm.s_tir")
te: Any = importlib.import_module("tvm.te")
tirx: Any = importlib.import_module("tvm.tirx")


@dataclass(frozen=True)
class Conversion:
    """How the elements of a tensor become those that are multiplied."""

    dtype: str
    element: Callable[[Any], Any]
    fill: Any = 0
    """What stands beyond the edge."""


@dataclass(frozen=True)
class Dot:
    """One instruction, or where its name is empty a multiplication and an addition."""

    intrinsic: str
    """LLVM's name."""
    data: str
    """Dtype of what is broadcast."""
    weights: str
    group: int
    lanes: int
    adds: bool = True
    """Whether it adds to the sums; else it gives the groups' sums alone."""

    def shift(self, dtype: str) -> int:
        """What `conversion` adds to the elements of an 8-bit dtype: signs are changed so."""
        if self.data == "int16" or dtype == self.data:
            return 0
        return 128 if self.data == "uint8" else -128

    def conversion(self, dtype: str, zero: int) -> Conversion:
        """Of elements of a dtype; their zero point is at the edge, shifted as they are."""
        fill = zero + self.shift(dtype)
        if dtype == self.data:
            return Conversion(self.data, lambda x: x, fill)
        if self.data == "int16":
            return Conversion(self.data, lambda x: x.astype("int16"), fill)

        def flipped(x: Any) -> Any:
            return tirx.reinterpret(
                self.data, x ^ tirx.const(-128 if dtype == "int8" else 128, dtype)
            )

        return Conversion(self.data, flipped, fill)

    def depth(self, size: int) -> list[Any]:
        """The axes of a sum of so many terms: the groups, and what is in one."""
        parts = (size // self.group, self.group) if self.group > 1 else (size,)
        return [te.reduce_axis((0, part), f"k{index}") for index, part in enumerate(parts)]

    def term(self, depth: list[Any]) -> Any:
        """The number of a term."""
        return depth[0] * self.group + depth[1] if self.group > 1 else depth[0]

    @staticmethod
    def weight(depth: list[Any], lane: Any) -> list[Any]:
        """The indices of its weight in a block of `pack`."""
        return [depth[0], lane, *depth[1:]]

    def pack(self, weights: Any, blocks: int, columns: int) -> Any:
        """Weights [..., depth, all columns] as [blocks, ..., groups, columns, group]."""
        *rest, depth, width = weights.shape
        groups = -(-depth // self.group)
        full = np.zeros((*rest, groups * self.group, blocks * columns), self.weights)
        full[..., :depth, :width] = weights
        cut = full.reshape(*rest, groups, self.group, blocks, columns)
        packed = np.ascontiguousarray(np.moveaxis(np.moveaxis(cut, -3, -1), -3, 0))
        return packed if self.group > 1 else packed[..., 0]

    @property
    def name(self) -> str:
        """Under which TVM knows it after `register`; empty for what needs no instruction."""
        return f"graphopt.{self.intrinsic}" if self.intrinsic else ""

    def register(self) -> None:
        """Let TVM's schedules know the instruction."""
        _register(self)


def dots(target: Target) -> tuple[Dot, ...]:
    """The instructions of a CPU, those that do most at once first; the last takes 16 bits."""
    isa = target.isa
    if target.arch == "aarch64":
        plain = Dot("", "int16", "int16", 1, 4)
        signed = Dot("llvm.aarch64.neon.sdot.v4i32.v16i8", "int8", "int8", 4, 4)
        mixed = Dot("llvm.aarch64.neon.usdot.v4i32.v16i8", "uint8", "int8", 4, 4)
        found = [dot for name, dot in (("dotprod", signed), ("i8mm", mixed)) if name in isa]
        return (*found, plain)
    if target.arch != "x86_64":
        return (Dot("", "int16", "int16", 1, 4),)
    if {"avx512f", "avx512_vnni"} <= isa:
        return (
            Dot("llvm.x86.avx512.vpdpbusd.512", "uint8", "int8", 4, 16),
            Dot("llvm.x86.avx512.vpdpwssd.512", "int16", "int16", 2, 16),
        )
    if {"avx2", "avx_vnni"} <= isa and "avx512f" not in isa:
        return (
            Dot("llvm.x86.avx512.vpdpbusd.256", "uint8", "int8", 4, 8),
            Dot("llvm.x86.avx512.vpdpwssd.256", "int16", "int16", 2, 8),
        )
    if {"avx512f", "avx512bw"} <= isa:
        return (Dot("llvm.x86.avx512.pmaddw.d.512", "int16", "int16", 2, 16, adds=False),)
    if "avx2" in isa:
        return (Dot("llvm.x86.avx2.pmadd.wd", "int16", "int16", 2, 8, adds=False),)
    return (Dot("llvm.x86.sse2.pmadd.wd", "int16", "int16", 2, 4, adds=False),)


def best(found: tuple[Dot, ...], data: str, weights: str) -> Dot:
    """The dot for tensors of two dtypes: one that takes the data as they are, if there is one."""
    wide = "int16" in (data, weights)
    fitting = [dot for dot in found if (dot.data == "int16") == wide] or list(found[-1:])
    return next((dot for dot in fitting if dot.data == data), fitting[0])


_SIGNATURE = """
@T.prim_func(s_tir=True)
def dot(
    A: T.Buffer(({group},), "{data}", offset_factor=1),
    B: T.Buffer(({lanes}, {group}), "{weights}", offset_factor=1),
    C: T.Buffer(({lanes},), "int32", offset_factor=1, scope="local"),
) -> None:
    with T.sblock("root"):
        T.reads(C[0:{lanes}], A[0:{group}], B[0:{lanes}, 0:{group}])
        T.writes(C[0:{lanes}])
"""
_MEANING = """
        for i, k in T.grid({lanes}, {group}):
            with T.sblock("update"):
                lane, term = T.axis.remap("SR", [i, k])
                C[lane] = C[lane] + T.cast(A[term], "int32") * T.cast(B[lane, term], "int32")
"""
_INSTRUCTION = """
        C[T.ramp(0, 1, {lanes})] = {before}T.call_llvm_pure_intrin(
            "int32x{lanes}", "{intrinsic}", {first}
            T.reinterpret("{data}x{all}", T.broadcast(
                T.reinterpret("int32", A.vload([0], "{data}x{group}")), {lanes})),
            B.vload([0, 0], "{weights}x{all}"))
"""


@cache
def _register(dot: Dot) -> None:
    sums = f'C.vload([0], "int32x{dot.lanes}")'
    fields = {
        **{name: getattr(dot, name) for name in ("intrinsic", "data", "weights", "group", "lanes")},
        "all": dot.group * dot.lanes,
        "first": f"{sums}," if dot.adds else "",
        "before": "" if dot.adds else f"{sums} + ",
    }
    meaning, code = (
        _script.from_source((_SIGNATURE + body).format(**fields))
        for body in (_MEANING, _INSTRUCTION)
    )
    _s_tir.TensorIntrin.register(dot.name, meaning, code, override=True)
