"""Ranges of input sizes: `x=1x3x224x224/4x3x224x224/8x3x224x224`, that is smallest/usual/largest.

Compilers that build for a range (TensorRT's optimization profiles) are told it in this form; one
size stands for all three. Several inputs are separated by commas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.errors import InputError

if TYPE_CHECKING:
    from graphopt import ir
    from graphopt.dims import DimLike
    from graphopt.shapes import Shapes

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """The shapes of one input that code is built for."""

    least: Sizes
    usual: Sizes
    most: Sizes

    def __str__(self) -> str:
        texts = ["x".join(map(str, sizes)) for sizes in (self.least, self.usual, self.most)]
        return texts[0] if len(set(texts)) == 1 else "/".join(texts)


def parse(text: str) -> dict[str, Profile]:
    """The profiles of a text, by input. InputError where it is none."""
    found: dict[str, Profile] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        name, equals, sizes = item.rpartition("=")
        shapes = [_sizes(part, item) for part in sizes.split("/")]
        if not equals or not name or len(shapes) not in (1, 3):
            raise InputError(f"shapes are written NAME=MIN/USUAL/MAX, not {item!r}")
        profile = Profile(shapes[0], shapes[-1] if len(shapes) == 1 else shapes[1], shapes[-1])
        ranks = {len(profile.least), len(profile.usual), len(profile.most)}
        ordered = zip(profile.least, profile.usual, profile.most, strict=False)
        if len(ranks) > 1 or any(not a <= b <= c for a, b, c in ordered):
            raise InputError(f"{item!r}: the sizes of a range are of one rank and do not fall")
        found[name] = profile
    return found


def text(profiles: Mapping[str, Profile]) -> str:
    """The inverse of `parse`."""
    return ",".join(f"{name}={profile}" for name, profile in profiles.items())


def of_values(
    given: Mapping[str, Profile], model: ir.Model, shapes: Shapes, wanted: Mapping[str, ir.Value]
) -> dict[str, Profile]:
    """The profiles of values inside a model, from those of its inputs.

    Left out are values of fixed shapes, and those with a size that the inputs do not tell.
    """
    from graphopt.dims import evaluate

    found: dict[str, Profile] = {}
    ranges = [_bindings(given, model, shapes, index) for index in range(3)]
    for name, value in wanted.items():
        shape = shapes.shape(value)
        if shape is None or all(isinstance(dim, int) for dim in shape):
            continue
        try:
            sizes = [tuple(evaluate(dim, sizes) for dim in shape) for sizes in ranges]
        except (KeyError, ValueError):
            continue
        # a size may fall where those of the inputs rise
        triples = [sorted(each) for each in zip(*sizes, strict=True)]
        found[name] = Profile(*(tuple(each[i] for each in triples) for i in range(3)))
    return found


def _bindings(
    given: Mapping[str, Profile], model: ir.Model, shapes: Shapes, index: int
) -> dict[str, int]:
    """The sizes of named dimensions of the inputs: least (0), usual (1) or most (2)."""
    from graphopt.dims import Dim

    known: dict[str, int] = {}
    for value in model.graph.inputs:
        profile, shape = given.get(value.name or ""), shapes.shape(value)
        if profile is None or shape is None:
            continue
        sizes = (profile.least, profile.usual, profile.most)[index]
        for dim, size in zip(shape, sizes, strict=False):
            atom = _atom(dim) if isinstance(dim, Dim) else None
            if atom is not None:
                known.setdefault(atom, size)
    return known


def _atom(dim: DimLike) -> str | None:
    from graphopt.dims import Dim

    atom = dim.atom() if isinstance(dim, Dim) else None
    return None if atom is None else atom.name


def _sizes(part: str, item: str) -> Sizes:
    items = part.strip().split("x")
    if not all(size.isdecimal() for size in items):
        raise InputError(f"shapes are written NAME=1x3x224x224, not {item!r}")
    return tuple(map(int, items))
