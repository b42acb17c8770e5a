"""Samples from every kind of source, checked against the model and streamed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import ir
from graphopt.errors import InputError
from graphopt.samples import Samples, open_samples
from graphopt.samples.images import Images
from graphopt.taps import groups, tap
from tests._models import parse

X = np.arange(24, dtype=np.float32).reshape(6, 4)


def free() -> ir.Model:
    """One input with a free batch."""
    return parse("g (float[N,4] x) => (float[N,4] y) { a = Relu (x)  y = Neg (a) }")


def fixed(batch: int) -> ir.Model:
    """One input with a fixed batch."""
    return parse(f"g (float[{batch},4] x) => (float[{batch},4] y) {{ y = Relu (x) }}")


def rows(samples: Samples) -> Any:
    """The samples of `x`, stacked."""
    first = [feeds["x"] for feeds in samples]
    again = [feeds["x"] for feeds in samples]
    assert len(samples) == len(first)
    assert np.array_equal(first, again)
    return np.stack(first)


def test_arrays_are_cut_or_stacked(tmp_path: Path) -> None:
    np.savez(tmp_path / "cut.npz", x=X, labels=np.arange(6))
    samples = open_samples(tmp_path / "cut.npz", free())
    assert np.array_equal(rows(samples), X[:, None])
    assert samples.labels is not None
    assert samples.take(2).labels is not None and len(rows(samples.take(2))) == 2
    np.savez_compressed(tmp_path / "stacked.npz", x=X.reshape(3, 2, 4))
    assert np.array_equal(rows(open_samples(tmp_path / "stacked.npz", free())), X.reshape(3, 2, 4))
    np.save(tmp_path / "cut.npy", np.asfortranarray(X))
    assert np.array_equal(rows(open_samples(tmp_path / "cut.npy", free())), X[:, None])
    assert np.array_equal(rows(open_samples({"x": X}, free())), X[:, None])
    assert np.array_equal(rows(open_samples(X, free())), X[:, None])


def test_a_fixed_batch_is_filled_up() -> None:
    got = rows(open_samples({"x": X}, fixed(4)))
    assert np.array_equal(got, [X[:4], X[[4, 5, 5, 5]]])
    cut = rows(open_samples([X], fixed(1)))
    assert np.array_equal(cut, X[:, None])


def test_keys_tell_contents(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=X)
    key = open_samples(tmp_path / "a.npz", free()).key
    assert key == open_samples({"x": X}, free()).key
    assert key != open_samples({"x": X + 1}, free()).key


class Reader:
    """Like ONNX Runtime's CalibrationDataReader."""

    def __init__(self) -> None:
        self.items: Iterator[dict[str, Any]] = iter([{"x": row[None]} for row in X])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.items, None)


def test_iterables(tmp_path: Path) -> None:
    assert np.array_equal(rows(open_samples(Reader(), free())), X[:, None])
    pairs = [(row[None], 3) for row in X]
    assert np.array_equal(rows(open_samples(pairs, free())), X[:, None])
    assert np.array_equal(rows(open_samples((p for p in pairs), free())), X[:, None])
    script = tmp_path / "feeds.py"
    script.write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    for n in (1, 2, 3):\n"
        "        yield {'x': np.ones((n, 4), np.float32)}\n"
        "def broken():\n"
        "    raise ValueError('no disk')\n"
    )
    samples = open_samples(f"{script}:feeds", free())
    assert [feeds["x"].shape[0] for feeds in samples] == [1, 2, 3]
    with pytest.raises(InputError, match="no disk"):
        list(open_samples(f"{script}:broken", free()))
    with pytest.raises(InputError, match="has no function 'nothing'"):
        open_samples(f"{script}:nothing", free())


def test_folders(tmp_path: Path) -> None:
    for n in range(3):
        np.savez(tmp_path / f"{n}.npz", x=X[2 * n : 2 * n + 2])
    assert np.array_equal(rows(open_samples(tmp_path, free())), X[:, None])
    (tmp_path / "extra.bin").write_bytes(b"")
    with pytest.raises(InputError, match="of one kind"):
        open_samples(tmp_path, free())
    from onnx import numpy_helper

    for n in range(2):
        folder = tmp_path / "sets" / f"test_data_set_{n}"
        folder.mkdir(parents=True)
        proto = numpy_helper.from_array(X[n : n + 1], "x")
        (folder / "input_0.pb").write_bytes(proto.SerializeToString())
    assert np.array_equal(rows(open_samples(tmp_path / "sets", free())), X[:2, None])


def test_images(tmp_path: Path) -> None:
    pillow: Any = pytest.importorskip("PIL.Image", reason="images need pillow")
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 0] = 255
    for n in range(2):
        pillow.fromarray(red).save(tmp_path / f"{n}.png")
    (tmp_path / "labels.csv").write_text("file,class\n0.png,4\n1.png,5\n")
    model = parse("g (float[1,3,8,8] x) => (float[1,3,8,8] y) { y = Relu (x) }")
    with pytest.raises(InputError, match="mean and std"):
        open_samples(tmp_path, model)
    how = Images(mean=(127.5,), std=(127.5,), order="bgr")
    samples = open_samples(tmp_path, model, options=how)
    assert samples.labels is not None and samples.labels.tolist() == [4, 5]
    got = rows(samples)
    assert got.shape == (2, 1, 3, 8, 8)
    assert np.allclose(got[0, 0, 2], 1) and np.allclose(got[0, 0, 0], -1)
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="has no class for 2"):
        open_samples(tmp_path, model, options=how)
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(InputError, match=r"2\.png: no readable image"):
        rows(open_samples(tmp_path, model, options=how))


def test_random_only_by_name() -> None:
    samples = open_samples("random", free(), limit=3)
    assert samples.random
    assert rows(samples).shape[0] == 3
    with pytest.raises(InputError, match="does not exist"):
        open_samples("nothing", free())


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'z' is no input"):
        open_samples({"x": X, "z": X}, free())
    with pytest.raises(InputError, match="there are no samples"):
        open_samples({"x": X[:0]}, free())
    with pytest.raises(InputError, match="there are no samples"):
        list(open_samples([], free()))
    with pytest.raises(InputError, match="has shape"):
        list(open_samples({"x": X[:, :3]}, free()))
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], object))
    with pytest.raises(InputError, match="pickled"):
        open_samples(tmp_path / "pickled.npz", free())
    np.savez(tmp_path / "cut.npz", x=X)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:100])
    with pytest.raises(InputError, match="not a usable"):
        open_samples(tmp_path / "cut.npz", free())
    two = parse("g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Add (x, z) }")
    with pytest.raises(InputError, match="numbers of samples differ"):
        open_samples({"x": X, "z": X[:5]}, two)


def test_memory_is_that_of_one_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "many.npz", x=np.zeros((2000, 1, 4000), np.float32))
    model = parse("g (float[N,4000] x) => (float[N,4000] y) { y = Relu (x) }")
    tracemalloc.start()
    count = sum(1 for _ in open_samples(tmp_path / "many.npz", model))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 2000
    assert peak < 2 << 20


def test_taps() -> None:
    model = free()
    samples = open_samples({"x": X - 10}, model)
    values = list(tap(model, ["a", "x", "y"], samples))
    assert list(values[0]) == ["a", "x", "y"]
    assert np.array_equal(np.concatenate([v["a"] for v in values]), np.maximum(X - 10, 0))
    assert [v.name for v in model.graph.outputs] == ["y"]
    first = next(iter(samples))
    assert groups(model, ["x", "a", "y"], first, memory_limit=40) == [["x", "a"], ["y"]]
    assert groups(model, ["x", "a", "y"], first, memory_limit=1) == [["x"], ["a"], ["y"]]
    with pytest.raises(InputError, match="no 'nothing'"):
        next(tap(model, ["nothing"], samples))


class Lazy:
    """Like a torch tensor that has a gradient."""

    def __init__(self, array: Any, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    def detach(self) -> Lazy:
        """Without the gradient."""
        return self

    def cpu(self) -> Lazy:
        """On this machine."""
        return self

    def float(self) -> Any:
        """As float32."""
        return np.asarray(self.array)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        if self.dtype == "torch.bfloat16":
            raise TypeError("unsupported ScalarType BFloat16")
        return np.asarray(self.array)


def test_samples_without_a_batch_and_tensors(tmp_path: Path) -> None:
    assert np.array_equal(rows(open_samples(list(X), free())), X[:, None])
    for dtype in ("torch.float32", "torch.bfloat16"):
        made = [Lazy(row[None], dtype) for row in X]
        assert np.array_equal(rows(open_samples(made, free())), X[:, None])
    for index, row in enumerate(X):
        np.save(tmp_path / f"{index}.npy", row)
    assert np.array_equal(rows(open_samples(tmp_path, free())), X[:, None])
    with pytest.raises(InputError, match="list: list is no array"):
        list(open_samples([{"x": [[1.0], [1.0, 2.0]]}], free()))


def test_parts_make_up_the_whole() -> None:
    whole = open_samples({"x": X, "labels": np.arange(6)}, free())
    parts = [whole.part(index, 4) for index in range(4)]
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    assert np.array_equal(rows(parts[1]), X[1::4, None])
    assert parts[1].labels is not None and parts[1].labels.tolist() == [1, 5]
    rest = whole.without(1, 4)
    assert len(rest) == 4
    assert np.array_equal(rows(rest), X[[0, 2, 3, 4], None])
    with pytest.raises(InputError, match="no part 4 of 4"):
        whole.part(4, 4)
