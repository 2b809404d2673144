"""Turn the manifest of a trial into a chronological log."""

from __future__ import annotations

from collections.abc import Iterator

from orchestration.formatting import UNKNOWN_TIME, clock, instant
from orchestration.observe.status import HEADS
from orchestration.record.manifest import SCORE, Attempt, Checkpoint, EpochMetrics, Manifest, ObjectRef

_TERMS = "train/loss_"

Key = tuple[str, int]
"""Identifies lines of a log: kind of event, and number of the attempt or epoch."""


def log_lines(manifest: Manifest, store_uri: str) -> Iterator[str]:
    """The history of a trial, then its stored objects. Times are those of the node's clock, in the local time zone."""
    yield from (line for _, line in history(manifest))
    yield from stored_objects(manifest, store_uri)


def history(manifest: Manifest) -> Iterator[tuple[Key, str]]:
    """Key and text of each line. A later manifest only adds lines; only the traceback is replaced, by that of the newest failure."""
    yield ("created", 0), f"{instant(manifest.created_ms)}  trial {manifest.trial_id} of {manifest.sweep} created: {manifest.label}"
    entries = list(manifest.history)
    for attempt in manifest.attempts:
        yield from _attempt_start(manifest, attempt)
        while entries and entries[0].step <= attempt.last_step:
            entry = entries.pop(0)
            yield ("epoch", entry.epoch), _epoch(entry, manifest)
        yield from _attempt_close(manifest, attempt)


def stored_objects(manifest: Manifest, store_uri: str) -> Iterator[str]:
    """The URI of every checkpoint and picture folder in the store."""
    last, best = max(manifest.checkpoints, key=lambda c: c.step, default=None), manifest.best_checkpoint
    for checkpoint in sorted(manifest.checkpoints, key=lambda c: c.step):
        rules = [rule for rule, chosen in (("last", last), ("best", best)) if chosen is checkpoint]
        yield f"checkpoint of {_place(checkpoint)}{_by(rules, checkpoint)}: {_folder(checkpoint.objects, store_uri)}"
    for pictures in manifest.pictures:
        yield f"pictures of epoch {pictures.epoch}: {_folder(pictures.objects, store_uri)}"


def attempt_end(attempt: Attempt) -> str:
    """`finished`, `interrupted`, `open`, or `[lost] REASON`."""
    if attempt.outcome in (None, "finished", "interrupted"):
        return attempt.outcome or "open"
    return f"[{attempt.outcome}] {attempt.reason}"


def _attempt_start(manifest: Manifest, attempt: Attempt) -> Iterator[tuple[Key, str]]:
    machine = ", ".join(f"{name} {value}" for name, value in attempt.machine.items())
    where = f"{attempt.node}{f' ({machine})' if machine else ''}"
    yield ("begun", attempt.number), f"{instant(attempt.started_ms)}  attempt {attempt.number} for driver {attempt.driver} on {where}"
    if attempt.first_step:  # known after the first commit
        epoch = max((entry.epoch for entry in manifest.history if entry.step <= attempt.first_step), default=0)
        yield ("resumed", attempt.number), f"{_blank()}  resumed from the checkpoint of step {attempt.first_step}, after epoch {epoch}"


def _epoch(entry: EpochMetrics, manifest: Manifest) -> str:
    metrics = entry.metrics
    terms = [f"{name.removeprefix(_TERMS)} {value:.4g}" for name, value in metrics.items() if name.startswith(_TERMS)]
    heads = [f"{head} {metrics[f'{SCORE}_{head}']:.4f}" for head in HEADS if f"{SCORE}_{head}" in metrics]
    seconds = metrics.get("perf/train_s", 0.0) + metrics.get("perf/eval_s", 0.0)
    parts = [
        f"epoch {entry.epoch}/{manifest.config.get('epochs', '?')}, step {entry.step}",
        f"train/loss {metrics.get('train/loss', float('nan')):.4f}{_bracketed(terms)}",
        f"{SCORE} {'undefined' if entry.score is None else f'{entry.score:.4f}'}{_bracketed(heads)}",
        *([f"{seconds:.1f} s"] if seconds else []),
    ]
    return f"{instant(entry.time_ms)}  {'; '.join(parts)}"


def _attempt_close(manifest: Manifest, attempt: Attempt) -> Iterator[tuple[Key, str]]:
    if attempt.ended_ms is None:
        return
    account = f"useful {clock(attempt.useful_s)}, repeated {clock(attempt.repeated_s)}, lost {clock(attempt.lost_s)}"
    yield ("ended", attempt.number), f"{instant(attempt.ended_ms)}  attempt {attempt.number} ended: {attempt_end(attempt)}; {account}"
    if attempt is manifest.attempts[-1] and manifest.traceback:
        for line in manifest.traceback.rstrip().splitlines():
            yield ("traceback", attempt.number), f"    {line}"


def _place(checkpoint: Checkpoint) -> str:
    return f"step {checkpoint.step}, after epoch {checkpoint.epoch}"


def _by(rules: list[str], checkpoint: Checkpoint) -> str:
    score = [] if checkpoint.score is None else [f"{SCORE} {checkpoint.score:.4f}"]
    return _bracketed([*rules, *score])


def _folder(objects: dict[str, ObjectRef], store_uri: str) -> str:
    key = min(ref.key for ref in objects.values())
    return f"{store_uri.rstrip('/')}/{key.rpartition('/')[0]}"


def _bracketed(parts: list[str]) -> str:
    return f" ({', '.join(parts)})" if parts else ""


def _blank() -> str:
    return " " * len(UNKNOWN_TIME)
