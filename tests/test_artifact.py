"""Artifact folders: published whole or not at all, and refused where they were touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from graphopt import artifact
from graphopt.artifact import MANIFEST, Manifest, TensorInfo
from graphopt.errors import GraphoptError, InputError, TimeLimitError
from graphopt.target import Target

INFO = TensorInfo("x", "float32", (1, "n"))


def make(folder: Path, content: bytes = b"model") -> Manifest:
    """An artifact of one file."""
    with artifact.publish(folder, overwrite=True) as staging:
        (staging / "model.bin").write_bytes(content)
        return artifact.write(
            staging,
            Manifest(
                backend="none",
                target=Target.portable(),
                inputs=(INFO,),
                outputs=(TensorInfo("y", "?", None),),
                options={"threads": 2},
                versions={"graphopt": "0"},
                source="m.onnx",
                source_sha256="",
                pipeline="fold-constants",
                files={},
            ),
        )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = make(tmp_path / "a")
    assert artifact.read(tmp_path / "a") == written
    artifact.check(tmp_path / "a", written)
    assert list(written.files) == ["model.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert str(INFO) == "x float32 [1, n]"


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    assert (tmp_path / "a" / MANIFEST).read_bytes() == (tmp_path / "b" / MANIFEST).read_bytes()


def change_file(folder: Path) -> None:
    (folder / "model.bin").write_bytes(b"other")


def remove_file(folder: Path) -> None:
    (folder / "model.bin").unlink()


def add_file(folder: Path) -> None:
    (folder / "more.bin").touch()


def link_file(folder: Path) -> None:
    (folder / "model.bin").rename(folder.parent / "moved")
    (folder / "model.bin").symlink_to(folder.parent / "moved")


def pipe_file(folder: Path) -> None:
    (folder / "model.bin").unlink()
    os.mkfifo(folder / "model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change_file, "model.bin was changed"),
        (remove_file, "model.bin is missing"),
        (add_file, "more.bin is not in its manifest"),
        (link_file, "not a regular file"),
        (pipe_file, "not a regular file"),
    ],
)
def test_damaged_files_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "a"
    manifest = make(folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        artifact.check(folder, manifest)
    assert "\n" not in str(caught.value)


Change = Callable[[dict[str, Any]], Any]


def edit(**changes: Any) -> Change:
    return lambda data: data | changes


def become(other: Any) -> Change:
    return lambda data: other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (become([]), "not the manifest"),
        (become(None), "not the manifest"),
        (become({}), "not the manifest"),
        (edit(format=99), "format 99, this version of graphopt reads 4"),
        (edit(files={"../model.bin": "0" * 64}), "not the name of a file"),
        (edit(files={"/etc/passwd": "0" * 64}), "not the name of a file"),
        (edit(files={"model.bin": "0"}), "not the name of a file"),
        (edit(files={"model.bin": 7}), "not the name of a file"),
        (edit(files=["model.bin"]), "not a manifest"),
        (edit(inputs=[{"name": "x"}]), "not a manifest"),
        (edit(inputs=7), "not a manifest"),
        (edit(target="cpu"), "not a manifest"),
        (edit(surprise=1), "not a manifest"),
        (edit(options=None), "not a manifest"),
        (edit(options={"threads": 3}), "was changed after it was written"),
        (edit(checksum="00000000"), "was changed after it was written"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=message) as caught:
        artifact.read(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b"1e999"])
def test_manifests_that_are_no_json(tmp_path: Path, text: bytes) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).write_bytes(text)
    with pytest.raises(InputError, match=r"manifest\.json: not"):
        artifact.read(tmp_path / "a")


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such artifact folder"):
        artifact.read(tmp_path / "absent")
    with pytest.raises(InputError, match="it has no manifest"):
        artifact.read(tmp_path)
    (tmp_path / MANIFEST).symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="not a regular file"):
        artifact.read(tmp_path)


def test_a_failure_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    before = make(tmp_path / "a")
    for error in (OSError(28, "No space left on device"), InputError("x"), KeyboardInterrupt()):
        with (
            pytest.raises((GraphoptError, KeyboardInterrupt)),
            artifact.publish(tmp_path / "a", overwrite=True) as staging,
        ):
            (staging / "model.bin").write_bytes(b"half")
            raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    artifact.check(tmp_path / "a", before)


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    data = path.read_bytes()
    for index in range(0, len(data), 7):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        with pytest.raises(InputError) as caught:
            artifact.read(tmp_path / "a")
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_two_at_once_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with (
        pytest.raises(InputError, match="exists by now, another process has made it"),
        artifact.publish(folder, overwrite=False) as staging,
    ):
        (staging / "model.bin").write_bytes(b"late")
        make(folder, b"first")
    assert (folder / "model.bin").read_bytes() == b"first"
    artifact.check(folder, artifact.read(folder))
    with artifact.publish(folder, overwrite=True) as staging:
        (staging / "model.bin").write_bytes(b"last")
        make(folder, b"other")
    assert (folder / "model.bin").read_bytes() == b"last"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    make(tmp_path / "empty", b"newer")
    assert (tmp_path / "empty" / "model.bin").read_bytes() == b"newer"
    with (
        pytest.raises(InputError, match="exists; ask for overwriting"),
        artifact.publish(tmp_path / "empty", overwrite=False),
    ):
        pass


def test_what_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link", "absent/below"):
        with (
            pytest.raises(InputError),
            artifact.publish(tmp_path / name, overwrite=True),
        ):
            pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home", "link"]
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_a_time_limit_right_behind_the_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = Path.mkdir

    def expire(path: Path) -> None:
        once(path)
        raise TimeLimitError("time is up")

    monkeypatch.setattr(Path, "mkdir", expire)
    with pytest.raises(TimeLimitError), artifact.publish(tmp_path / "a", overwrite=False):
        pass
    assert not list(tmp_path.iterdir())
