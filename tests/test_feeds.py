"""Inputs for models: random ones that run, files that fit or are refused in one line."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, npz
from graphopt.errors import GraphoptError, InputError
from graphopt.feeds import load_feeds, load_samples, random_feeds, workable_feeds
from graphopt.runner import Runner
from graphopt.shapes import Shapes
from tests._models import parse
from tests._shared import shared

parse_model: Any = importlib.import_module("onnx.parser").parse_model


def made(model: ir.Model, seed: int = 0, **bindings: int) -> dict[str, Any]:
    """Random feeds."""
    return random_feeds(model, Shapes(model), seed=seed, bindings=bindings)


def within(array: Any, low: int, high: int) -> bool:
    """Whether all elements are in low..high, and not all the same."""
    return bool((array >= low).all() and (array <= high).all() and len(np.unique(array)) > 1)


def test_ids_stay_in_their_tables() -> None:
    model = parse("""g (int64[batch,seq] ids, int32[batch,seq] types, float[batch] rows,
        float[50,2] t, float[3,2] u)
        => (float[N] a, float[N] b, float[N] c) <int64 two = {2}, int64[1] o = {0}> {
        s = Unsqueeze (ids, o)  p = Add (s, two)  a = Gather (t, p)
        r = Cast <to = 7> (types)  b = Gather (u, r)
        q = Cast <to = 7> (rows)  e = Unsqueeze (q, o)  c = Gather <axis = 1> (u, e) }""")
    feeds = made(model)
    assert feeds["ids"].shape == feeds["types"].shape == (2, 16)
    assert within(feeds["ids"], 0, 47)
    assert within(feeds["types"], 0, 2)
    assert feeds["types"].dtype == np.int32
    assert set(feeds["rows"].tolist()) <= {0.0, 1.0}
    assert feeds["rows"].dtype == np.float32


def test_ids_inside_bodies_and_functions() -> None:
    model = parse("""g (int64[n] ids, bool b, int64[n] more, float[5,2] t) => (float[N] y) {
        y = If (b) <then_branch = a () => (float[N] p) { p = Gather (t, ids) },
                    else_branch = e () => (float[N] q) { q = Gather (t, ids) }>
        z = Loop (, b, more) <body = l (int64 i, bool c, int64[n] k) => (bool d, int64[n] o)
            { d = Identity (c) o = Identity (k) }>
        x = Gather (t, z) }""")
    feeds = made(model, n=64)
    assert within(feeds["ids"], 0, 4)
    assert within(feeds["more"], 0, 4)
    called = files.load(
        parse_model("""<ir_version: 9, opset_import: ["" : 20, "local" : 1]>
        g (int64[n] ids, float[7,2] t) => (float[N] y) { y = local.look (t, ids) }
        <domain: "local", opset_import: ["" : 20]>
        look (w, i) => (o) { o = Gather (w, i) }""")
    )
    assert within(made(called, n=64)["ids"], 0, 6)


def test_named_and_counted() -> None:
    model = parse("""g (int64[batch,seq] attention_mask, float[batch,seq] mask, bool[8] keep_mask,
        int64[batch,seq] position_ids, int64 count, int64 sr, uint8[1,9,9,3] image,
        float[batch,"past + seq"] state, string[3] words, seq(float[2]) items,
        optional(float[2]) maybe, bfloat16[3] odd, int4[4] tiny, float[20,2] t)
        => (float[N] y) <int64 rate = {16000}> {
        y = Gather (t, position_ids)  k = TopK (mask, count)  e = Equal (sr, rate) }""")
    feeds = made(model, seq=6, past=3)
    assert feeds["attention_mask"].max() == 1
    assert feeds["attention_mask"][:, 0].all()
    assert set(feeds["mask"].ravel().tolist()) <= {0, 1}
    assert feeds["position_ids"].tolist() == [list(range(6))] * 2
    assert 1 <= feeds["count"] <= 4
    assert feeds["sr"] == 16000
    assert within(feeds["image"], 0, 255)
    assert feeds["state"].shape == (2, 9)
    assert all(isinstance(word, str) for word in feeds["words"])
    assert [item.shape for item in feeds["items"]] == [(2,), (2,)]
    assert feeds["maybe"].shape == (2,)
    assert feeds["odd"].dtype.name == "bfloat16"
    assert feeds["tiny"].dtype.name == "int4"


def test_numbers_of_rows_and_lengths_are_below_free_sizes() -> None:
    """Edges of a graph name its nodes; sequences are no longer than their axis."""
    model = parse("""g (float[n,4] x, int64[2,e] edges, float[t,b,2] s, int32[b] lens,
        float[1,12,2] w, float[1,12,3] r) => (float[N] y, float[N] z) <int64 o = {0}> {
        k = Gather <axis = 0> (edges, o)  y = Gather (x, k)
        h, z = LSTM <hidden_size = 3> (s, w, r, , lens) }""")
    for seed in range(4):
        feeds = workable_feeds(model, Shapes(model), seed=seed)
        assert feeds["edges"].max() < len(feeds["x"])
        assert feeds["lens"].max() <= len(feeds["s"])


def test_same_seed_same_numbers() -> None:
    model = parse("g (float[a,3] x, float[a] z, float[1] d) => (float[a,3] y) { y = Relu (x) }")
    one, two, other = made(model), made(model), made(model, seed=1)
    assert all(np.array_equal(one[k], two[k]) for k in one)
    assert not np.array_equal(one["x"], other["x"])
    assert one["x"].shape[0] == one["z"].shape[0]
    assert made(model, a=5)["x"].shape == (5, 3)


def test_inputs_that_cannot_be_made() -> None:
    huge = parse("g (float[100000,100000] x) => (float[N] y) { y = Relu (x) }")
    with pytest.raises(InputError, match=r"input 'x' .* beyond 2 GB"):
        made(huge)


def test_workable_sizes_are_searched() -> None:
    model = parse("""g (float[N,L] x) => (float[M] y) <int64[2] s = {1, 512}>
        { r = Reshape (x, s) y = Relu (r) }""")
    feeds = workable_feeds(model, Shapes(model))
    assert feeds["x"].size == 512
    Runner(model).run(feeds)
    never = parse("""g (float[N,L] x) => (float[M] y) <int64[2] s = {7, 11}>
        { r = Reshape (x, s) y = Relu (r) }""")
    with pytest.raises(GraphoptError, match="no random input was found"):
        workable_feeds(never, Shapes(never))


MODEL = """g (float[batch,3] x, int32[batch] n, string[k] t) => (float[N] y)
    { y = Relu (x) }"""
GOOD: dict[str, Any] = {
    "x": np.ones((2, 3), np.float32),
    "n": np.ones(2, np.int32),
    "t": np.asarray(["a", "bc"]),
}


def saved(path: Path, **arrays: Any) -> Path:
    """A .npz file of the good arrays, some replaced; None leaves one out."""
    arrays = {k: v for k, v in {**GOOD, **arrays}.items() if v is not None}
    np.savez(path, **arrays)
    return path


def test_load_feeds(tmp_path: Path) -> None:
    notes: list[str] = []
    path = saved(tmp_path / "a.npz", n=np.ones(2, np.int64), x=np.ones((2, 3)))
    feeds = load_feeds(path, parse(MODEL), notes)
    assert feeds["n"].dtype == np.int32
    assert feeds["x"].dtype == np.float32
    assert feeds["t"].dtype == object
    assert feeds["t"].tolist() == ["a", "bc"]
    assert len(notes) == 2
    assert "'n' converted from int64 to int32" in notes[1]


def test_load_feeds_of_odd_dtypes(tmp_path: Path) -> None:
    model = parse("g (bfloat16[N] x) => (bfloat16[N] y) { y = Identity (x) }")
    array = made(model)["x"]
    np.savez(tmp_path / "a.npz", x=array)
    found = load_feeds(tmp_path / "a.npz", model)["x"]
    assert found.dtype == array.dtype
    assert found.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"n": None}, r"no array for input 'n', it has \['t', 'x'\]"),
        ({"z": np.ones(1)}, "'z' is no input of the model"),
        ({"x": np.full((2, 3), 0.1)}, "input 'x' is float64, the model takes float32"),
        ({"n": np.full(2, 2**40)}, "input 'n' is int64, the model takes int32"),
        ({"n": np.full(2, 0.5)}, "input 'n' is float64, the model takes int32"),
        ({"t": np.ones(2)}, "input 't' is float64, the model takes text"),
        ({"x": np.asarray([["a"] * 3])}, "input 'x' is text, the model takes float32"),
        ({"x": np.ones((2, 4), np.float32)}, r"shape \[2, 4\], the model takes \[batch, 3\]"),
        ({"x": np.ones(3, np.float32)}, r"shape \[3\], the model takes \[batch, 3\]"),
        ({"n": np.ones(4, np.int32)}, "dimension 'batch' is 2 in input 'x' and 4 in input 'n'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_load_feeds_refuses(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = saved(tmp_path / "feeds.npz", **arrays)
    with pytest.raises(InputError, match=message) as failed:
        load_feeds(path, parse(MODEL))
    assert str(failed.value).startswith(str(path))
    assert "\n" not in str(failed.value)


def test_load_feeds_refuses_files(tmp_path: Path) -> None:
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.asarray([{}], object))
    text = tmp_path / "text.npz"
    text.write_text("no zip")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(saved(tmp_path / "whole.npz").read_bytes()[:200])
    for path in (pickled, text, cut, tmp_path / "none.npz", tmp_path):
        with pytest.raises(InputError) as failed:
            load_feeds(path, parse(MODEL))
        assert str(path) in str(failed.value)
        assert "\n" not in str(failed.value)


def test_load_samples(tmp_path: Path) -> None:
    model = parse("g (float[1,3] x) => (float[1,3] y) { y = Relu (x) }")
    path = tmp_path / "s.npz"
    np.savez(path, x=np.ones((5, 3), np.float32), labels=np.arange(5))
    feeds, labels = load_samples(path, model)
    assert feeds["x"].shape == (5, 3)
    assert labels is not None
    np.savez(path, x=np.ones((5, 1, 3), np.float32))
    feeds, labels = load_samples(path, model)
    assert feeds["x"].shape == (5, 3)
    assert labels is None
    np.savez(path, x=np.ones((5, 3), np.float32), labels=np.arange(4))
    with pytest.raises(InputError, match="numbers of samples differ"):
        load_samples(path, model)


def corpus() -> list[Path]:
    """Folders of the extra models, none where they are absent."""
    try:
        return sorted(shared("corpus/models").iterdir())
    except pytest.skip.Exception:
        return []


@pytest.mark.parametrize("folder", corpus(), ids=lambda folder: folder.name)
def test_corpus(folder: Path) -> None:
    """Its own inputs are accepted; random ones run."""
    model = files.load(folder / "model.onnx")
    assert load_feeds(folder / "inputs.npz", model)
    feeds = workable_feeds(model, Shapes(model))
    if not any(np.size(v) > 10**6 for v in feeds.values()):
        assert Runner(model).run(feeds)


def test_arrays_of_any_name_are_written(tmp_path: Path) -> None:
    """Also those that are named like the arguments of numpy's own function."""
    arrays = {
        "file": np.ones((2, 3), np.float32),
        "allow_pickle": np.asarray(["x", "yy"], object),
        "scope/x:0.npy": np.zeros((), np.int8),
        "none of them": np.zeros((0, 3)),
    }
    npz.write(tmp_path / "out.npz", arrays)
    for read in (npz.read(tmp_path / "out.npz"), npz.unpack(npz.pack(arrays))):
        assert list(read) == list(arrays)
        for name, array in arrays.items():
            assert (read[name].dtype, read[name].tolist()) == (array.dtype, array.tolist())


def test_sequences_and_maps_are_written_as_arrays(tmp_path: Path) -> None:
    """What a classifier of scikit-learn puts out, and what a sequence holds."""
    items = [np.ones(2, np.float32), np.zeros((3, 1), np.float32)]
    scores = [{"cat": 0.25, "dog": 0.75}, {"cat": 1.0, "dog": 0.0}]
    npz.write(tmp_path / "out.npz", {"s": items, "p": scores})
    read = npz.read(tmp_path / "out.npz")
    assert {name: array.tolist() for name, array in read.items()} == {
        **{"s.0": [1.0, 1.0], "s.1": [[0.0], [0.0], [0.0]]},
        **{"p": [[0.25, 0.75], [1.0, 0.0]], "p.keys": ["cat", "dog"]},
    }
    for odd in ({"m": {"cat": 1.0}}, {"m": [{"cat": 1.0}, {"dog": 1.0}]}, {"m": None}):
        with pytest.raises(InputError, match="holds arrays only"):
            npz.write(tmp_path / "odd.npz", odd)
