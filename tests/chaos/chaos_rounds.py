"""A sweep under random faults: a supervisor that starts its driver again and again, and a deck of faults to deal meanwhile."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from chaos_faults import Blow, Kind, Scene

from orchestration.record.manifest import Manifest

PAUSE_S = (1.0, 5.0)
"""Between two faults."""

PATIENT = 1 / 4
"""This share of the faults waits for a commit after the one before, at most MOST_PATIENCE_S."""

MOST_PATIENCE_S = 30.0

FIRST_FAULT_AFTER_S = 8.0

RESTART_AFTER_S = 1.0
"""A supervisor's pause before it gives the driver's command again."""

WITHOUT_PROGRESS_S = 240.0
"""Without a fault and without a new commit for so long, a sweep hangs."""

MOST_RESTARTS = 20
"""Besides two for each fault."""

MENDED_WITHIN_S = 180.0


@dataclass
class Report:
    """What happened, for people and as JSON."""

    seed: int
    faults: int
    seconds: float = 0.0
    rounds: int = 0
    dealt: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    """Exit codes of drivers; each but 0 led to a restart."""
    skipped: list[str] = field(default_factory=list)
    attempts: Counter[str] = field(default_factory=Counter)
    effort: Counter[str] = field(default_factory=Counter)
    superseded: int = 0
    slowest_recovery_s: float = 0.0
    """From the last of some faults to the next commit of any trial."""
    slowest_recovery_from: str = ""
    violations: list[str] = field(default_factory=list)

    def account(self, manifests: list[Manifest]) -> None:
        """Add the attempts of a round."""
        for attempt in (attempt for manifest in manifests for attempt in manifest.attempts):
            self.attempts[str(attempt.outcome)] += 1
            self.effort.update({name: getattr(attempt, name) for name in ("useful_s", "repeated_s", "lost_s")})


class Story:
    """Says what happens and when, so that a seed can be followed."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began_s

    def tell(self, words: str) -> None:
        print(f"[{self.seconds:7.1f} s] {words}", flush=True)


class Deck:
    """The kinds of fault in a random order, each as often as it has cards, over and over."""

    def __init__(self, all_kinds: list[Kind], draw: random.Random) -> None:
        self._kinds, self._draw = all_kinds, draw
        self._cards: list[Kind] = []

    def deal(self, scene: Scene, busy: set[str]) -> tuple[Kind, Blow] | None:
        """The first card that can hit something now; None where none can."""
        if not self._cards:
            self._cards = [kind for kind in self._kinds for _ in range(kind.cards)]
            self._draw.shuffle(self._cards)
        tried = set()
        for card in list(self._cards):
            if card.name in tried or card.touches & busy:
                continue
            tried.add(card.name)
            if blow := card.deal(scene, self._draw):
                self._cards.remove(card)
                return card, blow
        return None

    def put_back(self, card: Kind) -> None:
        """It hit nothing after all."""
        self._cards.insert(self._draw.randrange(len(self._cards) + 1), card)


class Round:
    """One sweep from its first start until its command ends with 0, started again by a supervisor whenever it ends otherwise."""

    def __init__(self, scene: Scene, name: str, deck: Deck, draw: random.Random, story: Story, report: Report) -> None:
        self._scene, self._name, self._deck, self._draw, self._story, self._report = scene, name, deck, draw, story, report
        self._busy: set[str] = set()
        self._mending: list[threading.Thread] = []
        self._progress = -1
        self._progress_s = self._start_at_s = self._next_fault_s = time.monotonic()
        self._last: tuple[str, float] | None = None  # the newest fault, until a commit follows
        self._patient = False

    def run(self) -> None:
        """Raises TimeoutError for a sweep that hangs."""
        self._scene.sweep, self._scene.driver = self._name, None
        self._next_fault_s = time.monotonic() + FIRST_FAULT_AFTER_S
        while not self._supervise():
            self._look()
            if self._report.dealt.total() < self._report.faults and self._due():
                self._strike()
            time.sleep(0.3)
        for thread in self._mending:
            thread.join(MENDED_WITHIN_S)

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
            raise TimeoutError(f"the driver was started again {self._report.exits.total()} times for {self._report.dealt.total()} faults")
        last = (scene.driver.text.strip().splitlines() or [""])[-1]
        self._story.tell(f"driver ended with {code}: {last}")
        if _died_of_a_traceback(scene.driver.text):
            scene.violated(f"a driver died of an exception: {last} ({scene.driver.log})")
        scene.driver, self._start_at_s = None, now + RESTART_AFTER_S
        return False

    def _look(self) -> None:
        """Note how far the sweep is, past every disturbance."""
        with suppress(Exception):  # the server is away, which is no news
            progress = sum(manifest.reached for manifest in self._scene.bucket.manifests(self._name))
            if progress > self._progress:
                self._progressed(progress)
        if time.monotonic() - self._progress_s > WITHOUT_PROGRESS_S:
            raise TimeoutError(f"no commit for {WITHOUT_PROGRESS_S:g} s: {self._name} hangs since {self._last}:\n{self._stacks()}")

    def _stacks(self) -> str:
        """Where each thread of the driver hangs: Python's fault handler writes that when a process is aborted."""
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
        """Time for the next fault: some come in quick succession, some when the sweep has recovered."""
        now = time.monotonic()
        recovering = self._patient and self._last is not None and now < self._next_fault_s + MOST_PATIENCE_S
        return now >= self._next_fault_s and not recovering

    def _strike(self) -> None:
        if (dealt := self._deck.deal(self._scene, self._busy)) is None:
            return
        (kind, blow), now = dealt, time.monotonic()
        self._report.dealt[kind.name] += 1
        self._story.tell(f"fault {self._report.dealt.total()}: {kind.name}: {blow.what}")
        self._busy |= kind.touches
        self._last, self._patient = (kind.name, now), self._draw.random() < PATIENT
        self._progress_s = now
        self._next_fault_s = now + self._draw.uniform(*PAUSE_S)
        self._mending.append(threading.Thread(target=self._mend, args=(kind, blow), daemon=True))
        self._mending[-1].start()

    def _mend(self, kind: Kind, blow: Blow) -> None:
        try:
            hit = blow.mend()
        except Exception as error:
            self._scene.violated(f"{kind.name}: could not be mended: {error}")
            hit = True
        self._busy -= kind.touches
        if not hit:
            self._report.dealt[kind.name] -= 1
            self._deck.put_back(kind)
            self._story.tell(f"{kind.name}: hit nothing, doesn't count")


def _died_of_a_traceback(text: str) -> bool:
    """An exception that nobody caught stands at the end; libraries also log some that did no harm."""
    _, traceback, tail = text.rpartition("Traceback (most recent call last)")
    return bool(traceback) and sum(not line.startswith(" ") for line in tail.strip().splitlines()[1:]) <= 1
