"""A TCP proxy before an S3 server that answers 503, hangs, or cuts connections in mid-body, on command."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

Mode = Literal["pass", "busy", "hang", "cut"]

_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
_BUSY = b"<Error><Code>SlowDown</Code><Message>reduce your request rate</Message></Error>"
_LONGEST_HANG_S = 60.0


class FaultyProxy:
    """Passes everything on, but while it is `disturbed`.

    busy  every request is answered 503 SlowDown, and the connection closed
    hang  nothing moves in either direction; afterwards it goes on, so that a request may arrive long after its client gave up
    cut   connections end anywhere, on average after a few packets
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.target: tuple[str, int] | None = None
        """Where to connect to; until it is set, connections are closed at once."""
        self.hits = 0
        """How often something that passed was disturbed."""
        self._mode: Mode = "pass"
        self._change = threading.Condition()
        self._random = random.Random(0)
        threading.Thread(target=self._accept, daemon=True).start()

    @contextmanager
    def disturbed(self, mode: Mode) -> Iterator[None]:
        """Misbehave within the context."""
        self._set(mode)
        try:
            yield
        finally:
            self._set("pass")

    def close(self) -> None:
        self._set("pass")
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _set(self, mode: Mode) -> None:
        with self._change:
            self._mode = mode
            self._change.notify_all()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError):
            if self.target is None:
                return
            with socket.create_connection(self.target, timeout=10) as server:
                server.settimeout(None)
                upward = threading.Thread(target=self._pump, args=(client, server, client), daemon=True)
                upward.start()
                self._pump(server, client, client)
                upward.join(_LONGEST_HANG_S)

    def _pump(self, source: socket.socket, sink: socket.socket, client: socket.socket) -> None:
        """Pass on until either side ends; both are shut down then, so that the other direction ends too."""
        with suppress(OSError):
            while part := source.recv(65536):
                passing = self._disturb(part, client, upward=source is client)
                if passing:
                    sink.sendall(passing)
                if passing != part:
                    break
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _disturb(self, part: bytes, client: socket.socket, *, upward: bool) -> bytes:
        """What passes of `part`, when it may; where that is less, the connection is to end."""
        with self._change:
            if self._mode == "hang":
                self.hits += 1
                self._change.wait_for(lambda: self._mode != "hang", timeout=_LONGEST_HANG_S)
            if self._mode == "busy" and upward and part.startswith(_METHODS):
                self.hits += 1
                client.sendall(_busy_reply())
                return b""
            if self._mode == "cut" and self._random.random() < 0.5:
                self.hits += 1
                return part[: self._random.randrange(len(part))]
        return part


def _busy_reply() -> bytes:
    head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(_BUSY)}\r\nConnection: close\r\n\r\n"
    return head.encode() + _BUSY
