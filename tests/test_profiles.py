"""Ranges of sizes: their text, and what follows from them inside a model."""

from __future__ import annotations

import pytest

from graphopt import profiles
from graphopt.errors import InputError
from graphopt.profiles import Profile
from graphopt.shapes import Shapes
from tests._text import model


def test_text_is_read_and_written() -> None:
    text = "x=1x3/4x3/8x3,a:b=2x2"
    found = profiles.parse(text)
    assert found == {
        "x": Profile((1, 3), (4, 3), (8, 3)),
        "a:b": Profile((2, 2), (2, 2), (2, 2)),
    }
    assert profiles.text(found) == text
    assert profiles.parse("") == {}


@pytest.mark.parametrize(
    "text", ["x", "=1x2", "x=", "x=1x2/3x4", "x=axb", "x=1x-2", "x=1x2/2x2/1x2", "x=1/1x2/1x2"]
)
def test_what_is_none(text: str) -> None:
    with pytest.raises(InputError, match=r"shapes are written|of one rank"):
        profiles.parse(text)


def test_sizes_inside_follow() -> None:
    whole = model("""
    net (float[n,4] x, float[m,4] u) => (float[k,4] y, int64[r,j] z) {
      c = Concat <axis = 0> (x, u)
      y = Neg (c)
      z = NonZero (y)
    }
    """)
    given = profiles.parse("x=1x4/2x4/8x4,u=3x4")
    wanted = {v.name or "": v for node in whole.graph for v in node.outputs}
    found = profiles.of_values(given, whole, Shapes(whole), wanted)
    assert found == {name: Profile((4, 4), (5, 4), (11, 4)) for name in "cy"}
