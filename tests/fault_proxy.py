"""An HTTP proxy in front of an object store that does to requests what networks and stores do, by a seeded schedule.

The same request, asked for the n-th time, meets the same fault in every run, whatever order threads ask in.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What passes, and is to be survived. There is also "denied", which does not.
FAULTS = ("reset_before", "reset_in_body", "slow_down", "trickle", "truncate", "stall", "flip")
_REFUSALS = {"slow_down": (503, "SlowDown"), "denied": (403, "AccessDenied")}
_TRICKLE_PIECES, _TRICKLE_SECONDS = 40, 0.05


@dataclass(frozen=True)
class Schedule:
    """Which requests meet which faults.

    Attributes:
        faults: drawn from with equal chances.
        fraction: of the requests that meet one.
        only: part of the path of the requests that may meet one.
    """

    faults: tuple[str, ...] = ()
    fraction: float = 0.0
    only: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """What came in, the first and last byte of its Range header, and what was done to it."""

    method: str
    path: str
    span: tuple[int, int] | None
    fault: str | None


@dataclass
class FaultProxy:
    """Listens on a free port of the loopback and forwards to `upstream`, from `with` on until its end."""

    upstream: int
    schedule: Schedule = Schedule()
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> FaultProxy:
        self._seen: Counter[tuple[str, str, str]] = Counter()
        self._flipped: set[str] = set()
        self._lock = threading.Lock()
        self.is_over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._server.hang_up()

    def begin(self, schedule: Schedule) -> None:
        """Another schedule, and the counters at zero."""
        with self._lock:
            self.schedule, self.requests = schedule, []
            self._seen.clear()
            self._flipped.clear()

    @property
    def faults(self) -> Counter[str]:
        """How often each fault was done."""
        return Counter(request.fault for request in self.requests if request.fault)

    def draw(self, method: str, path: str, byte_range: str) -> str | None:
        """Note a request; the fault it meets."""
        with self._lock:
            key = method, path, byte_range
            self._seen[key] += 1
            fate = random.Random(f"{self.schedule.seed} {key} {self._seen[key]}")
            is_hit = (
                bool(self.schedule.faults) and self.schedule.only in path and fate.random() < self.schedule.fraction
            )
            fault = fate.choice(self.schedule.faults) if is_hit else None
            if fault == "flip":
                # Once a file: a file whose bytes are wrong each time is a damaged file.
                fault = None if method == "HEAD" or path in self._flipped else fault
                self._flipped.update({path} if fault else ())
            span = tuple(int(n) for n in byte_range.removeprefix("bytes=").split("-")) if byte_range else None
            self.requests.append(Request(method, path, span, fault))
            return fault


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: list[socket.socket] = []

    def process_request(self, request: Any, client_address: Any) -> None:
        """Remember the connection: clients keep theirs open after the server has stopped listening."""
        self.connections.append(request)
        super().process_request(request, client_address)

    def hang_up(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def do_GET(self) -> None:
        fault = self.owner.draw(self.command, self.path, self.headers.get("Range", ""))
        if fault == "stall":
            self.owner.is_over.wait()
            self._reset()
        elif fault == "reset_before":
            self._reset()
        elif fault in _REFUSALS:
            status, code = _REFUSALS[fault]
            body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml")], body, None)
        else:
            self._answer(*self._forward(), fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _forward(self) -> tuple[int, list[tuple[str, str]], bytes]:
        is_chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = self._chunks() if is_chunked else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        connection = http.client.HTTPConnection("127.0.0.1", self.owner.upstream, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers), encode_chunked=is_chunked)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _chunks(self) -> Iterator[bytes]:
        """The body of a request that does not say its length, as S3 clients send files."""
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, fault: str | None) -> None:
        is_head = self.command == "HEAD"
        if is_head and fault in ("reset_in_body", "truncate"):
            return self._reset()
        self.send_response_only(status)
        for key, value in headers:
            if key.lower() not in ("connection", "transfer-encoding") and (is_head or key.lower() != "content-length"):
                self.send_header(key, value)
        if not is_head:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return None if is_head else self._send(body, fault)

    def _send(self, body: bytes, fault: str | None) -> None:
        if fault in ("reset_in_body", "truncate"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "reset_in_body":
                self._reset()
        elif fault == "trickle":
            size = -(-len(body) // _TRICKLE_PIECES)
            for first in range(0, len(body), max(size, 1)):
                self.wfile.write(body[first : first + size])
                if self.owner.is_over.wait(_TRICKLE_SECONDS):
                    return
        elif fault == "flip" and body:
            middle = len(body) // 2
            self.wfile.write(body[:middle] + bytes(b ^ 0xFF for b in body[middle : middle + 4]) + body[middle + 4 :])
        else:
            self.wfile.write(body)

    def _reset(self) -> None:
        """Close so that the other side sees a reset, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on standard error."""
