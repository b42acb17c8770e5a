"""What strikes a real `graphopt compile` from outside: one line, an exit code, nothing left."""

from __future__ import annotations

import os
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


def test_a_full_disk_below_the_caches(tmp_path: Path) -> None:
    """Records and keys are done without, and no half of one is left."""
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 10))
    time.sleep(0.2)  # what was written a moment ago is not remembered
    code = (
        "from pathlib import Path; from graphopt import digests, trust\n"
        "digests.remembered(Path('file')); trust.sign(Path())"
    )
    home = {"XDG_CACHE_HOME": str(tmp_path / "c"), "XDG_STATE_HOME": str(tmp_path / "s")}
    subprocess.run(
        ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash", sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, **home},
        timeout=120,
        check=True,
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]


def test_a_runtime_that_tells_of_models(tmp_path: Path) -> None:
    """Recent releases of ONNX Runtime keep what they tell in files."""
    home = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    code = "import graphopt, onnxruntime as ort; ort.InferenceSession(MODEL)".replace(
        "MODEL", repr(MODEL)
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **home}, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group", [False, True])
def test_interrupted(tmp_path: Path, group: bool) -> None:
    process = subprocess.Popen(
        [*COMPILE, MODEL, "-o", "out", "--tune", "5"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(600):
        if any(tmp_path.iterdir()):
            break
        time.sleep(0.05)
    if group:
        os.killpg(process.pid, SIGINT)
    else:
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
