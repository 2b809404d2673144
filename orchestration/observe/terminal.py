"""Rich's console on this program's streams."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from orchestration.formatting import printable


class Terminal(Console):
    """As wide as the terminal; in a log, lines are not wrapped. Only rich's own control sequences reach the stream."""

    def __init__(self, *, stderr: bool = False, **options: Any) -> None:
        stream = sys.stderr if stderr else sys.stdout
        file = getattr(stream, "terminal", stream)  # see orchestration/output.py
        options = {"file": file, "width": None if stream.isatty() else 200, "highlight": False} | options
        super().__init__(**options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=_cleaned(segment.text))


class SharedTerminal(Terminal):
    """A terminal to which several threads print while one redraws a table.

    Rich computes how many lines of the old table to erase, and writes later. Between the two another thread must not write: the erased
    lines would be its own.
    """

    def __init__(self, **options: Any) -> None:
        self._whole = threading.RLock()
        super().__init__(**options)

    def __enter__(self) -> Self:
        self._whole.acquire()
        super().__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._whole.release()


def _cleaned(text: str) -> str:
    """Without control characters: an escape would be wider than rich has measured."""
    return text if printable(text) == text else "".join(letter for letter in text if printable(letter) == letter)
