"""The wish to stop a sweep: by a signal, or by the circuit breaker."""

from __future__ import annotations

from collections.abc import Callable

from orchestration.failures import fingerprint, where
from orchestration.record.manifest import Manifest

SAME_FAILURES = 3
"""So many trials that fail with the same error, before any has finished, stop the sweep."""


class Stop:
    """Asks the trials of a running sweep to commit a checkpoint and end; the first reason counts."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told = say, False
        self.reason: str | None = None
        self.tripped = False
        """Whether the circuit breaker asked."""

    def request(self, reason: str, *, tripped: bool = False) -> None:
        """May be called from a signal handler: it writes nothing itself."""
        if self.reason is None:
            self.reason, self.tripped = reason, tripped

    def requested(self) -> bool:
        """Whether to stop; the first to hear of it tells the user."""
        if self.reason and not self._told:
            self._told = True
            self._say(f"{self.reason}: the trials commit a last checkpoint and end")
        return self.reason is not None


class Breaker:
    """Circuit breaker: requests a stop when the first trials all fail with the same error, which the others would meet too."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._failed: dict[str, set[str]] = {}
        self._proven = False

    def tell(self, manifest: Manifest) -> None:
        """Hear how a trial ended."""
        self._proven = self._proven or manifest.status == "finished"
        if self._proven or manifest.status != "failed" or manifest.failure not in ("code", "data"):
            return
        trace = manifest.traceback or ""
        alike = self._failed.setdefault(fingerprint(trace), set())
        alike.add(manifest.trial_id)
        if len(alike) >= SAME_FAILURES:
            self._stop.request(
                f"circuit breaker: the first {len(alike)} trials failed with the same {manifest.failure} error at {where(trace)}: "
                f"{manifest.reason}; mend it, then give the same command again",
                tripped=True,
            )
