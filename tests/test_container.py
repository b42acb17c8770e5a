"""Compressed models: both ways, the same bytes each time, and what is damaged or hostile."""

from __future__ import annotations

import io
import json
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt import files, ir, models
from graphopt.errors import InputError
from graphopt.files import container

zstandard: Any = pytest.importorskip("zstandard")


def packed(path: Path, members: dict[str, bytes]) -> Path:
    """A container of any members, in their order."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    path.write_bytes(zstandard.ZstdCompressor().compress(stream.getvalue()))
    return path


def manifest(**entries: Any) -> bytes:
    return json.dumps({"format": 1, "files": entries}).encode()


@pytest.mark.parametrize("external", [False, True])
def test_there_and_back(tmp_path: Path, external: bool) -> None:
    model = files.load(models.path("digits_cnn"))
    first, second = tmp_path / "a.onnx.zst", tmp_path / "b.onnx.zst"
    for target in (first, second):
        files.save(model, target, external=external)
    assert first.read_bytes() == second.read_bytes()
    again = files.load(first)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx.zst", "b.onnx.zst"]
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        other = again.graph.initializers[name].const_value
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy())
    assert [n.op_type for n in ir.all_nodes(again)] == [n.op_type for n in ir.all_nodes(model)]


def test_an_existing_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "a.onnx.zst"
    target.write_bytes(b"mine")
    with pytest.raises(InputError, match="overwrit"):
        files.save(files.load(models.path("digits_cnn")), target)
    assert target.read_bytes() == b"mine"


def test_damage_is_found(tmp_path: Path) -> None:
    target = tmp_path / "a.onnx.zst"
    files.save(files.load(models.path("digits_cnn")), target)
    data = target.read_bytes()
    for cut in (5, len(data) // 2, len(data) * 9 // 10):
        target.write_bytes(data[:cut])
        with pytest.raises(InputError, match=r"a\.onnx\.zst"):
            files.load(target)
    for place in range(20, len(data), len(data) // 40):
        target.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
        with pytest.raises(InputError, match=r"a\.onnx\.zst"):
            files.load(target)


ENTRY = {"bytes": 3, "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"model.onnx": b"abc"}, "no model packed"),
        ({"manifest.json": b"{"}, "manifest cannot be read"),
        ({"manifest.json": b'{"format": 2, "files": {}}'}, "format 2"),
        ({"manifest.json": manifest(x=ENTRY)}, "does not describe a model"),
        ({"manifest.json": manifest(**{"model.onnx": ENTRY, "../x": ENTRY})}, "does not describe"),
        ({"manifest.json": manifest(**{"model.onnx": ENTRY})}, "missing"),
        (
            {"manifest.json": manifest(**{"model.onnx": ENTRY}), "model.onnx": b"abcd"},
            "not what the manifest says",
        ),
        (
            {"manifest.json": manifest(**{"model.onnx": ENTRY}), "model.onnx": b"abd"},
            "its hash differs",
        ),
        (
            {"manifest.json": manifest(**{"model.onnx": ENTRY}), "../y": b"abc"},
            "not what the manifest says",
        ),
        (
            {"manifest.json": manifest(**{"model.onnx": {**ENTRY, "bytes": 10**15}})},
            "far more than weights",
        ),
    ],
)
def test_what_is_not_as_it_says(tmp_path: Path, members: dict[str, bytes], reason: str) -> None:
    target = packed(tmp_path / "x.onnx.zst", members)
    with pytest.raises(InputError, match=reason):
        files.load(target)
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx.zst"]


def test_a_header_is_no_way_around_the_limits(tmp_path: Path) -> None:
    """Extended headers, which tarfile reads whole, of many times the container's size."""
    header = tarfile.TarInfo("header")
    header.type, header.size = tarfile.XHDTYPE, 64 << 20
    stream = header.tobuf(format=tarfile.USTAR_FORMAT) + bytes(header.size)
    target = tmp_path / "x.onnx.zst"
    target.write_bytes(zstandard.ZstdCompressor().compress(stream))
    with pytest.raises(InputError, match="more than it says"):
        files.load(target)


def test_links_are_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        data = manifest(**{"model.onnx": ENTRY})
        info = tarfile.TarInfo("manifest.json")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("model.onnx")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    target = tmp_path / "x.onnx.zst"
    target.write_bytes(zstandard.ZstdCompressor().compress(stream.getvalue()))
    with pytest.raises(InputError, match="no file"):
        files.load(target)


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(container, "import_module", absent)
    with pytest.raises(container.MissingError, match=r"graphopt\[zstd\]"):
        files.save(files.load(models.path("digits_cnn")), tmp_path / "a.onnx.zst")
    assert not list(tmp_path.iterdir())
    assert import_module("zstandard")
