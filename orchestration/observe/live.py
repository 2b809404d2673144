"""Show a running sweep: a live table in a terminal, plain lines in a log."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestration.formatting import counted, duration, one_line
from orchestration.observe.events import Event, TrialProgress
from orchestration.observe.terminal import SharedTerminal
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.trial_state import TrialState

REDRAW_EVERY_S = 0.25
"""Time between two drawings of the live table."""

LOG_EVERY_S = 10.0
"""Shortest time between two progress lines of a trial in a plain log."""


@dataclass
class _RunningTrial:
    plan: TrialPlan
    progress: TrialProgress | None = None
    updated_s: float = 0.0
    logged_s: float = -LOG_EVERY_S


class LiveView:
    """Counts trials and shows the running ones. Call it with every event.

    Args:
        failed: IDs of trials that failed; an ID is removed when its trial restarts.
        notes: returns the lines below the running trials, called at every redraw; unset, the view shows its running time.
    """

    def __init__(
        self,
        console: SharedTerminal,
        *,
        total: int,
        finished: int,
        failed: Collection[str] = (),
        notes: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        self._console, self._total, self._notes = console, total, notes
        self._finished, self._failed = finished, set(failed)
        self._rows: dict[str, _RunningTrial] = {}
        self._started_s = time.monotonic()
        live = Live(console=console, get_renderable=self.render, auto_refresh=False, transient=True)  # its own thread loses lines
        self._live = live if console.is_terminal else None
        self._ended = threading.Event()
        self._redrawing = threading.Thread(target=self._redraw, name="live view", daemon=True)

    def __enter__(self) -> LiveView:
        if self._live:
            with self._console:
                self._live.start()
            self._redrawing.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._ended.set()
            self._redrawing.join()
            with self._console:
                self._live.stop()

    def __call__(self, event: Event) -> None:
        """Handle an event. Never raises: a view must not stop a sweep."""
        with self._console:
            self._handle(event)

    def _handle(self, event: Event) -> None:
        row = self._rows.setdefault(event.plan.trial_id, _RunningTrial(event.plan))
        name = event.plan.label
        self._failed.discard(event.plan.trial_id)
        if event.state is TrialState.RUNNING and event.progress:
            self._show_progress(row, event.progress)
        elif event.state is TrialState.RESTARTING:
            self.say(f"{name}: {event.reason}; restarting from the last checkpoint", style="yellow")
        elif event.state is TrialState.RUNNING:
            self.say(f"{name}: started" if row.progress is None else f"{name}: restarted")
        else:
            self._show_end(event, row)

    def render(self) -> Group:
        """The current content of the live table."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("running", "epoch", "", "loss", "mIoU", "left"):
            table.add_column(heading, justify="left" if heading in ("running", "") else "right")
        for row in self._rows.values():
            table.add_row(row.plan.label, *_cells(row.progress, age_s=time.monotonic() - row.updated_s))
        running = [table] if table.rows else []
        return Group(Text(self.counts(), style="bold"), *running, *(Text(one_line(note), style="dim") for note in (self._notes or list)()))

    def counts(self) -> str:
        """`8 trials: 3 waiting, 2 running, 3 finished, 0 failed   1:05`"""
        running, failed = len(self._rows), len(self._failed)
        waiting = max(0, self._total - running - self._finished - failed)
        elapsed = "" if self._notes else f"   {duration(time.monotonic() - self._started_s)}"
        return f"{counted(self._total, 'trial')}: {waiting} waiting, {running} running, {self._finished} finished, {failed} failed{elapsed}"

    def say(self, text: str, *, style: str = "") -> None:
        """Print one line above the table, or in the log."""
        stamp = time.strftime("%H:%M:%S")
        prefix = stamp if self._live else f"{stamp} [{self._finished}/{self._total} finished]"
        self._console.print(Text(f"{prefix} {one_line(text)}", style=style), soft_wrap=not self._live)

    def _redraw(self) -> None:
        while not self._ended.wait(REDRAW_EVERY_S):
            if self._live:
                with self._console:
                    self._live.refresh()

    def _show_progress(self, row: _RunningTrial, progress: TrialProgress) -> None:
        first = row.progress is None or row.progress.attempt != progress.attempt
        note, resumed = (row.progress.note, row.progress.resumed_step) if row.progress else (None, None)
        row.progress, row.updated_s = progress, time.monotonic()
        if progress.note and (first or progress.note != note):
            self.say(f"{row.plan.label}: {progress.note}", style="yellow")
        if progress.resumed_step is not None and (first or resumed is None):
            self.say(
                f"{row.plan.label}: resumed at epoch {progress.epoch} of {progress.epochs} (step {progress.resumed_step})", style="cyan"
            )
        if not self._live and not progress.ended and time.monotonic() - row.logged_s >= LOG_EVERY_S and progress.loss is not None:
            row.logged_s = time.monotonic()
            epoch, _, loss, miou, left = _cells(progress)
            self.say(f"{row.plan.label}: epoch {epoch}, loss {loss}, mIoU {miou}, {left} left")

    def _show_end(self, event: Event, row: _RunningTrial) -> None:
        del self._rows[event.plan.trial_id]
        if event.state is TrialState.FINISHED:
            self._finished += 1
            miou = f", mIoU {row.progress.miou:.3f}" if row.progress and row.progress.miou is not None else ""
            self.say(f"{event.plan.label}: finished{miou}", style="green")
        else:
            failed = event.state is TrialState.FAILED
            if failed:
                self._failed.add(event.plan.trial_id)
            self.say(f"{event.plan.label}: {event.state}: {event.reason}", style="red" if failed else "yellow")


def _cells(progress: TrialProgress | None, *, age_s: float = 0.0) -> tuple[str, str | ProgressBar, str, str, str]:
    """Epoch, bar, loss, mIoU and time left, from progress that is `age_s` seconds old."""
    if progress is None:
        return "starting", "", "", "", ""
    bar = ProgressBar(total=progress.iterations, completed=progress.iteration, width=20)
    loss = "-" if progress.loss is None else f"{progress.loss:.3f}"
    miou = "-" if progress.miou is None else f"{progress.miou:.3f}"
    left = "-" if progress.eta_s is None else duration(max(0.0, progress.eta_s - age_s))
    return f"{progress.epoch}/{progress.epochs}", bar, loss, miou, left
