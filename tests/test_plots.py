"""Figures are whole, well-formed, and load nothing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from graphopt import plots

_NAME = '<script src="x">&"'


def parsed(figure: str) -> ElementTree.Element:
    """A figure as XML, which it has to be."""
    return ElementTree.fromstring(figure)


def test_figures_are_well_formed() -> None:
    lines = plots.curves({_NAME: [(0, 1), (1, 0.5), (2, math.nan)]}, x=_NAME, y="y", limit=0.7)
    assert len(parsed(lines).findall(".//{*}circle")) == 2
    bars = plots.bars([(_NAME * 9, 3.0), ("b", -1.0), ("c", math.inf)], unit="dB")
    assert len(parsed(bars).findall(".//{*}rect")) == 2
    counts, edges = np.histogram([0.0, 1.0, 1.0, 5.0], 8)
    bins = plots.histogram(edges.tolist(), counts.tolist(), marks={_NAME: 4.0, "none": math.inf})
    assert len(parsed(bins).findall(".//{*}rect")) == 3
    for text in (lines, bars, bins):
        assert "<script" not in text and "nan" not in text and "inf" not in text


def test_nothing_to_show() -> None:
    for text in (
        plots.curves({}, x="x", y="y"),
        plots.bars([]),
        plots.histogram([0.0, 1.0], [0]),
    ):
        assert parsed(text).text == "nothing to show"
    one = plots.curves({"a": [(1.0, 0.0)], "b": [(1.0, 0.0)]}, x="x", y="y")
    assert len(parsed(one).findall(".//{*}circle")) == 2


def test_pages_load_nothing(tmp_path: Path) -> None:
    rows = plots.table(["name"], [[_NAME]])
    text = plots.page(_NAME, [("part", [(_NAME, plots.bars([("a", 1.0)])), ("", rows)])])
    plots.write(tmp_path / "r.html", text)
    written = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in written
    assert not re.search(r"<[^>]* (?:src|href)=|@import|url\(|https?:", written)
