"""Checks all files of a data set before training, and reports every fault at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.dataset import DataSet, open_dataset, open_layout, split_indices
from rrn_core.data.file_statistics import FileStatistics, Progress, StatisticsCache, StatisticsReader
from rrn_core.data.files import REFUSED, VOID, allowed_values, plain_table, read_label
from rrn_core.data.lists import first_few
from rrn_core.data.published import PUBLISHED, names_hash
from rrn_core.errors import ConfigError, DataError

__all__ = ["Finding", "Level", "StatisticsCache", "inspect_data"]

Level = Literal["ok", "warn", "fault"]

MUCH_VOID = 0.5
"""Share of void pixels above which there is a warning."""


@dataclass(frozen=True)
class Finding:
    """One line of the report. A `fault` stops training or makes its result wrong, a `warn` may be intended, an `ok` informs."""

    level: Level
    what: str
    """What was checked."""
    detail: str
    """What was found."""


_UNPUBLISHED_BECAUSE = {
    "voc": "usual reason: the labelled images were not chosen from the 10582 images of train_aug, because labels of SBD are missing "
    "or train_list names another list",
    "cityscapes": "usual reason: CPS's train.txt, whose order decides, is missing; copy it into data_root, or set train_list to it",
}
"""The usual reason why a partition by `every_kth` is not the published one."""


@dataclass(frozen=True)
class _Role:
    """The images that a run uses in one role, and the meaning of their label values."""

    what: str
    """Name of the role in the report."""
    files: list[FileStatistics]
    table: NDArray[np.int16]
    """The label table, (256,)."""
    classes: tuple[str, ...]
    needs_labels: bool = True
    """Whether training or evaluation uses the labels. If not, only diagnostics read those that exist."""

    @property
    def labeled(self) -> list[FileStatistics]:
        """The files with a readable label."""
        return [file for file in self.files if file.counts]


def inspect_data(
    config: TrainConfig, runtime: Runtime, *, cache: StatisticsCache | None = None, progress: Progress | None = None
) -> list[Finding]:
    """Check every image that a run of `config` would use, and every label file.

    Label files of unlabelled images are checked too: training reads those that exist for diagnostics, and fails if one is damaged. Every
    file is decoded completely. Faults are not raised: each is a finding.

    Args:
        cache: statistics from earlier inspections; those of this one are added. Configurations of a sweep share most files.
        progress: see `Progress`.
    """
    try:
        data = open_dataset(config, runtime.model_copy(update={"cache_images": False}))
        labeled, unlabeled = split_indices(config, data)
        table = plain_table(len(data.classes)) if config.dataset == "digits" else open_layout(config, runtime).table
    except (DataError, ConfigError, OSError) as error:
        return [Finding("fault", _partition_name(config), " ".join(str(error).split()))]
    roles = _roles(config, data, labeled, unlabeled, table, StatisticsReader({} if cache is None else cache, progress))
    counts = f"{len(labeled)} labelled, {len(unlabeled)} unlabelled, {len(data.val)} validation images"
    findings = [Finding("ok", _partition_name(config), counts), *_published(config, [data.train.names[i] for i in labeled])]
    for role in roles:
        findings += _findings(role)
    return [*findings, _padding(config, [file for role in roles[:2] for file in role.files])]


def _roles(
    config: TrainConfig,
    data: DataSet,
    labeled: Sequence[int],
    unlabeled: Sequence[int],
    table: NDArray[np.int16],
    reader: StatisticsReader,
) -> list[_Role]:
    """The roles labelled, unlabelled and validation."""
    # in a full partition the unlabelled images are the labelled ones
    only_unlabeled = sorted(set(unlabeled) - set(labeled))
    reader.expect(len(labeled) + len(only_unlabeled) + len(data.val))
    partition, classes = _partition_name(config), data.classes
    return [
        _Role(f"{partition} labelled", reader.read(data.train, labeled), table, classes),
        _Role(f"{partition} unlabelled", reader.read(data.train, only_unlabeled), table, classes, needs_labels=False),
        _Role(f"{config.dataset} validation", reader.read(data.val, range(len(data.val))), table, classes),
    ]


def _published(config: TrainConfig, names: Sequence[str]) -> list[Finding]:
    """Whether a partition by `every_kth` equals the published one, if there is one."""
    expected = PUBLISHED.get((config.dataset, config.partition))
    if config.partition_by != "every_kth" or expected is None:
        return []
    if names_hash(names) == expected:
        return [Finding("ok", _partition_name(config), "equals the published CPS list")]
    reason = _UNPUBLISHED_BECAUSE[config.dataset]
    detail = f"not the published CPS list, so results cannot be compared with published ones; {reason}"
    return [Finding("warn", _partition_name(config), detail)]


def _findings(role: _Role) -> list[Finding]:
    """The faults and warnings of a role, and one line if it has no fault."""
    faults = (_broken_images(role), _broken_labels(role), _wrong_sizes(role), _wrong_values(role))
    found = [fault for fault in faults if fault]
    warnings = _warnings(role) if role.labeled and role.needs_labels else []
    summary = [] if found or not role.files else [Finding("ok", role.what, _summary(role))]
    return [*summary, *found, *(Finding("warn", role.what, warning) for warning in warnings)]


def _broken_images(role: _Role) -> Finding | None:
    broken = [file for file in role.files if file.image_fault]
    return _fault(role, broken, "not readable", (broken[0].image_fault or "") if broken else "")


def _broken_labels(role: _Role) -> Finding | None:
    broken = [file for file in role.files if file.label_fault]
    return _label_fault(role, broken, "no label image", (broken[0].label_fault or "") if broken else "")


def _fault(role: _Role, files: Sequence[FileStatistics], what: str, example: str) -> Finding | None:
    """A fault that some files of a role share; None if there are no such files."""
    if not files:
        return None
    return Finding("fault", role.what, f"{len(files)} of {len(role.files)} {what}: {first_few(file.name for file in files)}; {example}")


def _label_fault(role: _Role, files: Sequence[FileStatistics], what: str, example: str) -> Finding | None:
    advice = "" if role.needs_labels else "; correct the masks or remove them: unlabelled images need none"
    return _fault(role, files, what, example + advice)


def _wrong_sizes(role: _Role) -> Finding | None:
    wrong = [file for file in role.files if file.size and file.label_size and file.size != file.label_size]
    example = f"{wrong[0].label}: {_size(wrong[0].label_size)}, but its image is {_size(wrong[0].size)}" if wrong else ""
    return _label_fault(role, wrong, "labels differ in size from their images", example)


def _wrong_values(role: _Role) -> Finding | None:
    refused = np.flatnonzero(role.table == REFUSED)
    wrong = [file for file in role.labeled if any(file.counts[value] for value in refused)]
    example = _refusal(wrong[0].label, role.table) if wrong and wrong[0].label else ""
    return _label_fault(role, wrong, "labels hold values that are not allowed", example)


def _refusal(file: Path, table: NDArray[np.int16]) -> str:
    """The error that training would raise for the label file."""
    try:
        read_label(file, table)
    except DataError as error:
        return str(error)
    return f"{file}: changed during the check"


def _summary(role: _Role) -> str:
    if not role.labeled:
        return f"{len(role.files)} images"
    if not role.needs_labels:
        return f"{len(role.files)} images, {len(role.labeled)} with labels, which only diagnostics read"
    kinds = [file.kind for file in role.labeled if file.kind]
    sources = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)) or "generated"
    values = allowed_values(role.table)
    return f"{len(role.files)} images with labels ({sources}) of {values}, {100 * _void_share(role):.1f} % of the pixels void"


def _warnings(role: _Role) -> Iterator[str]:
    """Properties of the labels that may not be intended."""
    if (share := _void_share(role)) > MUCH_VOID:
        yield f"{100 * share:.1f} % of the label pixels are void; only the rest is trained or evaluated: is a class missing?"
    totals = _totals(role)
    if void := [file.name for file, pixels in zip(role.labeled, totals, strict=True) if 0 < pixels[VOID] == pixels.sum()]:
        yield f"{len(void)} of {len(role.labeled)} labels are wholly void: {first_few(void)}; they have no effect"
    if missing := [name for k, name in enumerate(role.classes) if not totals[:, k].any()]:
        yield f"{len(missing)} of {len(role.classes)} classes do not occur: {', '.join(missing)}"
    yield from _mixtures(role)


def _mixtures(role: _Role) -> Iterator[str]:
    """Folders with both palette and grey files. Both are read alike, but they come from two sources, and one may be converted wrongly."""
    for folder in dict.fromkeys(file.label.parent for file in role.labeled if file.label):
        inside = [file for file in role.labeled if file.label and file.label.parent == folder]
        few, other = sorted(([file for file in inside if file.kind == kind] for kind in ("grey", "palette")), key=len)
        if few:
            names = first_few(file.name for file in few)
            counts = f"{len(few)} {few[0].kind} label files among {len(other)} {other[0].kind} ones"
            yield f"{folder}: {counts}: {names}; check that the values of both have the same meaning"


def _void_share(role: _Role) -> float:
    totals = _totals(role)
    return float(totals[:, VOID].sum() / max(1, totals.sum()))


def _totals(role: _Role) -> NDArray[np.int64]:
    """Number of pixels of each class and of void (255) in each label file, (files, 256). Values that are not allowed are left out."""
    totals = np.zeros((len(role.labeled), 256), np.int64)
    counts = np.array([file.counts for file in role.labeled])
    for value in np.flatnonzero(role.table != REFUSED):
        totals[:, role.table[value]] += counts[:, value]
    return totals


def _padding(config: TrainConfig, files: Iterable[FileStatistics]) -> Finding:
    """The share of a training crop outside the image, as a mean over the images and `config.scales`."""
    sizes = np.array([file.size for file in files if file.size], np.float64).reshape(-1, 2)
    scaled = np.floor(sizes[:, None] * np.array(config.scales)[:, None])  # (images, scales, 2)
    filled = (np.minimum(scaled, config.crop) / config.crop).prod(axis=-1)
    small = int((sizes.min(axis=1) < config.crop).sum())
    share = 100 * (1 - filled.mean()) if len(sizes) else 0.0
    text = f"{small} of {len(sizes)} images are smaller than the crop of {config.crop}; on average {share:.0f} % of a crop is padding"
    return Finding("ok", f"{config.dataset} crop {config.crop}", text)


def _partition_name(config: TrainConfig) -> str:
    rule = {"every_kth": "", "list": " list"}.get(config.partition_by, f" {config.partition_by} {config.partition_seed}")
    return f"{config.dataset} {config.partition}{rule}"


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "unknown"
