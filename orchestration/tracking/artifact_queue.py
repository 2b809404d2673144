"""Files that MLflow shall hold, in a queue: a place that is away, or a file that cannot be made, holds nothing else up."""

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

AGAIN_S, LONGEST_AGAIN_S = 60.0, 1800.0
"""After a fault the same is tried again so much later; as long as the place is away, each pause is twice the one before."""


@dataclass
class _WantedFiles:
    files: Sequence[RunFile]
    from_s: float = 0.0
    """Not before this instant, by `time.monotonic`."""


class ArtifactQueue:
    """The queue, by trial; None stands for the sweep's own run. One warning tells of the place, one of each other fault."""

    def __init__(self) -> None:
        self._wanted: dict[str | None, _WantedFiles] = {}
        self._from_s, self._pause_s = 0.0, AGAIN_S
        self._told: set[str] = set()

    def want(self, trial_id: str | None, files: Sequence[RunFile]) -> None:
        """The run shall have these files, instead of those that were wanted of it before."""
        before = self._wanted.get(trial_id)
        self._wanted[trial_id] = _WantedFiles(files, before.from_s if before else 0.0)

    def lacks(self, trial_id: str | None) -> bool:
        """Whether files are still wanted of the run."""
        return trial_id in self._wanted

    def hurry(self) -> None:
        """Everything is tried once more, at once."""
        self._from_s = 0.0
        for wanted in list(self._wanted.values()):
            wanted.from_s = 0.0

    def due_s(self) -> float | None:
        """The instant, by `time.monotonic`, at which there is something to do; None where nothing is wanted."""
        return max(self._from_s, min(wanted.from_s for wanted in self._wanted.values())) if self._wanted else None

    def store_next(self, runs: Runs) -> bool:
        """Try what has waited longest; False where there is nothing to do now. Raises Abandoned, Away, TrackingError."""
        now_s = time.monotonic()
        due = [trial_id for trial_id, wanted in self._wanted.items() if max(self._from_s, wanted.from_s) <= now_s]
        if not due:
            return False
        self._store(runs, due[0])
        return True

    def _store(self, runs: Runs, trial_id: str | None) -> None:
        try:
            with translated():
                runs.store_files(trial_id, self._wanted[trial_id].files)
        except TrackingError:
            raise
        except (ArtifactsUnavailable, SweepError, RunGone) as error:  # Gone: the run was deleted, or MLflow takes exception to its files
            self._fail(trial_id, error)
        else:
            self._pause_s = AGAIN_S
            del self._wanted[trial_id]

    def _fail(self, trial_id: str | None, error: Exception) -> None:
        now_s = time.monotonic()
        wanted = self._wanted.pop(trial_id)
        self._wanted[trial_id] = _WantedFiles(wanted.files, now_s + AGAIN_S)
        if isinstance(error, ArtifactsUnavailable):
            self._from_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_AGAIN_S)
        text = "" if isinstance(error, ArtifactsUnavailable) else str(error)
        if text not in self._told:
            self._told.add(text)
            log.warning("files cannot be shown in MLflow for now, the sweep goes on and they are tried again later: %s", error)
