"""Artifacts run on another machine: a server there, and here what looks like an executable.

HTTP with a bearer token (RFC 9110, 6750), arrays as .npz: nothing that either side sends is
executed but the artifact's own code, and that only for who has the token. Nothing is encrypted: the
server listens on the loopback interface, which a tunnel (`ssh -L`) leads to. Each connection has a
process of its own, so that a model that crashes takes nobody else's with it.

Needs neither onnx nor onnx-ir, on either side.
"""

from __future__ import annotations

import dataclasses
import hmac
import http.client
import ipaddress
import json
import os
import re
import socket
import socketserver
import tempfile
import urllib.parse
import weakref
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from graphopt import artifact, compilation, errors, npz
from graphopt.artifact import TensorInfo
from graphopt.backends import Array, OpTime, Output
from graphopt.errors import GraphoptError, InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    from graphopt.backends import Executable

PORT = 9190
TOKEN = "GRAPHOPT_RPC_TOKEN"
"""The variable that holds the token, on both sides."""
_IDLE_SECONDS = 600.0
_FILE = re.compile(r"/files/([\w-][\w.-]*(?:/[\w-][\w.-]*)?)")
_JSON, _ARRAYS = "application/json", "application/x-npz"


class Remote:
    """An artifact that a server runs; see `graphopt.backends.Executable`.

    Args:
        folder: the artifact, which is sent there.
        address: `HOST:PORT` of `graphopt serve-rpc`.
        token: the server's; that of the variable GRAPHOPT_RPC_TOKEN if not given.

    Raises:
        InputError: no token, an address or a token that is wrong, or no sound artifact.
        GraphoptError: the server cannot be reached, or cannot run the artifact.
    """

    def __init__(self, folder: Path, address: str, token: str = "") -> None:
        host, port = _split(address)
        token = token or os.environ.get(TOKEN, "")
        if not token:
            raise InputError(f"{address} wants the token that it showed at its start, in {TOKEN}")
        self._address = address
        self._headers = {"Authorization": f"Bearer {token}"}
        self._connection = http.client.HTTPConnection(host, port, timeout=_IDLE_SECONDS)
        weakref.finalize(self, self._connection.close)  # which ends what runs at the other end
        manifest = artifact.read(folder)
        artifact.check(folder, manifest)
        for name in (artifact.MANIFEST, *manifest.files):
            with (folder / name).open("rb") as file:
                self._ask("PUT", f"/files/{name}", file, (folder / name).stat().st_size)
        answer = json.loads(self._ask("POST", "/load"))
        self.inputs = tuple(_info(item) for item in answer["inputs"])
        self.outputs = tuple(_info(item) for item in answer["outputs"])

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Output]:
        """All outputs by name; InputError where one is no array."""
        found: dict[str, Output] = {}
        found |= npz.unpack(self._ask("POST", "/run", npz.pack(feeds)))
        return {info.name: found[info.name] for info in self.outputs}

    def benchmark(self, feeds: Mapping[str, Array], runs: int) -> npt.NDArray[np.int64]:
        """Nanoseconds of each run by the server's clock, without the way there and back."""
        answer = self._ask("POST", f"/benchmark?runs={runs}", npz.pack(feeds))
        return np.array(json.loads(answer), np.int64)

    def profile(self, feeds: Mapping[str, Array], runs: int = 10) -> tuple[OpTime, ...]:
        """Time per node."""
        answer = self._ask("POST", f"/profile?runs={runs}", npz.pack(feeds))
        return tuple(OpTime(**row) for row in json.loads(answer))

    def _ask(self, method: str, path: str, body: Any = b"", size: int | None = None) -> bytes:
        length = str(len(body) if size is None else size)
        try:
            self._connection.request(
                method, path, body, {**self._headers, "Content-Length": length}
            )
            response = self._connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise GraphoptError(f"{self._address}: no answer from the server ({why})") from None
        if response.status == http.HTTPStatus.UNAUTHORIZED:
            raise InputError(f"{self._address}: the server wants another token than {TOKEN} has")
        if response.status != http.HTTPStatus.OK:
            raise _error(self._address, response.status, data)
        return data


def server(host: str, port: int, token: str, *, remote: bool = False) -> HTTPServer:
    """A server whose `serve_forever` runs artifacts for everybody who has the token.

    Args:
        host: the interface to listen on.
        port: 0 takes a free one; `server_port` says which.
        token: not empty.
        remote: permit an interface that other machines reach.

    Raises:
        InputError: no token, or an interface that is not to be used or cannot be.
    """
    if not token:
        raise InputError("a server needs a token: who reaches it has it run machine code")
    if not remote and not _is_loopback(host):
        raise InputError(
            f"{host} is open to other machines, and nothing is encrypted: use ssh -L, or --remote"
        )
    try:
        made = _Server(host, port)
    except OSError as error:
        raise InputError(f"{host}:{port}: {error.strerror or error}") from None
    made.token = token.encode()
    return made


class _Server(socketserver.ForkingMixIn, HTTPServer):
    token = b""
    allow_reuse_address = True

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or an error in its process: the others are not concerned."""


class _Handler(BaseHTTPRequestHandler):
    """One connection: files of an artifact, then `load`, then runs."""

    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    _folder: Path
    _loaded: Executable | None = None

    def handle(self) -> None:
        """All requests of the connection, with a folder for it."""
        with tempfile.TemporaryDirectory(prefix="graphopt-rpc-") as folder:
            self._folder = Path(folder)
            super().handle()

    def do_PUT(self) -> None:
        """Take a file of the artifact."""
        self._answer(self._take)

    def do_POST(self) -> None:
        """Load, run, benchmark or profile."""
        self._answer(self._do)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: the process that started the server has its own output."""

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        given = self.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(given, b"Bearer " + cast(_Server, self.server).token):
            self.close_connection = True  # what it sends is not read
            self._send(http.HTTPStatus.UNAUTHORIZED, _JSON, b"")
            return
        try:
            kind, data = work()
        except (GraphoptError, OSError, ValueError) as error:
            self.close_connection = True
            told = {"error": type(error).__name__, "text": str(error)}
            self._send(http.HTTPStatus.UNPROCESSABLE_ENTITY, _JSON, json.dumps(told).encode())
        else:
            self._send(http.HTTPStatus.OK, kind, data)

    def _send(self, status: http.HTTPStatus, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _length(self) -> int:
        return int(self.headers.get("Content-Length", ""))

    def _take(self) -> tuple[str, bytes]:
        name = _FILE.fullmatch(self.path)
        if name is None:
            raise InputError(f"{self.path} is no file of an artifact")
        place, left = self._folder / name[1], self._length()
        place.parent.mkdir(exist_ok=True)
        with place.open("xb") as file:
            while left > 0:
                piece = self.rfile.read(min(left, 1 << 20))
                if not piece:
                    raise InputError(f"{name[1]} ends too early")
                file.write(piece)
                left -= len(piece)
        return _JSON, b"{}"

    def _do(self) -> tuple[str, bytes]:
        body = self.rfile.read(self._length())
        path, _, query = self.path.partition("?")
        if path == "/load":
            self._loaded = compilation.load(self._folder, trust=True)  # who has the token may
            signature = {
                "inputs": [dataclasses.asdict(info) for info in self._loaded.inputs],
                "outputs": [dataclasses.asdict(info) for info in self._loaded.outputs],
            }
            return _JSON, json.dumps(signature).encode()
        if self._loaded is None:
            raise InputError("nothing is loaded")
        feeds = npz.unpack(body)
        if path == "/run":
            return _ARRAYS, npz.pack(self._loaded.run(feeds))
        runs = int(urllib.parse.parse_qs(query).get("runs", ["10"])[0])
        if path == "/benchmark":
            times: list[int] = self._loaded.benchmark(feeds, runs).tolist()
            return _JSON, json.dumps(times).encode()
        if path == "/profile":
            rows = [dataclasses.asdict(row) for row in self._loaded.profile(feeds, runs)]
            return _JSON, json.dumps(rows).encode()
        raise InputError(f"a server does not know {path}")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"{address!r} is not like localhost:{PORT}")
    return host.strip("[]"), int(port)


def _is_loopback(host: str) -> bool:
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        raise InputError(f"{host}: {error.strerror}") from None
    return all(ipaddress.ip_address(str(entry[4][0])).is_loopback for entry in found)


def _info(item: Mapping[str, Any]) -> TensorInfo:
    shape = item["shape"]
    return TensorInfo(item["name"], item["dtype"], None if shape is None else tuple(shape))


def _error(address: str, status: int, data: bytes) -> GraphoptError:
    """What the server says went wrong."""
    try:
        told: dict[str, str] = json.loads(data)
        return errors.by_name(told["error"])(f"{address}: {told['text']}")
    except (ValueError, KeyError, TypeError):
        return GraphoptError(f"{address}: no server of graphopt's answers there (HTTP {status})")
