"""The files of a trial's MLflow run: settings, environment of every attempt, predictions, confusion matrix, IoU of every class."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from PIL import Image

from orchestration.errors import Corrupt, SpecError
from orchestration.record.manifest import SCORE, Attempt, EpochMetrics, EpochPictures, Manifest, ObjectRef, best_epoch, sha256_of
from orchestration.record.stored_trials import stored_config
from orchestration.record.trial_state import TrialState
from orchestration.store.base import Store
from orchestration.tracking.confusion_map import confusion_map
from orchestration.tracking.descriptions import label_of
from orchestration.tracking.mlflow_private import image_names, is_table, table

CONFIG, IOU = "config.yaml", "iou_per_class.json"
PREDICTIONS, CONFUSION_TABLE, CONFUSION_MAP = "predictions.png", "confusion.json", "confusion.png"
_ATTEMPTS = "attempts"
_HEADS = ("branch1", "branch2", "ensemble")
_PREVIEW = 1024  # longest side in pixels

Fetch = Callable[[ObjectRef], bytes]
"""Reads an object of the store and checks it. Raises SweepError."""


@dataclass(frozen=True)
class RunFile:
    """A file of a run."""

    name: str
    made_of: str
    """Changes with its content. Empty for what only one driver knows: `digest_of` leaves it out."""
    make: Callable[[], bytes]
    """May read the store; raises SweepError."""
    fixed: bool = False
    """The content under this name never changes."""
    table: bool = False
    """A table that MLflow's UI can show."""


@dataclass(frozen=True)
class CodeOrigin:
    """The code of an attempt, which only the driver that started it knows."""

    driver: int
    """Its token."""
    facts: Mapping[str, str]
    """Versions and the like."""
    code: Mapping[str, bytes]
    """Files by name, such as a `git.diff`."""


def stored(store: Store) -> Fetch:
    """A `Fetch` from `store`."""

    def fetch(ref: ObjectRef) -> bytes:
        body = store.read(ref.key)[0]
        if sha256_of(body) != ref.sha256:
            raise Corrupt(ref.key)
        return body

    return fetch


def digest_of(files: Iterable[RunFile]) -> str:
    """Changes with any of the files, except those that only one driver knows."""
    contents = sorted((file.name, file.made_of) for file in files if file.made_of)
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:16]


def trial_files(manifest: Manifest, fetch: Fetch, *, live: bool, origin: CodeOrigin | None = None) -> tuple[RunFile, ...]:
    """The files that follow from the manifest and the store, and the code of the attempts that the driver of `origin` started.

    Args:
        live: the trial is training: its table of IoU stays that of the newest epoch with pictures.
    """
    fetch = cache(fetch)
    settings = RunFile(CONFIG, manifest.trial_id, lambda: _config(manifest).encode(), fixed=True)
    attempts = (file for attempt in manifest.attempts for file in _attempt(attempt, origin))
    images = (file for pictures in manifest.pictures for file in _images(manifest, pictures, fetch))
    return (settings, *attempts, *_iou(manifest, live=live), *_newest_predictions(manifest, fetch), *_confusion(manifest, fetch), *images)


def overview_files(bodies: Mapping[str, bytes]) -> tuple[RunFile, ...]:
    """Files of the sweep's own run, by name and content."""
    return tuple(_overview_file(name, body) for name, body in sorted(bodies.items()))


def _overview_file(name: str, body: bytes) -> RunFile:
    return RunFile(name, sha256_of(body), lambda: body, table=name.endswith(".json") and is_table(body))


def _config(manifest: Manifest) -> str:
    """A sweep file for this trial alone, under a name of its own, so that it cannot write into the sweep that it comes from."""
    name = f"{manifest.sweep[: 99 - len(manifest.trial_id)]}-{manifest.trial_id}"
    known = _settings(manifest)
    order = dict.fromkeys([*manifest.varied, *known])
    settings = [f"  {key}: {json.dumps(known[key])}" for key in order if known.get(key) is not None]
    head = f"# {' '.join(label_of(manifest).split())}: trial {manifest.trial_id} of {manifest.sweep}, alone. Run: rrn-sweep {CONFIG}"
    return "\n".join([head, f"name: {name}", "base:", *settings, ""])


def _settings(manifest: Manifest) -> Mapping[str, Any]:
    """What the method reads: release 0.1 stored settings of other methods too, which a sweep file refuses."""
    try:
        return stored_config(manifest).model_dump(mode="json")
    except SpecError:
        return manifest.config


def _attempt(attempt: Attempt, origin: CodeOrigin | None) -> Iterator[RunFile]:
    """Each attempt has its own files, so that a later driver, which knows less of it, replaces none."""
    ours = origin if origin and origin.driver == attempt.driver else None
    where = {"attempt": attempt.number, "driver": attempt.driver, "node": attempt.node, "machine": attempt.machine}
    known = {**where, **({"code": dict(ours.facts)} if ours else {})}
    prefix = f"{_ATTEMPTS}/{attempt.number}-"
    yield RunFile(f"{prefix}environment.json", str(attempt.number), lambda: _json(known), fixed=True)
    for name, body in sorted(ours.code.items()) if ours else ():
        yield RunFile(f"{prefix}{name}", "", partial(bytes, body), fixed=True)


def _iou(manifest: Manifest, *, live: bool) -> Iterator[RunFile]:
    drawn = max((pictures.epoch for pictures in manifest.pictures), default=0)
    entries = [entry for entry in manifest.history if not live or manifest.status is TrialState.FINISHED or entry.epoch <= drawn]
    if entries and any(name.startswith("val/iou_") for name in entries[-1].metrics):
        rule = "last" if manifest.status is TrialState.FINISHED else "newest"
        yield RunFile(IOU, f"{rule} {entries[-1].epoch}", lambda: _iou_table(entries, rule), table=True)


def _iou_table(entries: Sequence[EpochMetrics], rule: str) -> bytes:
    """In percent; empty for a class that neither occurs nor is predicted."""
    last, best = entries[-1], best_epoch(entries)
    shown = [(last, head, f"{head}, {rule} ({last.epoch})") for head in _HEADS]
    shown += [(best, "ensemble", f"ensemble, best ({best.epoch})")] if best else []
    prefixes = [f"val/iou_{head}/" for head in _HEADS]
    named = (name.removeprefix(prefix) for entry, *_ in shown for name in entry.metrics for prefix in prefixes if name.startswith(prefix))
    rows = [[name, *(_percent(entry, f"val/iou_{head}/{name}") for entry, head, _ in shown)] for name in dict.fromkeys(named)]
    mean = ["mean", *(_percent(entry, f"{SCORE}_{head}") for entry, head, _ in shown)]
    return table(["IoU in percent, epoch", *(title for *_, title in shown)], [mean, *rows])


def _percent(entry: EpochMetrics, name: str) -> float | None:
    return round(100 * entry.metrics[name], 2) if name in entry.metrics else None


def _newest_predictions(manifest: Manifest, fetch: Fetch) -> Iterator[RunFile]:
    """The newest predictions again, beside the other files."""
    if newest := _newest_picture(manifest, PREDICTIONS):
        yield RunFile(PREDICTIONS, newest[1].sha256, partial(fetch, newest[1]))


def _newest_picture(manifest: Manifest, name: str) -> tuple[int, ObjectRef] | None:
    """The newest epoch with an object of this name, and the object."""
    objects = [(pictures.epoch, pictures.objects[name]) for pictures in manifest.pictures if name in pictures.objects]
    return max(objects, key=lambda entry: entry[0], default=None)


def _confusion(manifest: Manifest, fetch: Fetch) -> Iterator[RunFile]:
    newest = _newest_picture(manifest, CONFUSION_TABLE)
    if newest is None:
        return
    epoch, ref = newest

    @cache
    def counts() -> dict[str, Any]:
        return {"epoch": epoch, **json.loads(fetch(ref))}

    yield RunFile(CONFUSION_TABLE, ref.sha256, lambda: _confusion_table(counts()), table=True)
    yield RunFile(CONFUSION_MAP, ref.sha256, lambda: _confusion_map(counts()))


def _confusion_table(confusion: Mapping[str, Any]) -> bytes:
    """A row for each true class: its pixels, and the percentage of them that was predicted as each class."""
    rows = [[name, sum(row), *_shares(row)] for name, row in zip(confusion["classes"], confusion["counts"], strict=True)]
    title = f"truth, and percent of its pixels ({confusion['head']}, epoch {confusion['epoch']})"
    return table([title, "pixels", *confusion["classes"]], rows)


def _confusion_map(confusion: Mapping[str, Any]) -> bytes:
    title = f"Percent of each true class's pixels\n{confusion['head']}, epoch {confusion['epoch']}, validation list"
    return confusion_map(confusion["classes"], [_shares(row) for row in confusion["counts"]], title)


def _shares(row: Sequence[int]) -> list[float | None]:
    return [round(100 * count / sum(row), 2) if sum(row) else None for count in row]


def _images(manifest: Manifest, pictures: EpochPictures, fetch: Fetch) -> Iterator[RunFile]:
    """Unlike those of `log_image`, the names have no random part: a replay replaces the files and adds none."""
    time_ms = next((entry.time_ms for entry in manifest.history if entry.epoch == pictures.epoch), manifest.created_ms)
    for name, ref in pictures.objects.items():
        if name.endswith(".png"):
            full, preview = image_names(name.removesuffix(".png"), step=pictures.epoch, time_ms=time_ms, unique=manifest.trial_id)
            yield RunFile(full, ref.sha256, partial(fetch, ref), fixed=True)
            yield RunFile(preview, ref.sha256, partial(_preview, fetch, ref), fixed=True)


def _preview(fetch: Fetch, ref: ObjectRef) -> bytes:
    body = io.BytesIO()
    with Image.open(io.BytesIO(fetch(ref))) as picture:
        picture.thumbnail((_PREVIEW, _PREVIEW))
        picture.convert("RGB").save(body, "WEBP")
    return body.getvalue()


def _json(known: Mapping[str, Any]) -> bytes:
    return json.dumps(known, indent=2, default=str).encode()
