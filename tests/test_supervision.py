"""The command's parent: signals, crashes, exit codes, what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="only where signals tell who sent them"
)
_PRELUDE = """
import os, signal, sys, tempfile, time
from graphopt.supervision import supervised
def command():
    folder = tempfile.mkdtemp(prefix="graphopt-work-")
    print(os.getpid(), flush=True)
"""


def start(body: str, scratch: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that supervises `body`, which has a temporary folder and told its number."""
    return subprocess.Popen(
        [sys.executable, "-c", f"{_PRELUDE}    {body}\nsupervised(command)"],
        env={**os.environ, "TMPDIR": str(scratch), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def first_line(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("return", 0, ""),
        ("sys.exit(5)", 5, ""),
        ("os.abort()", 4, "graphopt: native code crashed with SIGABRT, most likely ONNX Runtime"),
        ("os.kill(os.getpid(), 11)", 4, "graphopt: native code crashed with SIGSEGV"),
        ("os.kill(os.getpid(), 9)", 4, "graphopt: killed, perhaps by the system for want of mem"),
        ("os.kill(os.getpid(), 15)", 143, "graphopt: terminated"),
        ("os.kill(os.getpid(), 1)", 129, "graphopt: terminated"),
        ("signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)", 130, "graphopt: interrupted"),
    ],
)
def test_an_end_is_told_and_leaves_nothing(body: str, code: int, line: str, tmp_path: Path) -> None:
    process = start(body, tmp_path)
    _, text = process.communicate(timeout=60)
    assert process.returncode == code and text.startswith(line)
    assert text.count("\n") == bool(line)
    assert not list(tmp_path.iterdir())


def test_where_it_crashed_is_shown_on_demand(tmp_path: Path) -> None:
    _, text = start("os.abort()", tmp_path, GRAPHOPT_TRACEBACK="1").communicate(timeout=60)
    assert "in command" in text and "SIGABRT" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_go_to_the_child(number: signal.Signals, tmp_path: Path) -> None:
    ready = f"signal.signal({number:d}, lambda s, f: sys.exit(s + 40)); print(1, flush=True)"
    with start(f"{ready}; time.sleep(60)", tmp_path) as process:
        assert first_line(process) > first_line(process) == 1
        process.send_signal(number)
        assert process.wait(60) == number + 40


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    with start("time.sleep(60)", tmp_path) as process:
        child = first_line(process)
        process.kill()
    deadline = time.monotonic() + 30
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(child)


def alive(number: int) -> bool:
    """Whether a process of that number runs; one that waits to be buried does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def test_no_room_for_temporary_folders(tmp_path: Path) -> None:
    none = str(tmp_path / "none")
    with start("return", tmp_path, TMPDIR=none, TEMP=str(tmp_path)) as process:
        assert process.wait(60) == 0
