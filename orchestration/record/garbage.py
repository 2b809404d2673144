"""Removes what the store no longer needs: checkpoints beyond the retention, orphaned uploads, unfinished writes."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from orchestration.errors import Conflict, StoreError, StoreUnavailable
from orchestration.formatting import bytes_shown, table
from orchestration.plan.spec import FinishedRetention, Retention
from orchestration.record.lease import require_lease, superseded
from orchestration.record.manifest import FOLDERS, Checkpoint, Manifest, dump_manifest, manifest_key, parse_manifest, read_all
from orchestration.record.tracking_note import forget_tracked
from orchestration.record.trial_state import TrialState
from orchestration.store.base import Store, UnfinishedWrite

log = logging.getLogger(__name__)

Kind = Literal["retired", "orphaned", "unfinished"]
"""
retired     checkpoint of a finished trial that `retention.finished` does not keep
orphaned    object below a trial's checkpoints/ or pictures/ that no manifest names: its writer died or was fenced
unfinished  half-written file or multipart upload
"""
_YOUNG_S = 3600.0
"""Age from which the writer of an unfinished write outside of these folders, such as of the lease, counts as dead."""

_Candidate = tuple[Manifest, Checkpoint]


@dataclass(frozen=True)
class GarbageItem:
    """An object or unfinished write to remove. `place`: its key, or the place of the unfinished write."""

    kind: Kind
    place: str
    size: int | None


@dataclass(frozen=True)
class GarbageReport:
    """What was removed (in a dry run: would be), and what was kept and why."""

    items: tuple[GarbageItem, ...]
    open: tuple[str, ...]
    """Trials with an open attempt: none of their objects was removed."""
    unreadable: tuple[str, ...]
    """Why, for each manifest that cannot be read: none of the trial's objects was removed."""
    others: int
    """Trials that are not in the sweep file. Everything that their manifests name is kept."""
    others_bytes: int


def collect(store: Store, sweep: str, trial_ids: Collection[str], *, driver: int, retention: Retention, dry_run: bool) -> GarbageReport:
    """Remove what no trial of the sweep needs. Keeps all metrics, and everything that unfinished trials name.

    Unless `dry_run`, which changes nothing, the caller must hold the lease of the sweep and have closed the attempts of dead workers
    (`settle`). Safe to interrupt and to repeat.

    Args:
        trial_ids: the trials in the sweep file. The retention applies to the finished ones among them.
        driver: token of the lease.

    Raises:
        Fenced: another driver has taken the sweep over.
        StoreError: the store refused.
    """
    # Safety depends on the order of steps, not on clocks. The manifest lists an attempt as open before its first upload, and closing
    # the attempt fences its writer. The attempts are closed; now list objects, then read the manifests. A listed object that no manifest
    # names was uploaded by an attempt that is either closed, and can no longer commit it, or open, and then its trial is skipped. Objects
    # of a later attempt have other keys, because the number of the attempt is part of the key.
    retired = _retire(store, sweep, trial_ids, retention.finished, driver=driver, dry_run=dry_run) if retention.finished else set[str]()
    sizes, unfinished = store.sizes(f"{sweep}/"), _unfinished(store, sweep)
    manifests, unreadable = read_all(store, sweep, sorted({_trial(key) for key in sizes if key.count("/") > 1}))
    if dry_run:
        manifests = {trial_id: _without(manifest, retired) for trial_id, manifest in manifests.items()}
    running = {trial_id for trial_id, manifest in manifests.items() if manifest.is_open}
    unnamed = _unnamed(sizes, manifests.values(), running | unreadable.keys())
    dead = [write for write in unfinished if _is_dead(write, running | unreadable.keys())]
    if not dry_run:
        require_lease(store, sweep, driver)
        _delete(store, unnamed)
        store.abandon(dead)
    others = [manifest for trial_id, manifest in manifests.items() if trial_id not in trial_ids]
    items = [GarbageItem("retired" if key in retired else "orphaned", key, sizes[key]) for key in unnamed]
    return GarbageReport(
        items=(*items, *(GarbageItem("unfinished", write.place, write.size) for write in dead)),
        open=tuple(sorted(running)),
        unreadable=tuple(map(str, unreadable.values())),
        others=len(others),
        others_bytes=sum(sizes.get(ref.key, 0) for manifest in others for ref in manifest.objects),
    )


def render(report: GarbageReport, *, dry_run: bool) -> str:
    """A table with one line per kind, a total, and what was kept."""
    groups = defaultdict[str, list[GarbageItem]](list)
    for item in report.items:
        groups[_LABELS[item.kind]].append(item)
    rows = [[group, *_sum(items)] for group, items in sorted(groups.items())]
    head = ["would be removed" if dry_run else "removed", "number", "size"]
    lines = [table([head, *rows, ["total", *_sum(report.items)]])] if rows else ["nothing to remove"]
    if report.open:
        lines.append(f"kept: still running: {_trials(len(report.open))}")
    lines += [f"kept: {fault}" for fault in report.unreadable]
    if report.others:
        lines.append(f"kept: not in this sweep file: {_trials(report.others)}, {bytes_shown(report.others_bytes)}")
    return "\n".join(lines)


_LABELS: dict[Kind, str] = {
    "retired": "checkpoints beyond retention.finished",
    "orphaned": "objects that no trial uses",
    "unfinished": "unfinished uploads",
}


def _retire(store: Store, sweep: str, trial_ids: Collection[str], rule: FinishedRetention, *, driver: int, dry_run: bool) -> set[str]:
    """Remove the checkpoints that the rule does not keep from their manifests. Returns the keys that no manifest names any more.

    If there is anything to retire, first every finished trial of the file gets this driver's token, so that what is decided from these
    manifests stays true: a driver that was overtaken while it slept finds a higher token and changes nothing.
    """
    if not dry_run:
        require_lease(store, sweep, driver)
    stored = read_all(store, sweep)[0]
    finished = [trial for trial in stored.values() if trial.status is TrialState.FINISHED and trial.trial_id in trial_ids]
    if not dry_run and _retired(finished, rule):
        with ThreadPoolExecutor(max_workers=8) as pool:
            finished = list(pool.map(lambda trial: _changed(store, trial, driver), finished))
    retired = _retired(finished, rule)
    losing = [trial for trial in finished if retired & _keys(trial.checkpoints)]
    if losing and not dry_run:  # the note first: updating MLflow once too often does no harm
        forget_tracked(store, sweep, [trial.trial_id for trial in losing], driver=driver)
        for trial in losing:
            _changed(store, trial, driver, retired)
    return retired


def _changed(store: Store, trial: Manifest, driver: int, retired: Set[str] = frozenset()) -> Manifest:
    """The trial's manifest after it got the driver's token and lost the retired checkpoints. Raises Fenced."""
    key = manifest_key(trial.sweep, trial.trial_id)
    while True:
        now, etag = parse_manifest(*store.read(key), key=key)
        if now.driver > driver:
            raise superseded(f"trial {now.trial_id}", now.driver, driver)
        fresh = _without(now, retired).model_copy(update={"driver": driver})
        if fresh == now:
            return now
        with suppress(Conflict):
            store.replace(key, dump_manifest(fresh), expected=etag)
            return fresh


def _retired(trials: Sequence[Manifest], rule: FinishedRetention) -> set[str]:
    """Keys of all checkpoints of `trials` that the rule does not keep."""
    every = [(trial, checkpoint) for trial in trials for checkpoint in trial.checkpoints]
    partitions, own = defaultdict[object, list[_Candidate]](list), defaultdict[str, list[_Candidate]](list)
    for trial, checkpoint in every:
        partitions[trial.config.get("partition")].append((trial, checkpoint))
        own[trial.trial_id].append((trial, checkpoint))
    kept = [
        *_best(every, rule.best_per_sweep),
        *(kept for group in partitions.values() for kept in _best(group, rule.best_per_partition)),
        *(kept for group in own.values() for kept in _best(group, rule.best_per_trial)),
        *(kept for group in own.values() for kept in sorted(group, key=lambda c: -c[1].step)[: rule.last]),
    ]
    return _keys(checkpoint for _, checkpoint in every) - _keys(checkpoint for _, checkpoint in kept)


def _best(candidates: Iterable[_Candidate], count: int) -> list[_Candidate]:
    """The `count` candidates with the highest scores. Ties: the earliest step, as for a trial's best checkpoint."""
    scored = [
        (-checkpoint.score, checkpoint.step, trial.trial_id, (trial, checkpoint))
        for trial, checkpoint in candidates
        if checkpoint.score is not None
    ]
    return [candidate for *_, candidate in sorted(scored, key=lambda entry: entry[:3])[:count]]


def _keys(checkpoints: Iterable[Checkpoint]) -> set[str]:
    return {ref.key for checkpoint in checkpoints for ref in checkpoint.objects.values()}


def _without(manifest: Manifest, retired: Set[str]) -> Manifest:
    kept = tuple(c for c in manifest.checkpoints if not retired & _keys([c]))
    return manifest.model_copy(update={"checkpoints": kept})


def _unfinished(store: Store, sweep: str) -> list[UnfinishedWrite]:
    """Trials write no multipart uploads, so a bucket policy that hides them is not an error."""
    try:
        return list(store.unfinished(f"{sweep}/"))
    except StoreUnavailable:
        raise
    except StoreError as error:
        log.warning("%s: cannot list unfinished uploads, so they are kept: %s", sweep, error)
        return []


def _unnamed(keys: Iterable[str], manifests: Collection[Manifest], kept: Collection[str]) -> list[str]:
    """Keys in the folders of trials, except of those to be `kept`, that no manifest names."""
    named = {ref.key for manifest in manifests for ref in manifest.objects}
    return [key for key in keys if _in_attempt_folder(key) and key not in named and _trial(key) not in kept]


def _in_attempt_folder(place: str) -> bool:
    """Whether only an attempt of a trial can have written it."""
    parts = place.split("/")
    return len(parts) > 3 and parts[2] in FOLDERS


def _trial(place: str) -> str:
    return place.split("/")[1]


def _is_dead(write: UnfinishedWrite, kept: Collection[str]) -> bool:
    """Whether its writer is dead: inside a trial's folders, unless the trial is to be `kept`; elsewhere, if it is old."""
    return _trial(write.place) not in kept if _in_attempt_folder(write.place) else write.age_s > _YOUNG_S


def _delete(store: Store, keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(lambda key: store.delete([key]), keys))


def _sum(items: Iterable[GarbageItem]) -> list[str]:
    sizes = [item.size for item in items]
    known = [size for size in sizes if size is not None]
    more = " and more" if len(known) < len(sizes) else ""
    return [str(len(sizes)), bytes_shown(sum(known)) + more if known else "unknown"]


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"
