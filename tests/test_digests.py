"""Digests of files: remembered while a file is untouched, and only then."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from graphopt import digests, places

SIZE = 2 << 20


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written a while ago, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "_SETTLED_NS", 1_000_000)
    path = tmp_path / "model.ort"
    path.write_bytes(bytes(SIZE))
    time.sleep(0.02)
    return path


def records() -> list[Path]:
    """What is remembered."""
    folder = places.cache("digests")
    return list(folder.iterdir()) if folder.is_dir() else []


def wanted(path: Path) -> str:
    """The digest, by the standard library alone."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert digests.remembered(file) == wanted(file)
    assert len(records()) == 1
    monkeypatch.delattr(digests, "sha256")
    assert digests.remembered(file) == wanted(file)


def test_what_was_just_written_is_not_remembered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_SETTLED_NS", 10**12)
    assert digests.remembered(file) == wanted(file)
    assert not records()


def test_a_byte_that_changes_under_the_old_date(file: Path) -> None:
    before, status = digests.remembered(file), file.stat()
    with file.open("r+b") as stream:
        stream.seek(SIZE // 2)
        stream.write(b"\1")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    assert digests.remembered(file) == wanted(file) != before


def test_another_file_in_its_place(file: Path) -> None:
    before = digests.remembered(file)
    other = file.with_name("other")
    other.write_bytes(b"\1" * SIZE)
    other.replace(file)
    assert digests.remembered(file) == wanted(file) != before


@pytest.mark.parametrize("content", [b"", b"\xff", b"1 2 3 " + b"0" * 64, b"0" * 64])
def test_a_damaged_record_is_not_used(file: Path, content: bytes) -> None:
    digests.remembered(file)
    records()[0].write_bytes(content)
    assert digests.remembered(file) == wanted(file)


def test_a_record_that_others_may_write_is_not_used(file: Path) -> None:
    digests.remembered(file)
    record = records()[0]
    record.write_text(record.read_text().replace(wanted(file), "0" * 64))
    assert digests.remembered(file) == "0" * 64
    record.chmod(0o666)
    assert digests.remembered(file) == wanted(file)


def test_a_cache_that_cannot_be_written(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "blocked").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    assert digests.remembered(file) == wanted(file)


def test_old_records_go(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_RECORDS", 2)
    for index in range(4):
        path = file.with_name(f"model{index}")
        path.write_bytes(bytes(SIZE + index))
        time.sleep(0.005)
        digests.remembered(path)
    assert len(records()) == 2
