"""What the figures of a comparison say: scale, tolerance, and differences that are no numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from graphopt import ir
from graphopt.closeness import Gauge, Tolerance, class_rows
from graphopt.report import OutputComparison

FLOAT, HALF, DOUBLE = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE


def gauge(expected: object, got: object) -> OutputComparison:
    found = Gauge("y")
    found.add(expected, got)
    return found.finish()


def floats(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.asarray(values, np.float32)


def test_tolerance_follows_the_coarsest_type() -> None:
    assert Tolerance.of({FLOAT}).relative == 1e-3
    assert Tolerance.of({FLOAT, HALF}).relative == 1e-2
    assert Tolerance.of({DOUBLE}).relative == 1e-6
    assert Tolerance.of({ir.DataType.FLOAT8E4M3FN}).relative == 0.25
    assert Tolerance.of({ir.DataType.INT64}) == Tolerance(0.0)
    assert Tolerance.of({FLOAT}, 1e-5).relative == 1e-5


def test_equal_results_agree() -> None:
    found = gauge(floats(1, -2, 3), floats(1, -2, 3))
    assert found.ok and found.max_abs == 0 and found.cosine == pytest.approx(1)
    assert found.sqnr_db is None and found.top1 == 1


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_differences_are_seen_at_every_scale(size: float) -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * np.float32(size)
    assert gauge(values, values * np.float32(1 + 1e-5)).ok
    assert not gauge(values, values * np.float32(1.01)).ok


def test_rounding_around_zero_is_no_difference() -> None:
    assert gauge(floats(0, 0, 0), floats(1e-7, -1e-7, 0)).ok


def test_a_mask_does_not_excuse_what_is_beside_it() -> None:
    expected = np.linspace(-1, 1, 100, dtype=np.float32)
    expected[:20] = -3.4e38
    got = expected.copy()
    assert gauge(expected, got).ok
    got[50] += 0.1
    assert not gauge(expected, got).ok


@pytest.mark.parametrize("axis", [1, 2])
def test_channels_have_scales_of_their_own(axis: int) -> None:
    """Detections: boxes in pixels beside probabilities."""
    boxes = np.random.default_rng(0).random((1, 200, 4)).astype(np.float32) * 600
    scores = np.full((1, 200, 1), 0.5, np.float32)
    boxes[0, 0, 0] = 1e-4  # at the margin
    moved = boxes.copy()
    moved[0, 0, 0] += 1e-2

    def output(*parts: ir.Array) -> ir.Array:
        return np.ascontiguousarray(np.moveaxis(np.concatenate(parts, axis=2), 2, axis))

    assert gauge(output(boxes, scores), output(moved, scores)).ok
    assert not gauge(output(boxes, scores), output(moved, scores + np.float32(2e-3))).ok


def test_sqnr_and_cosine() -> None:
    expected = floats(3, 4)
    assert gauge(expected, floats(3, 4.5)).sqnr_db == pytest.approx(20)
    assert gauge(expected, -expected).cosine == pytest.approx(-1)
    assert gauge(floats(0, 0), floats(1, 1)).sqnr_db == -math.inf


@pytest.mark.parametrize(
    ("expected", "got", "reason"),
    [
        (floats(1), np.asarray([1.0]), "FLOAT became DOUBLE"),
        (floats(1, 2), floats(1), "shape [2] became [1]"),
        (floats(1, math.nan), floats(1, 2), "1 of 2 elements"),
        (floats(1, math.inf), floats(1, -math.inf), "1 of 2 elements"),
        ([floats(1)], floats(1), "a sequence became a tensor"),
        ([floats(1)], [floats(1), floats(2)], "1 elements became 2"),
        ([{"a": 1.0}], [{"b": 1.0}], "the keys of a map"),
        (None, floats(1), "an absent optional became a tensor"),
    ],
)
def test_what_is_no_matter_of_degree(expected: object, got: object, reason: str) -> None:
    found = gauge(expected, got)
    assert not found.ok and reason in found.reason


def test_same_nan_pattern_agrees_with_a_note() -> None:
    found = gauge(floats(1, math.nan, math.inf), floats(1, math.nan, math.inf))
    assert found.ok and found.note == "2 elements are not finite"
    nothing = gauge(floats(math.nan), floats(math.nan))
    assert nothing.ok and "no finite element" in nothing.note


def test_exact_types_may_not_differ() -> None:
    found = gauge(np.asarray([1, 2, 3, 4]), np.asarray([1, 2, 3, 9]))
    assert not found.ok and found.max_rel == 0.25 and found.max_abs == 5
    words = np.asarray(["a", "b"], object)
    assert gauge(words, words.copy()).ok
    assert not gauge(words, np.asarray(["a", "c"], object)).ok
    flags = np.asarray([True, False])
    assert not gauge(flags, ~flags).ok


def test_containers_are_compared_inside() -> None:
    assert gauge([floats(1), floats(2, 3)], [floats(1), floats(2, 3)]).ok
    found = gauge([{0: 0.5, 1: 0.5}], [{0: 0.5, 1: 0.9}])
    assert not found.ok and found.max_abs == pytest.approx(0.4)


def test_an_empty_output_is_noted() -> None:
    found = gauge(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32))
    assert found.ok and found.note.startswith("empty")


def test_huge_numbers_do_not_overflow() -> None:
    found = gauge(np.asarray([1e300, 2.0]), np.asarray([1e300, 2.0]))
    assert found.ok and found.cosine is None


def test_worst_of_several_runs_is_kept() -> None:
    collected = Gauge("y")
    collected.add(floats(1, 2), floats(1, 2))
    collected.add(floats(1, 2), floats(2, 1))
    found = collected.finish()
    assert not found.ok and found.elements == 4 and found.top1 == 0.5


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((10,), (1, 10)),
        ((4, 10), (4, 10)),
        ((4, 10, 1, 1), (4, 10)),
        ((2, 7, 50), (14, 50)),
        ((2, 21, 32, 32), (2048, 21)),  # a segmentation
        ((2, 32, 32, 21), (2048, 21)),
        ((2, 3, 32, 32), None),  # a picture
        ((2, 1, 32, 32), None),  # depths
        ((5, 1), None),
        ((), None),
    ],
)
def test_where_the_classes_are(shape: tuple[int, ...], rows: tuple[int, int] | None) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = class_rows(values)
    assert (None if found is None else found.shape) == rows


def test_a_map_agrees_by_its_channels() -> None:
    scores = np.zeros((1, 4, 8, 8), np.float32)
    scores[0, 2] = 1.0
    other = scores.copy()
    other[0, 1, 0, :2] = 2.0
    assert gauge(scores, other).top1 == 62 / 64
