"""Fixtures of passes: cases before and after in ONNX's text form.

A file ``tests/passes/<pass>.onnxtxt`` holds cases, separated by lines ``---``. A case is header
lines, the model before, a line ``=>``, and the model after:

    # title: a scale goes into the weights
    # options: max_bytes=0
    # random: w float[4,3,1,1]
    net (float[1,3,8,8] x) => (float[1,4,8,8] y) <float s = {2}> {
      c = Conv (x, w)
      y = Mul (c, s)
    }
    =>
    # computed: v float[4,3,1,1]
    ...

A model without a header of its own gets IR version 10 and opset 20. The headers are:

    title      what the case shows; required
    options    the pass's options, as in pipeline text: a=1,b=2
    target     name of the target to optimize for
    within     for lossy passes: largest difference, relative to an output's largest element
    numerics   exact, rounding or lossy, where the pass's docstring says more than this case needs
    unchanged  true where the pass must leave the model alone; there is no after model then
    refusal    part of a reason that the report must give; may be repeated
    random     NAME DTYPE[DIMS]: an initializer of standard normal values, by NAME the same in
               before and after; ``positive`` behind it makes them uniform in 0.5..1.5
    value      NAME DTYPE[DIMS] NUMBERS: an initializer, for dtypes that ONNX's text lacks
    feed       NAME DTYPE[DIMS] NUMBERS: an input, where random values do not fit
    computed   NAME DTYPE[DIMS]: an initializer of the after model with whatever values
"""

from __future__ import annotations

import importlib
import re
import zlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import ir
from tests._text import proto

onnx: Any = importlib.import_module("onnx")

FOLDER = Path(__file__).resolve().parent / "passes"
_SINGLE = {"title", "options", "target", "numerics", "within", "unchanged"}
_FILLED = ("random", "value", "feed", "computed")


@dataclass(frozen=True)
class Filled:
    """An array that a header line describes: `random`, `value`, `feed` or `computed`."""

    kind: str
    name: str
    dtype: ir.DataType
    shape: tuple[int, ...]
    rest: str

    @classmethod
    def parse(cls, kind: str, text: str) -> Filled:
        found = re.fullmatch(r"(\S+)\s+(\w+)(?:\[([\d,\s]*)\])?\s*(.*)", text)
        assert found is not None, f"{kind}: write NAME DTYPE[DIMS], not {text!r}"
        dims = tuple(int(dim) for dim in (found[3] or "").split(",") if dim.strip())
        return cls(kind, found[1], ir.DataType[found[2].upper()], dims, found[4])

    def array(self) -> ir.Array:
        """The values; those of a random one depend on its name and shape alone."""
        if self.kind in ("value", "feed"):
            numbers = [float(word) for word in re.split(r"[,\s]+", self.rest)]
            return np.asarray(numbers).reshape(self.shape).astype(self.dtype.numpy())
        rng = np.random.default_rng(zlib.crc32(f"{self.name}{self.shape}".encode()))
        if self.kind == "computed" or self.rest == "positive":
            return rng.uniform(0.5, 1.5, self.shape).astype(self.dtype.numpy())
        assert not self.rest, f"random: {self.rest!r} is not known"
        if self.dtype.is_integer():
            return rng.integers(0, 7, self.shape).astype(self.dtype.numpy())
        return rng.standard_normal(self.shape).astype(self.dtype.numpy())


@dataclass(frozen=True)
class Case:
    """One case of a fixture."""

    pass_name: str
    before: str
    after: str | None
    headers: dict[str, str]
    refusals: tuple[str, ...]
    filled: tuple[Filled, ...]

    @property
    def id(self) -> str:
        """The name of its test: file::title."""
        return f"{self.pass_name}::{self.headers['title']}"

    @property
    def pipeline(self) -> str:
        """The pass with its options, as pipeline text."""
        return f"{self.pass_name}{{{self.headers.get('options', '')}}}"

    def model(self, text: str) -> Any:
        """The ModelProto of `before` or `after`, with the initializers of the headers."""
        model = proto(text)
        words = set(re.findall(r"[\w./:]+", text))
        for fill in self.filled:
            if fill.kind != "feed" and fill.name in words:
                tensor = onnx.numpy_helper.from_array(fill.array(), fill.name)
                model.graph.initializer.append(tensor)
        return model

    def expected(self) -> Any:
        """The ModelProto that the pass must arrive at."""
        return self.model(self.before if self.after is None else self.after)

    def feeds(self) -> dict[str, ir.Array]:
        """Inputs that the case fixes."""
        return {fill.name: fill.array() for fill in self.filled if fill.kind == "feed"}

    @property
    def free(self) -> frozenset[str]:
        """Names of initializers of the after model whose values are not compared."""
        return frozenset(fill.name for fill in self.filled if fill.kind == "computed")


def cases(file: Path) -> list[Case]:
    """All cases of a fixture, in order."""
    found: list[Case] = []
    for text in re.split(r"^---[ \t]*$", file.read_text(encoding="utf-8"), flags=re.MULTILINE):
        if text.strip():
            found.append(_case(file.stem.replace("_", "-"), text))
    titles = [case.headers["title"] for case in found]
    assert len(set(titles)) == len(titles), f"{file.name}: two cases have the same title"
    return found


def _case(pass_name: str, text: str) -> Case:
    single: dict[str, str] = {}
    repeated: dict[str, list[str]] = defaultdict(list)
    body: list[str] = []
    for line in text.splitlines():
        header = re.fullmatch(r"#\s*(\w+):\s*(.*?)\s*", line)
        if header is None:
            body.append(line)
        elif header[1] in ("refusal", *_FILLED):
            repeated[header[1]].append(header[2])
        else:
            assert header[1] in _SINGLE, f"{pass_name}: unknown header {line!r}"
            single[header[1]] = header[2]
    before, arrow, after = (p.strip() for p in "\n".join(body).partition("\n=>\n"))
    unchanged = single.get("unchanged") == "true"
    assert single.get("title"), f"{pass_name}: a case has no title:\n{text}"
    assert unchanged == (not arrow), f"{single['title']}: an after model, or unchanged: true"
    fills = tuple(Filled.parse(kind, text) for kind in _FILLED for text in repeated[kind])
    return Case(
        pass_name, before, after if arrow else None, single, tuple(repeated["refusal"]), fills
    )
