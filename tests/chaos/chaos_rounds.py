"""Run one sweep under random faults, and restart its driver until it exits with 0."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from chaos_faults import Injected, Kind, Scene

from orchestration.record.manifest import Manifest

PAUSE_S = (1.0, 5.0)
"""Between two faults."""

AFTER_COMMIT = 1 / 4
"""This share of the faults waits for a commit after the previous fault, at most COMMIT_TIMEOUT_S."""

COMMIT_TIMEOUT_S = 30.0

FIRST_FAULT_AFTER_S = 8.0

RESTART_AFTER_S = 1.0
"""Pause before the driver is restarted."""

WITHOUT_PROGRESS_S = 240.0
"""A sweep without a fault and without a commit for this long hangs."""

MOST_RESTARTS = 20
"""In addition to two per fault."""

RECOVERY_TIMEOUT_S = 180.0


@dataclass
class Report:
    """Counts and violations of a run, printed as JSON."""

    seed: int
    faults: int
    seconds: float = 0.0
    rounds: int = 0
    dealt: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    """Exit codes of drivers; each except 0 led to a restart."""
    skipped: list[str] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    effort: Counter[str] = field(default_factory=Counter)
    superseded: int = 0
    slowest_recovery_s: float = 0.0
    """From a fault to the next commit of any trial."""
    slowest_recovery_from: str = ""
    violations: list[str] = field(default_factory=list)

    def account(self, manifests: list[Manifest]) -> None:
        """Add the attempts of a round."""
        for attempt in (attempt for manifest in manifests for attempt in manifest.attempts):
            self.attempts[str(attempt.outcome)] += 1
            self.effort.update({name: getattr(attempt, name) for name in ("useful_s", "repeated_s", "lost_s")})


class Log:
    """Prints events with their time since the start."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_s

    def write(self, text: str) -> None:
        print(f"[{self.seconds:7.1f} s] {text}", flush=True)


class Deck:
    """A shuffled deck of fault kinds, each with its number of cards; refilled when empty."""

    def __init__(self, all_kinds: list[Kind], draw: random.Random) -> None:
        self._kinds, self._draw = all_kinds, draw
        self._cards: list[Kind] = []

    def deal(self, scene: Scene, busy: set[str]) -> tuple[Kind, Injected] | None:
        """Inject the first fault that can hit something now; None if none can."""
        if not self._cards:
            self._cards = [kind for kind in self._kinds for _ in range(kind.cards)]
            self._draw.shuffle(self._cards)
        tried = set()
        for card in list(self._cards):
            if card.name in tried or card.touches & busy:
                continue
            tried.add(card.name)
            if injected := card.deal(scene, self._draw):
                self._cards.remove(card)
                return card, injected
        return None

    def put_back(self, card: Kind) -> None:
        """Return a card whose fault hit nothing."""
        self._cards.insert(self._draw.randrange(len(self._cards) + 1), card)


class Round:
    """One sweep from its first start until its driver exits with 0; after any other exit code the driver is restarted."""

    def __init__(self, scene: Scene, name: str, deck: Deck, draw: random.Random, log: Log, report: Report) -> None:
        self._scene, self._name, self._deck, self._draw, self._log, self._report = scene, name, deck, draw, log, report
        self._busy: set[str] = set()
        self._recovering: list[threading.Thread] = []
        self._progress = -1
        self._progress_s = self._start_at_s = self._next_fault_s = time.monotonic()
        self._last: tuple[str, float] | None = None  # the newest fault, until a commit follows
        self._after_commit = False

    def run(self) -> None:
        """Raises TimeoutError if the sweep hangs."""
        self._scene.sweep, self._scene.driver = self._name, None
        self._next_fault_s = time.monotonic() + FIRST_FAULT_AFTER_S
        while not self._supervise():
            self._watch_progress()
            if self._report.dealt.total() < self._report.faults and self._due():
                self._inject()
            time.sleep(0.3)
        for thread in self._recovering:
            thread.join(RECOVERY_TIMEOUT_S)

    def _supervise(self) -> bool:
        """Whether the sweep is finished."""
        scene, now = self._scene, time.monotonic()
        if scene.driver is None:
            if now >= self._start_at_s:
                scene.driver = scene.command()
            return False
        code = scene.driver.process.poll()
        if code is None:
            return False
        self._report.exits[code] += 1
        if code == 0:
            return True
        if self._report.exits.total() > MOST_RESTARTS + 2 * self._report.dealt.total():
            raise TimeoutError(f"the driver was restarted {self._report.exits.total()} times after {self._report.dealt.total()} faults")
        last = (scene.driver.text.strip().splitlines() or [""])[-1]
        self._log.write(f"driver exited with {code}: {last}")
        if _died_of_a_traceback(scene.driver.text):
            scene.violated(f"a driver died with an exception: {last} ({scene.driver.log})")
        scene.driver, self._start_at_s = None, now + RESTART_AFTER_S
        return False

    def _watch_progress(self) -> None:
        """Record the committed steps, read without the proxy. Raises TimeoutError without progress."""
        with suppress(Exception):  # the server is down because of a fault
            progress = sum(manifest.reached for manifest in self._scene.bucket.manifests(self._name))
            if progress > self._progress:
                self._progressed(progress)
        if time.monotonic() - self._progress_s > WITHOUT_PROGRESS_S:
            raise TimeoutError(f"no commit for {WITHOUT_PROGRESS_S:g} s: {self._name} hangs since {self._last}:\n{self._stacks()}")

    def _stacks(self) -> str:
        """Stack of each thread of the driver, which Python's fault handler prints on SIGABRT."""
        if (driver := self._scene.driver) is None:
            return "no driver runs"
        driver.process.send_signal(signal.SIGABRT)
        with suppress(TimeoutError):
            driver.wait(deadline_s=10)
        return driver.text[-10_000:]

    def _progressed(self, progress: int) -> None:
        self._progress, self._progress_s = progress, time.monotonic()
        if self._last:
            what, at_s = self._last
            if (took_s := self._progress_s - at_s) > self._report.slowest_recovery_s:
                self._report.slowest_recovery_s, self._report.slowest_recovery_from = round(took_s, 1), what
        self._last = None

    def _due(self) -> bool:
        """Whether it is time for the next fault: some follow quickly, some after a commit."""
        now = time.monotonic()
        recovering = self._after_commit and self._last is not None and now < self._next_fault_s + COMMIT_TIMEOUT_S
        return now >= self._next_fault_s and not recovering

    def _inject(self) -> None:
        if (dealt := self._deck.deal(self._scene, self._busy)) is None:
            return
        (kind, injected), now = dealt, time.monotonic()
        self._report.dealt[kind.name] += 1
        self._log.write(f"fault {self._report.dealt.total()}: {kind.name}: {injected.what}")
        self._busy |= kind.touches
        self._last, self._after_commit = (kind.name, now), self._draw.random() < AFTER_COMMIT
        self._progress_s = now
        self._next_fault_s = now + self._draw.uniform(*PAUSE_S)
        self._recovering.append(threading.Thread(target=self._recover, args=(kind, injected), daemon=True))
        self._recovering[-1].start()

    def _recover(self, kind: Kind, injected: Injected) -> None:
        try:
            hit = injected.recover()
        except Exception as error:
            self._scene.violated(f"{kind.name}: recovery failed: {error}")
            hit = True
        self._busy -= kind.touches
        if not hit:
            self._report.dealt[kind.name] -= 1
            self._deck.put_back(kind)
            self._log.write(f"{kind.name}: hit nothing, not counted")


def _died_of_a_traceback(text: str) -> bool:
    """Whether the output ends with an uncaught exception; libraries also log harmless ones earlier."""
    _, traceback, tail = text.rpartition("Traceback (most recent call last)")
    return bool(traceback) and sum(not line.startswith(" ") for line in tail.strip().splitlines()[1:]) <= 1
