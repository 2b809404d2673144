"""Request a stop of a running sweep: by a signal or by the circuit breaker."""

from __future__ import annotations

from collections.abc import Callable

from orchestration.failures import fingerprint, where
from orchestration.record.manifest import Manifest
from orchestration.record.trial_state import TrialState

SAME_FAILURES = 3
"""The sweep stops when this many trials failed with the same error and none has finished."""


class Stop:
    """A request to the trials of a running sweep: commit a checkpoint and end. The first reason counts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._announced = say, False
        self.reason: str | None = None
        self.tripped = False
        """Whether the circuit breaker requested the stop."""

    def request(self, reason: str, *, tripped: bool = False) -> None:
        """Safe in a signal handler: it prints nothing."""
        if self.reason is None:
            self.reason, self.tripped = reason, tripped

    def requested(self) -> bool:
        """Whether to stop. The first call after the request prints the reason."""
        if self.reason and not self._announced:
            self._announced = True
            self._say(f"{self.reason}: the trials commit a last checkpoint and end")
        return self.reason is not None


class Breaker:
    """Circuit breaker: requests a stop if the first trials all fail with the same error, because the others would fail too."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._failed: dict[str, set[str]] = {}
        self._any_finished = False

    def tell(self, manifest: Manifest) -> None:
        """Record how a trial ended."""
        self._any_finished = self._any_finished or manifest.status is TrialState.FINISHED
        if self._any_finished or manifest.status is not TrialState.FAILED or manifest.failure not in ("code", "data"):
            return
        trace = manifest.traceback or ""
        same = self._failed.setdefault(fingerprint(trace), set())
        same.add(manifest.trial_id)
        if len(same) >= SAME_FAILURES:
            self._stop.request(
                f"circuit breaker: the first {len(same)} trials failed with the same {manifest.failure} error at {where(trace)}: "
                f"{manifest.reason}; fix it, then run the same command again",
                tripped=True,
            )
