"""Weights in files of their own: checked before they are opened, mapped and never read whole.

What is refused follows what has been exploited in ONNX loaders: paths that leave the model's
folder (CVE-2022-25882, CVE-2024-27318), symbolic links (CVE-2026-27489, CVE-2026-34447), hard
links (CVE-2026-34446), keys that set other attributes (CVE-2026-34445), and the marker by which
ONNX Runtime names addresses of its memory.
"""

from __future__ import annotations

import builtins
import math
import mmap
import os
import stat
import weakref
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np

from graphopt import ir
from graphopt.errors import Flaw, InputError

_KEYS = {"location", "offset", "length", "checksum", "basepath"}
_HELD = 100
"""Data files that stay open; further ones, as of a model with a file per weight, open on use."""
_CHUNK = 1 << 20


class DataFile:
    """A file of weights. It is held open, so that replacing it does not change the model."""

    def __init__(self, path: Path, *, hold: bool) -> None:
        self.path = path
        self._identity: tuple[int, ...] | None = None
        self._held: int | None = None
        self._map: weakref.ref[mmap.mmap] | None = None
        descriptor, status = self._open()
        self.size = status.st_size
        self._identity = _identity(status)
        if hold:
            self._held = descriptor
            weakref.finalize(self, os.close, descriptor)
        else:
            os.close(descriptor)

    def _open(self) -> tuple[int, os.stat_result]:
        flags = os.O_RDONLY
        for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, name, 0)
        descriptor = os.open(self.path, flags)
        status = os.fstat(descriptor)
        problem = ""
        if not stat.S_ISREG(status.st_mode):
            problem = "is no regular file"
        elif status.st_nlink > 1:
            problem = "has more than one hard link"
        elif self._identity is not None and _identity(status) != self._identity:
            problem = "changed since the model was loaded"
        if problem:
            os.close(descriptor)
            raise Flaw(f"external data file {self.path.name!r} {problem}")
        return descriptor, status

    @contextmanager
    def descriptor(self) -> Generator[int]:
        """The file's descriptor, for as long as the block runs."""
        if self._held is not None:
            yield self._held
            return
        descriptor, _ = self._open()
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def bytes(self, offset: int, count: int) -> ir.Array:
        """`count` mapped bytes from `offset`, as a read-only uint8 array."""
        mapped = self._map() if self._map is not None else None
        if mapped is None:
            with self.descriptor() as descriptor:
                mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            self._map = weakref.ref(mapped)
        return np.frombuffer(mapped, np.uint8, count, offset)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class _Range:
    """Part of a data file, read as an array of a dtype and shape when somebody asks."""

    def __init__(self, file: DataFile, offset: int, dtype: ir.DataType, shape: list[int]) -> None:
        self.file = file
        self.offset = offset
        self.dtype = dtype
        self.shape = shape

    def bytes(self, count: int) -> ir.Array:
        return self.file.bytes(self.offset, count) if count else np.empty(0, np.uint8)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> ir.Array:
        count = nbytes(self.dtype, self.shape)
        array = tensor_from_bytes(self.bytes(count), self.dtype, self.shape).numpy()
        # Native kernels may assume aligned elements, which a file does not promise.
        return array if array.flags.aligned else array.copy()


class FileTensor(ir.Tensor[Any]):
    """A tensor whose data lie in a data file."""

    def __init__(
        self, file: DataFile, offset: int, dtype: ir.DataType, shape: list[int], name: str
    ) -> None:
        source = _Range(file, offset, dtype, shape)
        super().__init__(source, dtype, shape=ir.Shape(shape), name=name)

    @property
    def place(self) -> tuple[DataFile, int, int]:
        """File, offset and count of its bytes."""
        source: _Range = self.raw
        return source.file, source.offset, self.nbytes

    def bytes(self) -> ir.Array:
        """The data as the file has them, mapped."""
        source: _Range = self.raw
        return source.bytes(self.nbytes)

    def tobytes(self) -> builtins.bytes:
        """The data as the file has them, copied."""
        return self.bytes().tobytes()


def nbytes(dtype: ir.DataType, shape: list[int]) -> int:
    """Bytes of a tensor: exact for any shape, elements of less than a byte are packed."""
    return -(-math.prod(shape) * dtype.bitwidth // 8)


def tensor_from_bytes(data: ir.Array, dtype: ir.DataType, shape: list[int]) -> ir.TensorProtocol:
    """A tensor on little-endian bytes that fit its dtype and shape; shares memory with them."""
    if dtype.bitwidth < 8:
        packed: Any = data  # its protocol for arrays knows numbers only
        return ir.onnx_ir.PackedTensor[Any](packed, dtype, shape=ir.Shape(shape))
    return ir.Tensor(data.view(dtype.numpy()).reshape(shape), dtype=dtype)


class Folder:
    """The folder of a model file: what its external data may lie in."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._files: dict[str, DataFile] = {}

    def tensor(
        self, entries: Mapping[str, str], dtype: ir.DataType, shape: list[int], name: str
    ) -> FileTensor:
        """The tensor that a TensorProto's external_data entries describe.

        Raises:
            Flaw: the entries, the path or the file are not what is safe and complete.
        """
        unknown = set(entries) - _KEYS
        if unknown:
            raise Flaw(f"external data has the unknown key {min(unknown)!r}")
        file = self._file(entries.get("location", ""))
        offset, length = _number(entries, "offset", 0), nbytes(dtype, shape)
        if _number(entries, "length", length) != length:
            raise Flaw(
                f"external data has {entries['length']} bytes where dtype and shape need {length}"
            )
        if offset + length > file.size:
            raise Flaw(
                f"external data file {file.path.name!r} is too short: "
                f"it has {file.size} bytes, not {offset + length}"
            )
        return FileTensor(file, offset, dtype, shape, name)

    def _file(self, location: str) -> DataFile:
        file = self._files.get(location)
        if file is None:
            path = self._checked(location)
            try:
                file = DataFile(path, hold=len(self._files) < _HELD)
            except OSError as error:
                raise Flaw(f"external data file {location!r}: {error.strerror}") from None
            self._files[location] = file
        return file

    def _checked(self, location: str) -> Path:
        """The path of a location that stays in the folder and passes through no link."""
        windows = PureWindowsPath(location)
        if not location or "\0" in location or "_ORT_MEM_ADDR_" in location:
            raise Flaw(f"external data location {location!r} is no path")
        if location.startswith("/") or windows.drive or windows.root:
            raise Flaw(f"external data location {location!r} is not relative")
        if ".." in windows.parts:
            raise Flaw(f"external data location {location!r} leaves the model's folder")
        path = self.path
        for part in Path(location).parts:
            path = path / part
            try:
                status = path.lstat()
            except (OSError, ValueError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                raise Flaw(f"external data file {location!r}: {why}") from None
            if stat.S_ISLNK(status.st_mode):
                raise Flaw(
                    f"external data location {location!r} passes through a symbolic link, which "
                    "might lead out of the model's folder: copy the file itself there"
                )
        return path


def _number(entries: Mapping[str, str], key: str, default: int) -> int:
    text = entries.get(key)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise Flaw(f"external data {key} is {text[:40]!r}, not a number")
    return int(text)


def copy_range(file: DataFile, offset: int, count: int, target: BinaryIO) -> None:
    """Append a range of a data file to a file, in the kernel where it can."""
    target.flush()
    with file.descriptor() as source:
        while count:
            copied = _copy_some(source, offset, count, target)
            if copied == 0:
                raise InputError(f"{file.path}: external data file shrank since it was loaded")
            offset += copied
            count -= copied


def _copy_some(source: int, offset: int, count: int, target: BinaryIO) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source, target.fileno(), count, offset)
        except OSError:
            pass  # across file systems, or one that cannot: through a buffer
    os.lseek(source, offset, os.SEEK_SET)
    return os.write(target.fileno(), os.read(source, min(count, _CHUNK)))
