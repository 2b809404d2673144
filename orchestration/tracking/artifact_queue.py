"""A queue of files to upload to MLflow: neither an unavailable artifact store nor a file that cannot be made blocks anything else."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestration.errors import SweepError, TrackingError
from orchestration.tracking.artifacts import ArtifactsUnavailable
from orchestration.tracking.experiment import RunGone, translated
from orchestration.tracking.run_files import RunFile
from orchestration.tracking.runs import Runs

log = logging.getLogger(__name__)

RETRY_S, LONGEST_RETRY_S = 60.0, 1800.0
"""Pause before a failed upload is retried. While the artifact store is unavailable, each pause is twice the one before."""


@dataclass
class _QueuedFiles:
    files: Sequence[RunFile]
    not_before_s: float = 0.0
    """By `time.monotonic`."""


class ArtifactQueue:
    """The queue, by trial; None stands for the sweep's own run. It warns once of an unavailable store, and once of every other error."""

    def __init__(self) -> None:
        self._queued: dict[str | None, _QueuedFiles] = {}
        self._not_before_s, self._pause_s = 0.0, RETRY_S
        self._warned: set[str] = set()

    def replace(self, trial_id: str | None, files: Sequence[RunFile]) -> None:
        """Queue the files of a run, instead of those that were queued for it before."""
        before = self._queued.get(trial_id)
        self._queued[trial_id] = _QueuedFiles(files, before.not_before_s if before else 0.0)

    def is_pending(self, trial_id: str | None) -> bool:
        """Whether files of the run are still queued."""
        return trial_id in self._queued

    def retry_now(self) -> None:
        """End every pause."""
        self._not_before_s = 0.0
        for queued in list(self._queued.values()):
            queued.not_before_s = 0.0

    def due_s(self) -> float | None:
        """When the next upload is due, by `time.monotonic`; None while the queue is empty."""
        return max(self._not_before_s, min(queued.not_before_s for queued in self._queued.values())) if self._queued else None

    def upload_next(self, runs: Runs) -> bool:
        """Upload what has waited longest; False where nothing is due. Raises TrackingAbandoned, MlflowUnavailable, TrackingError."""
        now_s = time.monotonic()
        due = [trial_id for trial_id, queued in self._queued.items() if max(self._not_before_s, queued.not_before_s) <= now_s]
        if not due:
            return False
        self._upload(runs, due[0])
        return True

    def _upload(self, runs: Runs, trial_id: str | None) -> None:
        try:
            with translated():
                runs.store_files(trial_id, self._queued[trial_id].files)
        except TrackingError:
            raise
        except (ArtifactsUnavailable, SweepError, RunGone) as error:  # RunGone: the run was deleted, or MLflow refuses its files
            self._postpone(trial_id, error)
        else:
            self._pause_s = RETRY_S
            del self._queued[trial_id]

    def _postpone(self, trial_id: str | None, error: Exception) -> None:
        now_s = time.monotonic()
        queued = self._queued.pop(trial_id)
        self._queued[trial_id] = _QueuedFiles(queued.files, now_s + RETRY_S)
        if isinstance(error, ArtifactsUnavailable):
            self._not_before_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_RETRY_S)
        text = "" if isinstance(error, ArtifactsUnavailable) else str(error)
        if text not in self._warned:
            self._warned.add(text)
            log.warning("MLflow: files could not be uploaded; the sweep continues, and the upload is retried: %s", error)
