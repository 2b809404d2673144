"""The live view of a running sweep: a table in a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestration.formatting import duration
from orchestration.observe.events import Event
from orchestration.observe.progress import TrialProgress
from orchestration.plan.trial_plan import TrialPlan

LOG_EVERY_S = 10.0
"""In a plain log, a running trial gets a line at most this often."""


@dataclass
class _RunningTrial:
    plan: TrialPlan
    update: TrialProgress | None = None
    updated_s: float = 0.0
    logged_s: float = -LOG_EVERY_S


class LiveView:
    """Counts trials and shows the running ones; call it with every event.

    Args:
        failed: identities of trials that have failed; one that starts again has not.
        notes: lines below the running trials, asked for whenever they are shown; unset, the view tells for how long it has been up.
    """

    def __init__(
        self,
        console: Console,
        *,
        total: int,
        finished: int,
        failed: Collection[str] = (),
        notes: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        self._console, self._total, self._notes = console, total, notes
        self._done, self._failed = finished, set(failed)
        self._rows: dict[str, _RunningTrial] = {}
        self._started_s = time.monotonic()
        live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)
        self._live = live if console.is_terminal else None

    def __enter__(self) -> LiveView:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Take an event in. Never raises: a view must not stop a sweep."""
        row = self._rows.setdefault(event.plan.trial_id, _RunningTrial(event.plan))
        name = event.plan.label
        self._failed.discard(event.plan.trial_id)
        if event.kind == "update" and event.update:
            self._updated(row, event.update)
        elif event.kind == "retry":
            self.say(f"{name}: {event.reason}; starting again from the last checkpoint", style="yellow")
        elif event.kind == "started":
            self.say(f"{name}: started" if row.update is None else f"{name}: started again")
        else:
            self._ended(event, row)

    def render(self) -> Group:
        """What the terminal shows now."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("running", "epoch", "", "loss", "mIoU", "left"):
            table.add_column(heading, justify="left" if heading in ("running", "") else "right")
        for row in list(self._rows.values()):  # the screen is drawn by a thread of its own
            table.add_row(row.plan.label, *_cells(row.update, age_s=time.monotonic() - row.updated_s))
        running = [table] if table.rows else []
        return Group(Text(self.counts(), style="bold"), *running, *(Text(note, style="dim") for note in (self._notes or list)()))

    def counts(self) -> str:
        """`8 trials: 3 waiting, 2 running, 3 done, 0 failed   1:05`"""
        running, failed = len(self._rows), len(self._failed)
        waiting = max(0, self._total - running - self._done - failed)
        elapsed = "" if self._notes else f"   {duration(time.monotonic() - self._started_s)}"
        return f"{self._total} trials: {waiting} waiting, {running} running, {self._done} done, {failed} failed{elapsed}"

    def say(self, text: str, *, style: str = "") -> None:
        """A line above the table, or in the log."""
        stamp = time.strftime("%H:%M:%S")
        prefix = stamp if self._live else f"{stamp} [{self._done}/{self._total} done]"
        self._console.print(Text(f"{prefix} {text}", style=style), soft_wrap=not self._live)

    def _updated(self, row: _RunningTrial, update: TrialProgress) -> None:
        first = row.update is None or row.update.attempt != update.attempt
        note, resumed = (row.update.note, row.update.resumed_step) if row.update else (None, None)
        row.update, row.updated_s = update, time.monotonic()
        if update.note and (first or update.note != note):
            self.say(f"{row.plan.label}: {update.note}", style="yellow")
        if update.resumed_step is not None and (first or resumed is None):
            self.say(f"{row.plan.label}: resumed at epoch {update.epoch} of {update.epochs} (step {update.resumed_step})", style="cyan")
        if not self._live and not update.ended and time.monotonic() - row.logged_s >= LOG_EVERY_S and update.loss is not None:
            row.logged_s = time.monotonic()
            epoch, _, loss, miou, left = _cells(update)
            self.say(f"{row.plan.label}: epoch {epoch}, loss {loss}, mIoU {miou}, {left} left")

    def _ended(self, event: Event, row: _RunningTrial) -> None:
        del self._rows[event.plan.trial_id]
        if event.kind == "finished":
            self._done += 1
            miou = f", mIoU {row.update.miou:.3f}" if row.update and row.update.miou is not None else ""
            self.say(f"{event.plan.label}: finished{miou}", style="green")
        else:
            if event.kind == "failed":
                self._failed.add(event.plan.trial_id)
            self.say(f"{event.plan.label}: {event.kind}: {event.reason}", style="red" if event.kind == "failed" else "yellow")


def _cells(update: TrialProgress | None, *, age_s: float = 0.0) -> tuple[str, str | ProgressBar, str, str, str]:
    """epoch, bar, loss, mIoU, time left of an update that came `age_s` ago."""
    if update is None:
        return "starting", "", "", "", ""
    bar = ProgressBar(total=update.iterations, completed=update.iteration, width=20)
    loss = "-" if update.loss is None else f"{update.loss:.3f}"
    miou = "-" if update.miou is None else f"{update.miou:.3f}"
    left = "-" if update.eta_s is None else duration(max(0.0, update.eta_s - age_s))
    return f"{update.epoch}/{update.epochs}", bar, loss, miou, left
