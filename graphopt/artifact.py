"""The folder that a model is compiled into: native files and a manifest that vouches for them.

Read without onnx or onnx-ir: a device that only runs models needs neither.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import stat
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from graphopt.digests import remembered
from graphopt.errors import GraphoptError, InputError
from graphopt.target import Target

FORMAT = 4
"""Version of the manifest's layout; a reader refuses any other."""

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
"""Beside the manifest: that this installation made it, see `graphopt.trust`."""
_CHECKSUM = "checksum"
_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a compiled model."""

    name: str
    dtype: str
    """`float32`, `bfloat16`, `string` …; `sequence(…)`, `optional(…)`; `?` for other types."""
    shape: tuple[int | str, ...] | None
    """Sizes and names of free dimensions (an unnamed one is `?`); None: of any rank."""

    @property
    def kind(self) -> str:
        """Type and shape as text."""
        shape = "any shape" if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        return f"{self.dtype} {shape}"

    def __str__(self) -> str:
        return f"{self.name} {self.kind}"


@dataclass(frozen=True)
class Part:
    """A piece of a model that was cut: what one backend compiled, in a folder of its own."""

    folder: str
    """Below the artifact's folder."""
    backend: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    options: Mapping[str, Any]
    nodes: int


@dataclass(frozen=True)
class Block:
    """What runs one after the other in a scope of its own: the body of a loop, or a branch."""

    inputs: tuple[str, ...]
    """The names in it of what it is given, in order."""
    outputs: tuple[TensorInfo, ...]
    """What it gives, by name: a part's output, an input of its own, or a constant."""
    steps: tuple[Part | Flow, ...]
    constants: str
    """A file of arrays by name; empty where there are none."""


@dataclass(frozen=True)
class Axis:
    """Where a Scan takes its slices, or stacks them."""

    number: int
    backwards: bool


@dataclass(frozen=True)
class Flow:
    """Control flow whose blocks are compiled, and which the host steers (`graphopt.flow`).

    A Loop takes its number of trips, its condition, what it carries, and what its body reads of
    the values around it; the body takes the number of the iteration in place of the first two,
    and gives the condition, what is carried on, and what is stacked. A Scan takes what it carries,
    what it takes slices of, and what its body reads. An If takes its condition and what its
    branches read; the one for true comes first.
    """

    kind: Literal["If", "Loop", "Scan"]
    node: str
    """Its label."""
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    blocks: tuple[Block, ...]
    carried: int = 0
    """How many values a Loop or a Scan carries."""
    scanned: tuple[Axis, ...] = ()
    stacked: tuple[Axis, ...] = ()
    """Of a Scan."""


@dataclass(frozen=True)
class Manifest:
    """What is in an artifact folder, where it came from and what may load it."""

    backend: str
    target: Target
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    options: Mapping[str, Any]
    """The backend's options, all of them, as plain data."""
    versions: Mapping[str, str]
    """Versions of graphopt and of the tools that wrote the files."""
    source: str
    """Name of the file that was compiled; empty for a model that was in memory."""
    source_sha256: str
    """Of that file, without its external data; empty for a model that was in memory."""
    pipeline: str
    """The passes that ran before, as pipeline text."""
    files: Mapping[str, str]
    """SHA-256 of every file of the folder, by path below it, the manifest and its signature
    apart."""
    parts: tuple[Part | Flow, ...] = ()
    """Where the model was cut: its pieces in the order in which they run."""
    constants: str = ""
    """A file of arrays that the pieces take, by name; empty where there are none."""
    fallback: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """The nodes that the backend does not take, by label, each with the reason."""
    measured: Mapping[str, float] = dataclasses.field(default_factory=dict[str, float])
    """Where it was the fastest of several: median latencies in ms, by what was tried."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**dataclasses.asdict(self), "target": self.target.to_dict()}


def compiled(steps: Sequence[Part | Flow]) -> Iterator[Part]:
    """All that was compiled, what is in loops and branches included."""
    yield from (step for step in steps if isinstance(step, Part))
    for flow in flows(steps):
        for block in flow.blocks:
            yield from (step for step in block.steps if isinstance(step, Part))


def flows(steps: Sequence[Part | Flow]) -> Iterator[Flow]:
    """All loops and branches, outer ones first."""
    for step in steps:
        if isinstance(step, Flow):
            yield step
            for block in step.blocks:
                yield from flows(block.steps)


def write(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a folder whose other files are complete; returns it with hashes."""
    full = dataclasses.replace(
        manifest, files={name: remembered(folder / name) for name in present(folder)}
    )
    (folder / MANIFEST).write_text(sealed({"format": FORMAT, **full.to_dict()}), "utf-8")
    return full


def sealed(data: Mapping[str, Any]) -> str:
    """The text of a manifest with a checksum of it: that tells damage, not who made it."""
    full = {**data, _CHECKSUM: _checksum(data)}
    return json.dumps(full, indent=2, sort_keys=True, allow_nan=False) + "\n"


def read(folder: Path) -> Manifest:
    """The manifest of a folder; nothing else is looked at. InputError where it is none."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise InputError(f"{folder}: no such artifact folder")
    try:
        size = regular_size(path)
        if size > _MANIFEST_BYTES:
            raise InputError(f"{path}: larger than any manifest ({size:,} bytes)")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder}: not a compiled model, it has no {MANIFEST}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not valid JSON") from None
    return _parse(path, data)


def check(folder: Path, manifest: Manifest) -> None:
    """Raise InputError unless the folder holds exactly the files of its manifest, unchanged."""
    there = present(folder)
    for name in there:
        if name not in manifest.files:
            raise InputError(f"{folder}: {name} is not in its manifest")
    for name, expected in manifest.files.items():
        if name not in there:
            raise InputError(f"{folder}: {name} is missing")
        regular_size(folder / name)
        if remembered(folder / name) != expected:
            raise InputError(f"{folder}: {name} was changed after it was compiled")


@contextlib.contextmanager
def publish(folder: Path, *, overwrite: bool) -> Generator[Path]:
    """A new folder to fill, which takes the name `folder` when the block ends well.

    Where the block fails nothing is left and an artifact of that name stays as it was. Only an
    empty folder, or with `overwrite` an artifact folder, is replaced. Raises InputError else.
    """
    folder = folder.absolute()
    _check_replaceable(folder, overwrite)
    new = folder.with_name(f".{folder.name}.{os.urandom(6).hex()}")
    try:
        try:
            new.mkdir()  # a time limit may strike right behind it
        except OSError as error:
            raise InputError(f"{folder.parent}: {error.strerror}") from None
        yield new
        for path in (*new.rglob("*"), new):
            _flush(path)
        _replace(new, folder, overwrite)
    except OSError as error:
        raise GraphoptError(f"{folder}: {error.strerror or error}") from error
    finally:
        _remove(new)


def present(folder: Path) -> list[str]:
    """What is in an artifact folder and the folders of its parts, sorted.

    The manifest and its signature are left out.
    """
    found: list[str] = []
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            found += [f"{path.name}/{inner.name}" for inner in path.iterdir()]
        elif path.name not in (MANIFEST, SIGNATURE):
            found.append(path.name)
    return sorted(found)


def _parse(path: Path, data: Any) -> Manifest:
    if not isinstance(data, dict) or "format" not in data:
        raise InputError(f"{path}: not the manifest of a compiled model")
    fields = cast("dict[str, Any]", data)
    intact = fields.get(_CHECKSUM) == _checksum(fields)
    version = fields.pop("format")
    if version != FORMAT:
        raise InputError(f"{path}: format {version}, this version of graphopt reads {FORMAT}")
    try:
        del fields[_CHECKSUM]
        fields["backend"] = str(fields["backend"])
        fields["target"] = Target.from_dict(fields["target"])
        fields["inputs"] = _infos(fields["inputs"])
        fields["outputs"] = _infos(fields["outputs"])
        fields["parts"] = tuple(_step(item) for item in fields["parts"])
        fields["constants"] = _file(fields["constants"])
        manifest = Manifest(**fields)
        for name in ("options", "versions", "files", "fallback", "measured"):
            if not isinstance(fields[name], dict):
                raise TypeError(name)
    except (KeyError, TypeError, ValueError, RecursionError, InputError) as error:
        raise InputError(f"{path}: not a manifest of format {FORMAT} ({error})") from None
    for name, digest in manifest.files.items():
        plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
        if not plain or not re.fullmatch("[0-9a-f]{64}", str(digest)):
            raise InputError(f"{path}: {name!r} is not the name of a file in its folder")
    if not intact:
        raise InputError(f"{path}: was changed after it was written")
    return manifest


def _checksum(data: Mapping[str, Any]) -> str:
    content = {name: value for name, value in data.items() if name != _CHECKSUM}
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _step(item: Mapping[str, Any]) -> Part | Flow:
    if "kind" not in item:
        return _part(item)
    blocks = tuple(_block(block) for block in item["blocks"])
    inputs, outputs = (tuple(map(str, item[name])) for name in ("inputs", "outputs"))
    node, carried = str(item["node"]), int(item["carried"])
    scanned, stacked = (
        tuple(Axis(int(axis["number"]), bool(axis["backwards"])) for axis in item[name])
        for name in ("scanned", "stacked")
    )
    sizes = {(len(inputs) - len(b.inputs), len(b.outputs) - len(outputs)) for b in blocks}
    left = len(inputs) - carried - len(scanned)
    match item["kind"], len(blocks):
        case "If", 2 if sizes == {(1, 0)}:
            return Flow("If", node, inputs, outputs, blocks)
        case "Loop", 1 if sizes == {(1, 1)} and 0 <= carried < len(inputs) - 1:
            return Flow("Loop", node, inputs, outputs, blocks, carried)
        case "Scan", 1 if sizes == {(0, 0)} and carried >= 0 and scanned and left >= 0:
            if carried + len(stacked) == len(outputs):
                return Flow("Scan", node, inputs, outputs, blocks, carried, scanned, stacked)
        case _:
            pass
    raise ValueError(f"{node!r} is no Loop, Scan or If of its blocks")


def _block(item: Mapping[str, Any]) -> Block:
    return Block(
        inputs=tuple(map(str, item["inputs"])),
        outputs=_infos(item["outputs"]),
        steps=tuple(_step(step) for step in item["steps"]),
        constants=_file(item["constants"]),
    )


def _file(name: object) -> str:
    """The name of a file in the folder itself, or none."""
    if not re.fullmatch(r"([\w-][\w.-]*)?", str(name)):
        raise ValueError(f"{name!r} is no file of constants")
    return str(name)


def _part(item: Mapping[str, Any]) -> Part:
    folder = str(item["folder"])
    if not re.fullmatch(r"[\w-]+", folder):
        raise ValueError(f"{folder!r} is no folder of a part")
    return Part(
        folder=folder,
        backend=str(item["backend"]),
        inputs=_infos(item["inputs"]),
        outputs=_infos(item["outputs"]),
        options=dict(item["options"]),
        nodes=int(item["nodes"]),
    )


def _infos(data: Sequence[Mapping[str, Any]]) -> tuple[TensorInfo, ...]:
    return tuple(
        TensorInfo(
            name=str(item["name"]),
            dtype=str(item["dtype"]),
            shape=None if item["shape"] is None else tuple(item["shape"]),
        )
        for item in data
    )


def regular_size(path: Path) -> int:
    """Size of a file in bytes; InputError for links, pipes, devices and folders."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: not a regular file")
    return status.st_size


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: exists and is no folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: exists and is not a compiled model; it is left alone")
    if not overwrite:
        raise InputError(f"{folder}: exists; ask for overwriting (--overwrite) to replace it")


def _replace(new: Path, folder: Path, overwrite: bool) -> None:
    """Give `new` the name `folder`; what bore it is deleted only afterwards.

    An empty folder makes way by itself. Another process may fill the folder at the same time: what
    it made is then what was there before.
    """
    replaced: list[Path] = []
    try:
        while not _renamed(new, folder):
            if not overwrite:
                raise InputError(f"{folder}: exists by now, another process has made it")
            old = new.with_name(f"{new.name}.old{len(replaced)}")
            with contextlib.suppress(FileNotFoundError):
                folder.rename(old)
                replaced.append(old)
    except OSError:
        if replaced and not folder.exists():
            replaced[-1].rename(folder)
        raise
    finally:
        for old in replaced:
            _remove(old)


def _renamed(new: Path, folder: Path) -> bool:
    """Rename unless a folder that is not empty is in the way."""
    try:
        new.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _remove(folder: Path) -> None:
    import shutil  # it takes as long to import as a small artifact to load

    shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
