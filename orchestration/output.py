"""Standard output and error of a command. A lost reader, a full disk or a closed stream ends nothing; every text can be written."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
import threading
from contextlib import suppress

from orchestration.formatting import printable

_READER_GONE = (errno.EPIPE, errno.EBADF, errno.EIO)


class _Descriptor(io.FileIO):
    """A file descriptor that accepts everything, and drops what cannot be written."""

    def __init__(self, descriptor: int, what: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.reader_gone = threading.Event()
        self._what, self._reported = what, False

    def write(self, data: object) -> int:
        rest = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(rest)
        while rest:
            try:
                rest = rest[os.write(self.fileno(), rest) :]
            except BlockingIOError:  # another process that has the same terminal or pipe made it non-blocking
                ready = select.poll()
                ready.register(self.fileno(), select.POLLOUT)
                ready.poll(1000)
            except OSError as error:
                self._lose(error)
                break
        return size

    def _lose(self, error: OSError) -> None:
        if error.errno in _READER_GONE:
            self.reader_gone.set()
        elif not self._reported:
            self._reported = True
            with suppress(OSError):
                os.write(2, f"{self._what}: {error.strerror}; output is incomplete, the command continues\n".encode())


class Output(io.TextIOWrapper):
    """What replaces sys.stdout and sys.stderr: control characters and letters that the encoding lacks are written as escapes."""

    def __init__(self, descriptor: int, what: str, encoding: str) -> None:
        binary = _Descriptor(descriptor, what)
        super().__init__(binary, encoding=encoding, errors="backslashreplace", line_buffering=True)
        self.reader_gone = binary.reader_gone
        self.terminal = io.TextIOWrapper(binary, encoding=encoding, errors="replace", line_buffering=True)
        """The same stream for rich, which writes control sequences of its own; `observe.terminal` cleans its texts."""

    def write(self, text: str) -> int:
        super().write(printable(text))
        return len(text)


def install() -> None:
    """Replace the standard streams of this process. A stream that a caller has replaced already stays."""
    for descriptor in (0, 1, 2):
        _keep_open(descriptor)
    for name, descriptor, what in (("stdout", 1, "standard output"), ("stderr", 2, "standard error")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is None:  # closed at the start; a file opened since may have taken the descriptor
            descriptor, encoding = os.open(os.devnull, os.O_WRONLY), "utf-8"
        else:
            encoding = stream.encoding
            with suppress(OSError, ValueError):
                stream.flush()
        setattr(sys, name, Output(descriptor, what, encoding))


def reader_gone() -> threading.Event:
    """Set once nobody can read standard output any more."""
    return getattr(sys.stdout, "reader_gone", None) or threading.Event()


def _keep_open(descriptor: int) -> None:
    """Open a closed standard descriptor on nothing: the next file to be opened would take its number, and output would go into it."""
    try:
        os.fstat(descriptor)
    except OSError:
        nothing = os.open(os.devnull, os.O_RDWR)
        if nothing != descriptor:
            os.dup2(nothing, descriptor)
            os.close(nothing)
