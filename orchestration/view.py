"""The live view of a running sweep: a table in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestration.events import Event
from orchestration.plan import TrialPlan
from orchestration.report import duration
from orchestration.trial import Update

LOG_EVERY_S = 10.0
"""In a plain log, a running trial gets a line at most this often."""


@dataclass
class _Row:
    plan: TrialPlan
    update: Update | None = None
    logged_s: float = 0.0


class View:
    """Counts trials and shows the running ones; call it with every event."""

    def __init__(self, console: Console, *, total: int, finished: int) -> None:
        self._console, self._total = console, total
        self._done, self._failed = finished, 0
        self._rows: dict[str, _Row] = {}
        self._started_s = time.monotonic()
        live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take an event in. Never raises: a view must not stop a sweep."""
        row = self._rows.setdefault(event.plan.trial_id, _Row(event.plan))
        name = event.plan.label
        if event.kind == "update" and event.update:
            self._updated(row, event.update)
        elif event.kind == "retry":
            self._line(f"{name}: {event.reason}; starting again from the last checkpoint", style="yellow")
        elif event.kind == "started":
            self._line(f"{name}: started" if row.update is None else f"{name}: started again")
        else:
            self._ended(event, row)

    def render(self) -> Group:
        """What the terminal shows now."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("running", "epoch", "", "loss", "mIoU", "left"):
            table.add_column(heading, justify="left" if heading in ("running", "") else "right")
        for row in self._rows.values():
            table.add_row(row.plan.label, *_cells(row.update))
        return Group(Text(self.counts(), style="bold"), table)

    def counts(self) -> str:
        """`8 trials: 3 waiting, 2 running, 3 done, 0 failed   1:05`"""
        running = len(self._rows)
        waiting = max(0, self._total - running - self._done - self._failed)
        elapsed = duration(time.monotonic() - self._started_s)
        return f"{self._total} trials: {waiting} waiting, {running} running, {self._done} done, {self._failed} failed   {elapsed}"

    def _updated(self, row: _Row, update: Update) -> None:
        first = row.update is None or row.update.attempt != update.attempt
        note = None if row.update is None else row.update.note
        row.update = update
        if update.note and (first or update.note != note):
            self._line(f"{row.plan.label}: {update.note}", style="yellow")
        if first and update.resumed_step is not None:
            self._line(f"{row.plan.label}: resumed at epoch {update.epoch} of {update.epochs} (step {update.resumed_step})", style="cyan")
        if not self._live and not update.ended and time.monotonic() - row.logged_s >= LOG_EVERY_S and update.loss is not None:
            row.logged_s = time.monotonic()
            epoch, _, loss, miou, left = _cells(update)
            self._line(f"{row.plan.label}: epoch {epoch}, loss {loss}, mIoU {miou}, {left} left")

    def _ended(self, event: Event, row: _Row) -> None:
        del self._rows[event.plan.trial_id]
        if event.kind == "finished":
            self._done += 1
            miou = f", mIoU {row.update.miou:.3f}" if row.update and row.update.miou is not None else ""
            self._line(f"{event.plan.label}: finished{miou}", style="green")
        else:
            self._failed += event.kind == "failed"
            self._line(f"{event.plan.label}: {event.kind}: {event.reason}", style="red")

    def _line(self, text: str, *, style: str = "") -> None:
        stamp = time.strftime("%H:%M:%S")
        prefix = stamp if self._live else f"{stamp} [{self._done}/{self._total} done]"
        self._console.print(Text(f"{prefix} {text}", style=style))


def _cells(update: Update | None) -> tuple[str, str | ProgressBar, str, str, str]:
    """epoch, bar, loss, mIoU, time left."""
    if update is None:
        return "starting", "", "", "", ""
    bar = ProgressBar(total=update.iterations, completed=update.iteration, width=20)
    loss = "-" if update.loss is None else f"{update.loss:.3f}"
    miou = "-" if update.miou is None else f"{update.miou:.3f}"
    left = "-" if update.eta_s is None else duration(update.eta_s)
    return f"{update.epoch}/{update.epochs}", bar, loss, miou, left
