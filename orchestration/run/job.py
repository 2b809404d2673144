"""What all trials of a sweep share."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestration.plan.spec import PictureRule, Retention, Retries
from rrn_core.config import Runtime


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep share. Contains no credential."""

    store: str
    """URI."""
    runtime: Runtime
    retention: Retention
    retries: Retries = field(default_factory=Retries)
    driver: int = 0
    """Token of the driver's lease."""
    checkpoint_every_s: float = 300.0
    """Longest time between checkpoints within an epoch; every completed epoch is saved too."""
    upload_queue_bytes: int = 2**32
    """Local disk for checkpoints while the store is unavailable; when it is full, training pauses."""
    patience_s: float = 3600.0
    """How long to wait for an unavailable store."""
    pictures: PictureRule = field(default_factory=PictureRule)
    """What to draw; changes no result."""
