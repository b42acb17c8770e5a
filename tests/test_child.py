"""Children: results, errors, crashes, hangs and limits, each one line for the parent."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from graphopt import child, places
from graphopt.errors import GraphoptError, InputError, MissingError, TimeLimitError


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return places.state("logs")


def logs(folder: Path) -> list[str]:
    """What the logs say."""
    return [path.read_text() for path in folder.glob("*.log")]


def test_a_result_comes_back_and_leaves_no_log(
    state: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert child.call("tests._child:double", {"number": 21}, what="sum") == 42
    assert logs(state) == []
    assert capfd.readouterr() == ("", "")


def test_it_gets_variables() -> None:
    found = child.call(
        "tests._child:variable", {"name": "ONE"}, what="w", environment={"ONE": "two"}
    )
    assert found == "two"


@pytest.mark.parametrize(
    ("kind", "error", "text", "kept"),
    [
        ("input", InputError, "no such dial", 0),
        ("missing", MissingError, "no such extra", 0),
        ("other", GraphoptError, "the compiler failed: KeyError: 'an.nold key'", 1),
        ("disk", GraphoptError, "the compiler failed: .*No space left on device", 1),
    ],
)
def test_errors_keep_their_class(
    state: Path, kind: str, error: type[GraphoptError], text: str, kept: int
) -> None:
    with pytest.raises(error, match=text) as caught:
        child.call("tests._child:refuse", {"kind": kind}, what="the compiler")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(logs(state)) == kept


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_names_its_signal_and_log(state: Path, name: str) -> None:
    number = getattr(signal, name)
    with pytest.raises(GraphoptError, match=f"the compiler crashed with {name}") as caught:
        child.call("tests._child:crash", {"number": number}, what="the compiler")
    assert str(state) in str(caught.value)
    assert "the last words" in logs(state)[0]


def test_one_that_is_killed() -> None:
    with pytest.raises(GraphoptError, match="was killed, perhaps by the system for want of mem"):
        child.call("tests._child:crash", {"number": signal.SIGKILL}, what="the compiler")


def test_one_that_just_ends() -> None:
    with pytest.raises(GraphoptError, match="the compiler ended with exit code 3"):
        child.call("tests._child:leave", {"code": 3}, what="the compiler")


def test_a_hang_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"took more than 1\.5 s and was stopped"):
        child.call("tests._child:hang", {"marker": str(marker)}, what="it", seconds=1.5)
    assert time.monotonic() - start < 20
    grandchild = int(marker.read_text())
    for _ in range(100):
        if not alive(grandchild):
            return
        time.sleep(0.05)
    os.kill(grandchild, signal.SIGKILL)
    pytest.fail("what the child started goes on")


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_memory_limit() -> None:
    with pytest.raises(GraphoptError, match="ran out of memory with a memory limit of 64 MB"):
        child.call("tests._child:eat", {"count": 1 << 30}, what="it", memory=64 << 20)
    assert child.call("tests._child:eat", {"count": 1000}, what="it", memory=64 << 20) == 1000


def test_old_logs_go(state: Path) -> None:
    state.mkdir(parents=True)
    for index in range(40):
        (state / f"{index}.log").touch()
    with pytest.raises(GraphoptError):
        child.call("tests._child:leave", {"code": 3}, what="it")
    assert len(logs(state)) == 20


def test_a_state_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="logs are kept there"):
        child.call("tests._child:double", {"number": 1}, what="it")
