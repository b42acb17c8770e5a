"""Artifacts run through a server on the loopback interface, and what it refuses."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from graphopt import artifact, compilation, models, npz, rpc
from graphopt.cli import main
from graphopt.errors import GraphoptError, InputError
from graphopt.measurement import measure
from graphopt.timing import Plan

TOKEN = "the token of the tests"
FEEDS = {"image": np.load(models.path("digits_cnn").with_name("digits_test.npz"))["image"][:1]}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server in a process of its own, as somebody starts it; it is interrupted in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "graphopt", "serve-rpc", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, rpc.TOKEN: TOKEN, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("listening on 127.0.0.1:")
    assert TOKEN not in line
    yield line.split()[-1]
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "graphopt: interrupted\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model."""
    place = tmp_path_factory.mktemp("rpc") / "a"
    return compilation.compile(models.path("digits_cnn"), "cpu", place, level=0)


def test_it_runs_as_it_does_here(address: str, folder: Path) -> None:
    remote, here = rpc.Remote(folder, address, TOKEN), compilation.load(folder)
    assert (remote.inputs, remote.outputs) == (here.inputs, here.outputs)
    for _ in range(2):
        for name, value in here.run(FEEDS).items():
            np.testing.assert_array_equal(np.asarray(remote.run(FEEDS)[name]), np.asarray(value))
    times = remote.benchmark(FEEDS, 5)
    assert times.dtype == np.int64
    assert len(times) == 5 and (times > 0).all()
    assert [row.op for row in remote.profile(FEEDS)] == [row.op for row in here.profile(FEEDS)]


def test_commands(
    address: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(rpc.TOKEN, TOKEN)
    npz.write(tmp_path / "in.npz", FEEDS)
    arguments = ["run", str(folder), "--inputs", str(tmp_path / "in.npz"), "--rpc", address]
    done = CliRunner().invoke(main, [*arguments, "--per-op", "--json", "-"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["outputs"][0]["shape"] == [1, 10]
    assert any(row["op"].endswith("Conv") for row in found["ops"])


def test_measuring(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(rpc.TOKEN, TOKEN)
    both = {"model": models.path("digits_cnn"), "compiled": folder}
    found = measure(both, FEEDS, device=address, plan=Plan(0, 1, 0, 3))
    assert [each.process for each in found.models] == [None, None]
    assert found.models[1].ratio is not None
    assert any(address in note for note in found.notes)


@pytest.mark.parametrize("token", ["another", ""])
def test_a_wrong_token(address: str, folder: Path, token: str) -> None:
    with pytest.raises(InputError, match="token"):
        rpc.Remote(folder, address, token)


def test_a_client_that_sends_nonsense(address: str) -> None:
    for method, path in (("POST", "/run"), ("PUT", "/files/../../x"), ("POST", "/other")):
        host, port = address.split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request(method, path, b"junk", {"Authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        assert response.status == 422
        assert json.loads(response.read())["error"] == "InputError"
        connection.close()


def test_a_client_that_goes_away(address: str, folder: Path) -> None:
    """The server says nothing of it, see `address`, and serves the next one."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"PUT /files/model.onnx HTTP/1.1\r\nContent-Length: 100\r\n")
        connection.sendall(f"Authorization: Bearer {TOKEN}\r\n\r\nhalf".encode())
    assert rpc.Remote(folder, address, TOKEN).run(FEEDS)


def test_errors_of_the_server_are_ours(address: str, folder: Path, tmp_path: Path) -> None:
    remote = rpc.Remote(folder, address, TOKEN)
    with pytest.raises(InputError, match=r"image.*takes"):
        remote.run({"image": np.zeros((1, 2), np.float32)})
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    manifest["target"]["isa"] = ["avx1024"]
    copy = tmp_path / "a"
    copy.mkdir()
    for name in manifest["files"]:
        (copy / name).write_bytes((folder / name).read_bytes())
    (copy / artifact.MANIFEST).write_text(artifact.sealed(manifest))
    with pytest.raises(GraphoptError, match="this machine's CPU lacks avx1024"):
        rpc.Remote(copy, address, TOKEN)


def test_no_server(folder: Path) -> None:
    with rpc.server("127.0.0.1", 0, TOKEN) as closed:
        port = closed.server_port
    with pytest.raises(GraphoptError, match="no answer from the server"):
        rpc.Remote(folder, f"127.0.0.1:{port}", TOKEN)
    with pytest.raises(InputError, match="is not like localhost"):
        rpc.Remote(folder, "somewhere", TOKEN)


@pytest.mark.parametrize(
    ("host", "token", "message"),
    [
        ("0.0.0.0", TOKEN, "open to other machines"),
        ("127.0.0.1", "", "needs a token"),
        ("192.0.2.1", TOKEN, "open to other machines"),
    ],
)
def test_what_is_not_served(host: str, token: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rpc.server(host, 0, token)


def test_an_interface_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"192\.0\.2\.1:0: "):
        rpc.server("192.0.2.1", 0, TOKEN, remote=True)


def test_another_interface_when_asked() -> None:
    with rpc.server("0.0.0.0", 0, TOKEN, remote=True) as open_to_all:
        assert open_to_all.server_port
