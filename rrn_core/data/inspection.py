"""Judges the files of a data set before anything is trained on them, and tells every fault at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.dataset import DataSet, open_dataset, open_layout, split_indices
from rrn_core.data.file_statistics import FileStatistics, Looks, Progress, StatisticsReader
from rrn_core.data.files import REFUSED, VOID, allowed, plain_table, read_label
from rrn_core.data.lists import some
from rrn_core.data.published import PUBLISHED, names_hash

__all__ = ["Finding", "Level", "Looks", "inspect_data"]

Level = Literal["ok", "warn", "fault"]

MUCH_VOID = 0.5
"""Above this share of void pixels a role is warned about."""


@dataclass(frozen=True)
class Finding:
    """One line of an inspection. A `fault` stops training or spoils its result, a `warn` may be meant, `ok` informs."""

    level: Level
    what: str
    detail: str


_OTHERWISE = {
    "voc": "usually because they were chosen from other images than the 10582 of train_aug: SBD's labels are not all there, or train_list "
    "names another list",
    "cityscapes": "usually because CPS's train.txt, whose order decides, is not there: put it into data_root, or name it by train_list",
}
"""Why a partition by the published rule is not the published one."""


@dataclass(frozen=True)
class _Role:
    """The images that a run uses in one way, with what their label values mean."""

    what: str
    looks: list[FileStatistics]
    table: NDArray[np.int16]
    classes: tuple[str, ...]
    needs_labels: bool = True
    """Else labels are read too where they are there, but for diagnostics only."""

    @property
    def labeled(self) -> list[FileStatistics]:
        return [look for look in self.looks if look.counts]


def inspect_data(config: TrainConfig, runtime: Runtime, *, looks: Looks | None = None, progress: Progress | None = None) -> list[Finding]:
    """Look at every image that a run of `config` would use, and at every label, also of unlabelled images: training reads those that are
    there for diagnostics, and stops at a broken one.

    Every file is decoded to its end. No fault is raised: each is a finding.

    Args:
        looks: files that an earlier inspection looked at; those of this one are added. Configurations of a sweep share most files.
    """
    try:
        data = open_dataset(config, runtime.model_copy(update={"cache_images": False}))
        labeled, unlabeled = split_indices(config, data)
        table = plain_table(len(data.classes)) if config.dataset == "digits" else open_layout(config, runtime).table
    except (ValueError, OSError) as error:
        return [Finding("fault", _named(config), " ".join(str(error).split()))]
    roles = _roles(config, data, labeled, unlabeled, table, StatisticsReader({} if looks is None else looks, progress))
    counts = f"{len(labeled)} labelled, {len(unlabeled)} unlabelled, {len(data.val)} validation images"
    findings = [Finding("ok", _named(config), counts), *_published(config, [data.train.names[i] for i in labeled])]
    for role in roles:
        findings += _findings(role)
    return [*findings, _padding(config, [look for role in roles[:2] for look in role.looks])]


def _roles(
    config: TrainConfig, data: DataSet, labeled: Sequence[int], unlabeled: Sequence[int], table: NDArray[np.int16], eyes: StatisticsReader
) -> list[_Role]:
    """Labelled, unlabelled, validation."""
    # in a full partition the unlabelled images are the labelled ones
    hidden = sorted(set(unlabeled) - set(labeled))
    eyes.expect(len(labeled) + len(hidden) + len(data.val))
    partition, classes = _named(config), data.classes
    return [
        _Role(f"{partition} labelled", eyes.look(data.train, labeled), table, classes),
        _Role(f"{partition} unlabelled", eyes.look(data.train, hidden), table, classes, needs_labels=False),
        _Role(f"{config.dataset} validation", eyes.look(data.val, range(len(data.val))), table, classes),
    ]


def _published(config: TrainConfig, names: Sequence[str]) -> list[Finding]:
    """Whether a partition that follows the published rule has the published images."""
    expected = PUBLISHED.get((config.dataset, config.partition))
    if config.partition_by != "every_kth" or expected is None:
        return []
    if names_hash(names) == expected:
        return [Finding("ok", _named(config), "equals the published CPS list")]
    detail = f"not the published CPS list, so results do not compare with published ones; {_OTHERWISE[config.dataset]}"
    return [Finding("warn", _named(config), detail)]


def _findings(role: _Role) -> list[Finding]:
    """Its faults and warnings, and one line of what is in order."""
    faults = [
        _fault(role, [look for look in role.looks if look.broken_image], "not readable", _first(role, "broken_image")),
        _label_fault(role, [look for look in role.looks if look.broken_label], "no label image", _first(role, "broken_label")),
        _sizes(role),
        _values(role),
    ]
    found = [fault for fault in faults if fault]
    warnings = _warnings(role) if role.labeled and role.needs_labels else []
    sound = [] if found or not role.looks else [Finding("ok", role.what, _sound(role))]
    return [*sound, *found, *(Finding("warn", role.what, warning) for warning in warnings)]


def _first(role: _Role, kind: Literal["broken_image", "broken_label"]) -> str:
    texts = [look.broken_image if kind == "broken_image" else look.broken_label for look in role.looks]
    return next((text for text in texts if text), "")


def _fault(role: _Role, looks: Sequence[FileStatistics], what: str, example: str) -> Finding | None:
    if not looks:
        return None
    return Finding("fault", role.what, f"{len(looks)} of {len(role.looks)} {what}: {some(look.name for look in looks)}; {example}")


def _label_fault(role: _Role, looks: Sequence[FileStatistics], what: str, example: str) -> Finding | None:
    advice = "" if role.needs_labels else "; mend the masks, or simply remove them: unlabelled images need none"
    return _fault(role, looks, what, example + advice)


def _sizes(role: _Role) -> Finding | None:
    wrong = [look for look in role.looks if look.size and look.label_size and look.size != look.label_size]
    example = f"{wrong[0].label}: {_size(wrong[0].label_size)}, but its image is {_size(wrong[0].size)}" if wrong else ""
    return _label_fault(role, wrong, "labels differ in size from their images", example)


def _values(role: _Role) -> Finding | None:
    refused = np.flatnonzero(role.table == REFUSED)
    wrong = [look for look in role.labeled if any(look.counts[value] for value in refused)]
    example = _refusal(wrong[0].label, role.table) if wrong and wrong[0].label else ""
    return _label_fault(role, wrong, "labels hold values that mean nothing", example)


def _refusal(file: Path, table: NDArray[np.int16]) -> str:
    """What training would say of the file."""
    try:
        read_label(file, table)
    except ValueError as error:
        return str(error)
    return f"{file}: changed while it was looked at"


def _sound(role: _Role) -> str:
    if not role.labeled:
        return f"{len(role.looks)} images are there"
    if not role.needs_labels:
        return f"{len(role.looks)} images are there, {len(role.labeled)} with labels, which only diagnostics read"
    kinds = [look.kind for look in role.labeled if look.kind]
    told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "made up"
    return f"{len(role.looks)} images with labels ({told}) of {allowed(role.table)}, {100 * _void_share(role):.1f} % of the pixels void"


def _warnings(role: _Role) -> Iterator[str]:
    """What the labels hold too much or too little of."""
    if (share := _void_share(role)) > MUCH_VOID:
        yield f"{100 * share:.1f} % of the label pixels are void; only the rest is learnt from or counted: is a class missing?"
    totals = _totals(role)
    if empty := [look.name for look, pixels in zip(role.labeled, totals, strict=True) if 0 < pixels[VOID] == pixels.sum()]:
        yield f"{len(empty)} of {len(role.labeled)} labels are wholly void: {some(empty)}; they teach or test nothing"
    if missing := [name for k, name in enumerate(role.classes) if not totals[:, k].any()]:
        yield f"{len(missing)} of {len(role.classes)} classes do not occur: {', '.join(missing)}"
    yield from _mixtures(role)


def _mixtures(role: _Role) -> Iterator[str]:
    """Folders that hold palette and grey files. Both are read alike, but they are two sources, of which one may be converted wrongly."""
    for folder in dict.fromkeys(look.label.parent for look in role.labeled if look.label):
        inside = [look for look in role.labeled if look.label and look.label.parent == folder]
        few, other = sorted(([look for look in inside if look.kind == kind] for kind in ("grey", "palette")), key=len)
        if few:
            names = some(look.name for look in few)
            yield f"{folder}: {len(few)} {few[0].kind} label files among {len(other)} {other[0].kind} ones: {names}; do both mean the same?"


def _void_share(role: _Role) -> float:
    totals = _totals(role)
    return float(totals[:, VOID].sum() / max(1, totals.sum()))


def _totals(role: _Role) -> NDArray[np.int64]:
    """Pixels of each label file by what they mean, (files, 256): classes and 255; values that mean nothing are left out."""
    totals = np.zeros((len(role.labeled), 256), np.int64)
    counts = np.array([look.counts for look in role.labeled])
    for value in np.flatnonzero(role.table != REFUSED):
        totals[:, role.table[value]] += counts[:, value]
    return totals


def _padding(config: TrainConfig, looks: Iterable[FileStatistics]) -> Finding:
    """How much of a training crop lies outside the images, as a mean over the images and `config.scales`."""
    sizes = np.array([look.size for look in looks if look.size], np.float64).reshape(-1, 2)
    scaled = np.floor(sizes[:, None] * np.array(config.scales)[:, None])  # (images, scales, 2)
    filled = (np.minimum(scaled, config.crop) / config.crop).prod(axis=-1)
    small = int((sizes.min(axis=1) < config.crop).sum())
    share = 100 * (1 - filled.mean()) if len(sizes) else 0.0
    text = f"{small} of {len(sizes)} images are smaller than the crop of {config.crop}; on average {share:.0f} % of a crop is padding"
    return Finding("ok", f"{config.dataset} crop {config.crop}", text)


def _named(config: TrainConfig) -> str:
    drawn = {"every_kth": "", "list": " list"}.get(config.partition_by, f" {config.partition_by} {config.partition_seed}")
    return f"{config.dataset} {config.partition}{drawn}"


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "unknown"
