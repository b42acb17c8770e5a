"""What strikes a real `graphopt compile` from outside: one line, an exit code, nothing left."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from signal import SIGINT

import pytest

from graphopt import artifact, models

COMPILE = [sys.executable, "-m", "graphopt", "compile"]
MODEL = str(models.path("digits_cnn"))


@pytest.mark.parametrize("form", ["onnx", "ort"])
def test_a_full_disk(tmp_path: Path, form: str) -> None:
    room = 450 if form == "ort" else 16  # of KiB for each file: there is enough for the .onnx
    limited = f'ulimit -f {room}; exec "$@"'
    arguments = [MODEL, "-O0", "-o", "out", "--option", f"format={form}"]
    done = subprocess.run(
        ["bash", "-c", limited, "bash", *COMPILE, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (2, 4)
    assert done.stderr.count("\n") == 1
    assert ("cannot be written" if form == "onnx" else "Failed to save") in done.stderr
    assert not list(tmp_path.iterdir())


def test_interrupted(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMPILE, MODEL, "-o", "out", "--tune", "5"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if any(tmp_path.iterdir()):
            break
        time.sleep(0.05)
    process.send_signal(SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "graphopt: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_two_at_once_into_one_folder(tmp_path: Path) -> None:
    two = [
        subprocess.Popen(
            [*COMPILE, MODEL, "-O0", "-q", "-o", "out"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in two]
    assert sorted(process.returncode for process in two) == [0, 2]
    assert "exists" in "".join(errors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    artifact.check(tmp_path / "out", artifact.read(tmp_path / "out"))
