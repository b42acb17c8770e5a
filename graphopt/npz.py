"""Arrays in .npz files: read without pickle, written whole or not at all."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from graphopt import atomic
from graphopt.errors import InputError

Array = npt.NDArray[Any]

_MOST_BYTES = 16 << 30


def read(path: Path) -> dict[str, Array]:
    """The arrays of a file by name; text as arrays of Python strings, which ONNX Runtime takes.

    Raises:
        InputError: no .npz, a damaged one, pickled objects, or more than 16 GiB unpacked.
    """
    return _read(path, str(path))


def unpack(data: bytes) -> dict[str, Array]:
    """The arrays of a file's content; as `read`."""
    return _read(io.BytesIO(data), "what was sent")


def write(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays by name; strings become fixed-width text.

    The items of a sequence are `NAME.0`, `NAME.1` …; a classifier's list of maps is one array with
    a column for each key, and `NAME.keys`.

    Raises:
        InputError: a value that is none of these, or a place that cannot be written.
    """
    plain = _plain(arrays)
    atomic.write(path, lambda file: _save(file, plain))


def pack(arrays: Mapping[str, Any]) -> bytes:
    """What `write` would write."""
    buffer = io.BytesIO()
    _save(buffer, _plain(arrays))
    return buffer.getvalue()


def _save(file: IO[bytes], arrays: Mapping[str, Array]) -> None:
    """As numpy.savez, which cannot write what is named like its own arguments."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def _read(source: Path | io.BytesIO, name: str) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(source) as archive:
            if sum(info.file_size for info in archive.infolist()) > _MOST_BYTES:
                raise InputError(f"{name}: unpacks to more than {_MOST_BYTES >> 30} GiB")
        with np.load(source, allow_pickle=False) as data:
            arrays: dict[str, Array] = {key: data[key] for key in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        reason = " ".join(str(error).split())
        if "pickle" in reason or "Object arrays" in reason:
            reason = "it holds pickled Python objects, which are never loaded"
        raise InputError(f"{name}: not a usable .npz: {reason}") from error
    return {key: a.astype(object) if a.dtype.kind in "US" else a for key, a in arrays.items()}


def _plain(values: Mapping[str, Any]) -> dict[str, Array]:
    """Arrays that need no pickle."""
    plain: dict[str, Array] = {}
    for name, value in values.items():
        for part, array in _parts(name, value):
            plain[part] = array.astype(str) if array.dtype.kind == "O" else array
    return plain


def _parts(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """A value as arrays: a sequence's items by number, maps of scores as a column per key."""
    items = _items(value)
    if isinstance(value, np.ndarray):
        yield name, cast(Array, value)
    elif items and all(isinstance(x, dict) and x.keys() == items[0].keys() for x in items):
        yield name, np.array([[*one.values()] for one in items])
        yield f"{name}.keys", np.array([*items[0]])
    elif items and all(isinstance(item, np.ndarray) for item in items):
        yield from ((f"{name}.{index}", item) for index, item in enumerate(items))
    else:
        raise InputError(f"output {name!r} is a {type(value).__name__}; .npz holds arrays only")


def _items(value: object) -> list[Any]:
    """Those of a list; none of what is none."""
    return [*cast("Iterable[Any]", value)] if isinstance(value, list) else []
