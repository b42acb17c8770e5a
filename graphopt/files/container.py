"""Compressed models: a tar stream under Zstandard, with a manifest that says what is in it.

`tar --zstd -x` unpacks one too. The members, in this order:

    manifest.json   {"format": 1, "files": {NAME: {"bytes": N, "sha256": HEX}}}
    model.onnx      the model
    NAME.data       its weights, where they lie outside of it

Both ways it is a stream: neither the packed nor the unpacked bytes are ever held in memory. What
is unpacked must be what the manifest says, byte for byte, and nothing else.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, cast

from graphopt.digests import sha256
from graphopt.errors import InputError, MissingError

MAGIC = b"\x28\xb5\x2f\xfd"
SUFFIX = ".zst"
MODEL = "model.onnx"

_FORMAT = 1
_MANIFEST = "manifest.json"
_MANIFEST_BYTES = 1 << 20
_HEADER_BYTES = 1 << 14
"""Of a file's headers and padding, at most."""
_CHUNK = 1 << 20
_MOST_RATIO, _ALWAYS_BYTES = 1000, 64 << 20
"""A container that unpacks to more than so many times its size, beyond a first part, is refused."""
_WINDOW = 1 << 27  # what a reader has to hold at once, at most


def pack(folder: Path, target: BinaryIO, *, level: int = 10) -> None:
    """Write a folder's files, `model.onnx` first, as a container.

    Raises:
        MissingError: the `zstd` extra is not installed.
    """
    files = sorted(folder.iterdir(), key=lambda file: (file.name != MODEL, file.name))
    entries = {f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in files}
    manifest = json.dumps({"format": _FORMAT, "files": entries}, indent=1).encode()
    compressor = _zstandard().ZstdCompressor(level=level, write_checksum=True)
    with (
        compressor.stream_writer(target, closefd=False) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive,
    ):
        archive.addfile(_member(_MANIFEST, len(manifest)), io.BytesIO(manifest))
        for file in files:
            with file.open("rb") as source:
                archive.addfile(_member(file.name, file.stat().st_size), source)


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a container into an empty folder and return the model's path there.

    Raises:
        InputError: damaged, not a container, or one that unpacks to unreasonably much.
        MissingError: the `zstd` extra is not installed.
    """
    module = _zstandard()
    try:
        with path.open("rb") as packed:
            reader = module.ZstdDecompressor(max_window_size=_WINDOW).stream_reader(packed)
            bounded = _Bounded(path, reader)
            with tarfile.open(fileobj=cast(BinaryIO, bounded), mode="r|") as archive:
                _extract(path, archive, folder, bounded)
    except (module.ZstdError, tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: no compressed model, or a damaged one ({error})") from None
    return folder / MODEL


class _Bounded:
    """A stream that is refused where it goes on for longer than it may.

    tarfile holds headers of any size in memory: those before the manifest may take as much as that.
    """

    def __init__(self, path: Path, stream: Any) -> None:
        self._path, self._stream = path, stream
        self.left = 2 * _MANIFEST_BYTES

    def read(self, size: int = -1) -> bytes:
        """As a file's."""
        data: bytes = self._stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise InputError(f"{self._path}: unpacks to more than it says")
        return data


def _extract(path: Path, archive: tarfile.TarFile, folder: Path, bounded: _Bounded) -> None:
    expected: dict[str, tuple[int, str]] | None = None
    for member in archive:
        stream = archive.extractfile(member) if member.isfile() else None
        if stream is None:
            raise InputError(f"{path}: holds {member.name!r}, which is no file")
        if expected is None:
            if member.name != _MANIFEST or member.size > _MANIFEST_BYTES:
                raise InputError(f"{path}: compressed, but no model packed by graphopt")
            expected = _read_manifest(path, stream.read(member.size))
            total = sum(size for size, _ in expected.values())
            _check_room(path, total, folder)
            bounded.left += total + _HEADER_BYTES * len(expected)
            continue
        size, digest = expected.pop(member.name, (-1, ""))
        if size != member.size:
            raise InputError(f"{path}: {member.name!r} is not what the manifest says")
        seen = hashlib.sha256()
        with (folder / member.name).open("xb") as target:
            while chunk := stream.read(_CHUNK):
                seen.update(chunk)
                target.write(chunk)
        if seen.hexdigest() != digest:
            raise InputError(f"{path}: {member.name!r} is damaged (its hash differs)")
    if expected is None or expected:
        missing = min(expected) if expected else _MANIFEST
        raise InputError(f"{path}: {missing!r} is missing")


def _read_manifest(path: Path, data: bytes) -> dict[str, tuple[int, str]]:
    """Name to bytes and hash; names are plain ones, and a model is among them."""
    try:
        manifest: Any = json.loads(data)
        if manifest["format"] != _FORMAT:
            raise InputError(f"{path}: packed in format {manifest['format']}, not {_FORMAT}")
        files = {
            str(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: its manifest cannot be read") from None
    plain = all(
        name == Path(name).name and name not in ("", ".", "..", _MANIFEST) and size >= 0
        for name, (size, _) in files.items()
    )
    if not plain or MODEL not in files or any("\\" in name or "\0" in name for name in files):
        raise InputError(f"{path}: its manifest does not describe a model")
    return files


def _check_room(path: Path, total: int, folder: Path) -> None:
    if total > _ALWAYS_BYTES + _MOST_RATIO * path.stat().st_size:
        raise InputError(f"{path}: unpacks to {total} bytes, far more than weights do")
    free = shutil.disk_usage(folder).free
    if total > free:
        raise InputError(f"{path}: unpacks to {total} bytes and {folder} has room for {free}")


def _member(name: str, size: int) -> tarfile.TarInfo:
    """A header without dates and owners: the same model gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def _zstandard() -> Any:
    try:
        return import_module("zstandard")
    except ImportError:
        raise MissingError(
            "compressed models need zstandard: pip install 'graphopt[zstd]'"
        ) from None
