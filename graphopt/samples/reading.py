"""Where samples are read from: .npz and .npy files, folders, a user's Python file.

Each reader yields plain rows, mappings of input names to arrays, anew for every pass over them;
`graphopt.samples` fits them to the model. Files are streamed, so that memory does not depend on
how many samples there are, and nothing is ever unpickled.
"""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputError

Array = npt.NDArray[Any]
Row = Mapping[str, Array]

_PLAIN = frozenset({".csv", ".json", ".md", ".txt"})
"""Files beside the data that hold none."""


class Rows(Protocol):
    """Samples of one input."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The samples' number and their shape, or the shape of the only one."""
        ...

    def rows(self) -> Iterator[Array]:
        """The parts along the first axis, in order."""
        ...

    def whole(self) -> Array:
        """All of it at once."""
        ...


class Held:
    """An array in memory."""

    def __init__(self, array: Array) -> None:
        self._array = _text(array)
        self.shape: tuple[int, ...] = array.shape

    def rows(self) -> Iterator[Array]:
        """The parts along the first axis, in order."""
        return iter(self._array)

    def whole(self) -> Array:
        """All of it at once."""
        return self._array


class Stack:
    """An array in a .npy file, or in a .npz, read row by row along its first axis."""

    def __init__(self, path: Path, member: str = "") -> None:
        self.where = f"{path}: {member.removesuffix('.npy')!r}" if member else str(path)
        self._path, self._member = path, member
        with self._open() as file:
            self.shape, self._fortran, self.dtype = self._header(file)
        if self.dtype.hasobject:
            raise InputError(f"{self.where} holds pickled Python objects, which are never loaded")

    def rows(self) -> Iterator[Array]:
        """The parts along the first axis, in order."""
        if self._fortran or not self.shape:
            yield from self.whole()
            return
        shape = self.shape[1:]
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        with self._open() as file:
            self._header(file)
            for _ in range(self.shape[0]):
                data = file.read(size)
                if len(data) != size:
                    raise InputError(f"{self.where} is cut short")
                yield _text(np.frombuffer(data, self.dtype).reshape(shape))

    def whole(self) -> Array:
        """All of it at once."""
        try:
            with self._open() as file:
                loaded: Array = np.lib.format.read_array(cast(Any, file), allow_pickle=False)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.where}: {error}") from error
        return _text(loaded)

    def _open(self) -> BinaryIO:
        try:
            if not self._member:
                return self._path.open("rb")
            with zipfile.ZipFile(self._path) as archive:
                return cast(BinaryIO, archive.open(self._member))
        except (OSError, zipfile.BadZipFile, KeyError) as error:
            raise InputError(f"{self.where} cannot be read: {error}") from error

    def _header(self, file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        kind: Any = np.lib.format
        try:
            major, minor = kind.read_magic(file)
            known = {(1, 0): kind.read_array_header_1_0, (2, 0): kind.read_array_header_2_0}
            shape, fortran, dtype = known[major, minor](file)
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.where} is no usable array: {error}") from error
        return tuple(shape), bool(fortran), np.dtype(dtype)


def stacks(path: Path) -> dict[str, Stack]:
    """The arrays of a .npz by name. InputError for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a usable .npz: {error}") from error
    return {name.removesuffix(".npy"): Stack(path, name) for name in names}


def contents(folder: Path) -> tuple[str, list[Path]]:
    """What a folder holds, `sets`, `npz`, `npy` or `images`, and where, sorted.

    Raises InputError where it holds nothing, or different things.
    """
    files = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    sets = [p for p in files if p.is_dir() and p.name.startswith("test_data_set")]
    found = {"sets": sets} if sets else {}
    for path in sorted(folder.rglob("*")) if not sets else ():
        suffix = path.suffix.lower()
        if path.is_dir() or path.name.startswith(".") or suffix in _PLAIN:
            continue
        kind = {".npz": "npz", ".npy": "npy"}.get(suffix, "images")
        found.setdefault(kind, []).append(path)
    if not found:
        raise InputError(f"{folder}: holds no .npz, .npy, images or test_data_set_*")
    if len(found) > 1:
        examples = ", ".join(str(paths[0].name) for paths in found.values())
        raise InputError(f"{folder}: samples are of one kind in a folder, this has {examples}")
    return next(iter(found.items()))


def data_sets(folders: list[Path], inputs: list[str]) -> Iterator[Row]:
    """Each of ONNX's test_data_set_* folders: input_0.pb is the first input, or names its own."""
    from onnx import TensorProto
    from onnx.numpy_helper import to_array

    for folder in folders:
        row: dict[str, Array] = {}
        for index, name in enumerate(inputs):
            file = folder / f"input_{index}.pb"
            if not file.exists():
                continue
            proto = TensorProto()
            try:
                proto.ParseFromString(file.read_bytes())
                row[proto.name if proto.name in inputs else name] = to_array(proto)
            except Exception as error:
                raise InputError(f"{file}: no usable TensorProto ({error})") from error
        if not row:
            raise InputError(f"{folder}: has no input_0.pb")
        yield row


def user_function(text: str) -> Callable[[], Any]:
    """The function of `file.py:function`; the file is executed, as the user asked for.

    Raises InputError: no such file or function, or the file fails.
    """
    name, _, function = text.rpartition(":")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"_graphopt_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path}: is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{path}: fails with {type(error).__name__}: {error}") from error
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise InputError(f"{path}: has no function {function!r}")
    function_found: Callable[[], Any] = found
    return function_found


def array(value: Any, where: str) -> Array:
    """Anything as an array: torch's tensors on any device too, bfloat16 as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: {type(value).__name__} is no array: {error}") from error


def _text(array: Array) -> Array:
    """Text as Python strings, which ONNX Runtime takes."""
    return array.astype(object) if array.dtype.kind in "US" else array
