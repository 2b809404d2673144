"""A terminal of a given size: a pseudo-terminal for the program, and what its user sees, scrolled lines included."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PART = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)|(\x1b.?)")


class Screen:
    """Lines that a terminal of `columns` x `rows` shows. Knows the sequences that rich writes; any other is an error."""

    def __init__(self, columns: int, rows: int = 40) -> None:
        self.columns, self.rows = columns, rows
        self._lines, self._top, self._row, self._column = [""], 0, 0, 0

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._lines]

    def feed(self, text: str) -> None:
        for arguments, command, move, words, other in _PART.findall(text):
            assert not other, f"an unknown sequence: {other!r}"
            if command:
                self._control(arguments, command)
            elif move == "\r":
                self._column = 0
            elif move == "\n":
                self._down()
            for letter in words:
                self._put(letter)

    def _control(self, arguments: str, command: str) -> None:
        if command in "hlm":  # cursor shown or hidden, colour
            return
        if command == "A":
            self._row = max(self._top, self._row - int(arguments or 1))
        elif command == "K":
            assert arguments == "2", arguments
            self._lines[self._row] = ""
        else:
            raise AssertionError(f"an unknown sequence: {arguments}{command}")

    def _put(self, letter: str) -> None:
        if self._column == self.columns:
            self._column = 0
            self._down()
        line = self._lines[self._row].ljust(self._column)
        self._lines[self._row] = line[: self._column] + letter + line[self._column + 1 :]
        self._column += 1

    def _down(self) -> None:
        self._row += 1
        if self._row == len(self._lines):
            self._lines.append("")
        self._top = max(self._top, self._row - self.rows + 1)


@contextmanager
def terminal(columns: int, rows: int = 40) -> Iterator[tuple[int, Screen]]:
    """A descriptor to write to, and the screen behind it, which is drawn when the context ends."""
    screen, found = Screen(columns, rows), list[bytes]()
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    reader = threading.Thread(target=_read, args=(master, found))
    reader.start()
    try:
        yield slave, screen
    finally:
        os.close(slave)
        reader.join(30)
        os.close(master)
    screen.feed(b"".join(found).decode())


def _read(master: int, found: list[bytes]) -> None:
    with suppress(OSError):  # once the other end is closed
        while part := os.read(master, 65536):
            found.append(part)
