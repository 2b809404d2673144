"""What nothing needs any more in the store: finished trials' checkpoints beyond retention, orphaned uploads, half-written files."""

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
from orchestration.record.manifest import FOLDERS, Checkpoint, Manifest, dump_manifest, manifest_key, parse_manifest, read_manifests
from orchestration.record.tracking_note import forget_tracked
from orchestration.record.trial_record import settle
from orchestration.store.base import Store, UnfinishedWrite

log = logging.getLogger(__name__)

Kind = Literal["retired", "orphaned", "unfinished"]
"""
retired     checkpoint of a finished trial that `retention.finished` does not keep
orphaned    object below a trial's checkpoints/ or pictures/ that no manifest names: its writer died, or was fenced off
unfinished  half-written file, or multipart upload
"""
_YOUNG_S = 3600.0
"""Outside of these folders an unfinished write may be somebody's who lives, such as the lease's; one this old is not."""

_Candidate = tuple[Manifest, Checkpoint]


@dataclass(frozen=True)
class GarbageItem:
    """One thing to remove; `place` is its key, or of an unfinished write where it lies."""

    kind: Kind
    place: str
    size: int | None

    @property
    def trial_id(self) -> str:
        """Empty for what belongs to the whole sweep."""
        return _trial(self.place) if self.place.count("/") > 1 else ""


@dataclass(frozen=True)
class GarbageReport:
    """What was removed, or would be, and what was left for a reason."""

    items: tuple[GarbageItem, ...]
    settled: tuple[str, ...]
    """Trials whose process died without a word, and whose attempt is closed now."""
    open: tuple[str, ...]
    """Trials whose attempt is open, so that nothing of theirs was touched."""
    others: int
    """Trials that the sweep file does not ask for; what their manifests name stays."""
    others_bytes: int


def collect(store: Store, sweep: str, trial_ids: Collection[str], *, driver: int, retention: Retention, dry_run: bool) -> GarbageReport:
    """Remove what no trial of the sweep needs; the metrics always stay, and of trials that are not finished all that they name.

    The caller holds the lease of the sweep, unless `dry_run`, which changes nothing. May be broken off anywhere and called again.

    Args:
        trial_ids: the trials that the sweep file asks for; of finished ones among these the retention may take checkpoints.
        driver: token of the lease.

    Raises:
        Fenced: another driver has taken the sweep over.
        StoreError: among others for a manifest that cannot be read; what it names is unknown, so nothing of the sweep is deleted.
    """
    # No clock decides what may go, but an order. An attempt is in its trial's manifest, open, before its first upload, and closing
    # it shuts its writer out. So: close, list, and read the manifests after that. What was listed, and is named by none, was uploaded
    # by an attempt that is either closed, and can name it no more, or seen as open, and then its trial is passed over. A later
    # attempt's objects have other keys, as its number is part of them.
    manifests = read_manifests(store, sweep)
    settled = [] if dry_run else _settle(store, sweep, manifests.values(), driver=driver)
    finished = [m for trial_id, m in manifests.items() if trial_id in trial_ids and m.status == "finished"]
    retired = _retired(finished, retention.finished) if retention.finished else set[str]()
    if not dry_run:
        losing = [manifest for manifest in finished if retired & _keys(manifest.checkpoints)]
        if losing:  # told first, retired after: to tell MLflow twice does no harm
            forget_tracked(store, sweep, [trial.trial_id for trial in losing])
        for trial in losing:
            _retire(store, trial, retired)
    sizes, unfinished = store.sizes(f"{sweep}/"), _unfinished(store, sweep)
    manifests = read_manifests(store, sweep)
    if dry_run:
        manifests = {trial_id: _without(manifest, retired) for trial_id, manifest in manifests.items()}
    running = {trial_id for trial_id, manifest in manifests.items() if _is_open(manifest)}
    unnamed = _unnamed(sizes, manifests.values(), running)
    dead = [write for write in unfinished if _is_dead(write, running)]
    if not dry_run:
        _delete(store, unnamed)
        store.abandon(dead)
    others = [manifest for trial_id, manifest in manifests.items() if trial_id not in trial_ids]
    items = [GarbageItem("retired" if key in retired else "orphaned", key, sizes[key]) for key in unnamed]
    return GarbageReport(
        items=(*items, *(GarbageItem("unfinished", write.place, write.size) for write in dead)),
        settled=tuple(settled),
        open=tuple(sorted(running)),
        others=len(others),
        others_bytes=sum(sizes.get(ref.key, 0) for manifest in others for ref in manifest.objects),
    )


def render(collected: GarbageReport, *, dry_run: bool, per_trial: bool = False) -> str:
    """A line a kind and a total; `per_trial`, a line a kind and trial."""
    groups = defaultdict[tuple[str, ...], list[GarbageItem]](list)
    for item in collected.items:
        groups[(_WORDS[item.kind], *([item.trial_id or "-"] if per_trial else []))].append(item)
    head = ["would be removed" if dry_run else "removed", *(["trial"] if per_trial else []), "number", "size"]
    rows = [[*group, *_sum(items)] for group, items in sorted(groups.items())]
    total = ["total", *([""] if per_trial else []), *_sum(collected.items)]
    lines = [table([head, *rows, total])] if rows else ["nothing to remove"]
    if collected.settled:
        lines.append(f"closed, as their process ended without a word: {_trials(len(collected.settled))}")
    if collected.open:
        lines.append(f"kept whole, as their attempt is not closed: {_trials(len(collected.open))}")
    if collected.others:
        lines.append(f"kept, of other versions of the file: {_trials(collected.others)}, {bytes_shown(collected.others_bytes)}")
    return "\n".join(lines)


_WORDS: dict[Kind, str] = {
    "retired": "checkpoints beyond retention.finished",
    "orphaned": "objects that no trial names",
    "unfinished": "unfinished uploads",
}


def _settle(store: Store, sweep: str, manifests: Iterable[Manifest], *, driver: int) -> list[str]:
    """Close all open attempts. The lease is held, so no driver waits for them."""
    left = sorted(manifest.trial_id for manifest in manifests if _is_open(manifest))
    for trial_id in left:
        settle(store, sweep, trial_id, driver=driver, failure="lost", reason="its process ended without a word")
    return left


def _is_open(manifest: Manifest) -> bool:
    return bool(manifest.attempts) and manifest.attempts[-1].ended_ms is None


def _retired(trials: Sequence[Manifest], rule: FinishedRetention) -> set[str]:
    """The objects of all checkpoints of `trials` that the rule does not keep."""
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
    """Those with the highest scores; of equal ones the earliest, as a trial's own best is chosen too."""
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


def _retire(store: Store, trial: Manifest, retired: Set[str]) -> None:
    """Take the checkpoints out of the manifest, so that nobody names their objects any more."""
    key = manifest_key(trial.sweep, trial.trial_id)
    while True:
        now, etag = parse_manifest(*store.read(key), key=key)
        with suppress(Conflict):
            store.replace(key, dump_manifest(_without(now, retired)), expected=etag)
            return


def _unfinished(store: Store, sweep: str) -> list[UnfinishedWrite]:
    """Trials write no multipart uploads, so a bucket whose policy hides them is no reason to give up."""
    try:
        return list(store.unfinished(f"{sweep}/"))
    except StoreUnavailable:
        raise
    except StoreError as error:
        log.warning("%s: unfinished uploads cannot be listed: %s", sweep, error)
        return []


def _unnamed(keys: Iterable[str], manifests: Collection[Manifest], running: Collection[str]) -> list[str]:
    """The objects in the folders of trials that no manifest names, of trials without an open attempt."""
    named = {ref.key for manifest in manifests for ref in manifest.objects}
    return [key for key in keys if _is_trials(key) and key not in named and _trial(key) not in running]


def _is_trials(place: str) -> bool:
    """Whether it lies where only a trial's attempts write, and under names that are their own."""
    parts = place.split("/")
    return len(parts) > 3 and parts[2] in FOLDERS


def _trial(place: str) -> str:
    return place.split("/")[1]


def _is_dead(write: UnfinishedWrite, running: Collection[str]) -> bool:
    """Outside of the trials' folders it may be somebody's who lives, such as the lease's; inside, only an open attempt's."""
    return _trial(write.place) not in running if _is_trials(write.place) else write.age_s > _YOUNG_S


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
