"""Checks all files of a data set before training, and reports every fault at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data.augment import size_fault
from rrn_core.data.dataset import DataSet, Images, open_files, open_layout, split_indices
from rrn_core.data.file_statistics import FileStatistics, Progress, StatisticsCache, StatisticsReader
from rrn_core.data.labels import VOID, Legend, allowed_values, plain_table, read_label
from rrn_core.data.lists import first_few
from rrn_core.data.palettes import disagreement
from rrn_core.data.published import PUBLISHED, names_hash
from rrn_core.errors import ConfigError, DataError

__all__ = ["Finding", "Level", "StatisticsCache", "inspect_data"]

Level = Literal["ok", "warn", "fault"]

MUCH_VOID = 0.5
"""Share of void pixels above which there is a warning."""
NEARLY_BLACK = 32
"""There is a warning about images of which 99 % of the values, in 0..255, are not above this one."""


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
    legend: Legend
    classes: tuple[str, ...]
    needs_labels: bool = True
    """Whether training or evaluation uses the labels. If not, only diagnostics read those that exist."""
    complete: bool = True
    """Whether `files` are all files of the role, not a sample."""
    config: TrainConfig | None = None
    """The configuration if the images of the role are augmented, else None."""

    @property
    def labeled(self) -> list[FileStatistics]:
        """The files with a readable label."""
        return [file for file in self.files if file.counts]


def inspect_data(
    config: TrainConfig,
    runtime: Runtime,
    *,
    cache: StatisticsCache | None = None,
    progress: Progress | None = None,
    sample: int | None = None,
) -> list[Finding]:
    """Check every image that a run of `config` would use, and every label file. Every file is decoded completely.

    Faults are not raised: each is a finding. A label file of an unlabelled image that cannot be used is a warning, because only diagnostics
    read it.

    Args:
        cache: statistics from earlier inspections; those of this one are added. Configurations of a sweep share most files.
        progress: see `Progress`.
        sample: the number of labelled and of validation images to look at, spread evenly. Unset: all, and the unlabelled ones.
    """
    try:
        data = open_files(config, runtime)
        labeled, unlabeled = split_indices(config, data)
        layout = None if config.dataset == "digits" else open_layout(config, runtime)
        unused = list(layout.unused()) if layout else []
    except (DataError, ConfigError, OSError) as error:
        return [Finding("fault", _partition_name(config), " ".join(str(error).split()))]
    legend = layout.legend if layout else Legend(plain_table(len(data.classes)))
    roles = _roles(config, data, labeled, unlabeled, legend, StatisticsReader({} if cache is None else cache, progress), sample)
    counts = f"{len(labeled)} labelled, {len(unlabeled)} unlabelled, {len(data.val)} validation images"
    findings = [Finding("ok", _partition_name(config), counts), *_published(config, [data.train.names[i] for i in labeled])]
    findings += [Finding("warn", f"{config.dataset} files", line) for line in unused]
    for role in roles:
        findings += _findings(role)
    findings += _together(config, roles, layout.bits if layout else None)
    return [*findings, _padding(config, [file for role in roles[:2] for file in role.files])]


def _roles(
    config: TrainConfig,
    data: DataSet,
    labeled: Sequence[int],
    unlabeled: Sequence[int],
    legend: Legend,
    reader: StatisticsReader,
    sample: int | None,
) -> list[_Role]:
    """The roles labelled, unlabelled and validation."""
    # in a full partition the unlabelled images are the labelled ones
    only_unlabeled = [] if sample else sorted(set(unlabeled) - set(labeled))
    if sample is None:
        reader.expect(len(labeled) + len(only_unlabeled) + len(data.val))
    partition, classes = _partition_name(config), data.classes

    def role(what: str, images: Images, indices: Sequence[int], *, needs_labels: bool = True, augmented: bool = True) -> _Role:
        chosen = _spread(indices, sample) if sample else indices
        files = reader.read(images, chosen)
        if len(chosen) < len(indices) and not any(_has_class(file) for file in files):
            chosen, files = indices, reader.read(images, indices)  # whether there is any labelled pixel is not answered by a sample
        return _Role(what, files, legend, classes, needs_labels, len(chosen) == len(indices), config if augmented else None)

    return [
        role(f"{partition} labelled", data.train, labeled),
        role(f"{partition} unlabelled", data.train, only_unlabeled, needs_labels=False),
        role(f"{config.dataset} validation", data.val, range(len(data.val)), augmented=False),
    ]


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices at equal distances."""
    return [indices[k * len(indices) // count] for k in range(count)] if len(indices) > count else list(indices)


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
    faults = (_broken_images(role), _too_small(role), _broken_labels(role), _wrong_sizes(role), _wrong_values(role), _nothing_labeled(role))
    found = [fault for fault in faults if fault]
    warnings = [*_image_warnings(role), *(_label_warnings(role) if role.labeled and role.needs_labels else [])]
    summary = [] if found or not role.files else [Finding("ok", role.what, _summary(role))]
    return [*summary, *found, *(Finding("warn", role.what, warning) for warning in warnings)]


def _together(config: TrainConfig, roles: Sequence[_Role], bits_stated: int | None) -> Iterator[Finding]:
    """Findings about the label files of all roles."""
    files = [file for role in roles if role.needs_labels for file in role.files]
    used = ((file.label, file.colours, file.palette) for file in files if file.label and file.palette)
    if text := disagreement(used):
        yield Finding("fault", f"{config.dataset} palettes", text)
    values = frozenset[int]().union(*(file.values for file in files))
    if line := roles[0].legend.values_line(values):
        counted = f"the masks hold the values {first_few(map(str, sorted(values)), 8)}"
        names = first_few(roles[0].classes)
        yield Finding(
            "warn", f"{config.dataset} values", f"{counted}; if these are the classes {names} in order, write {line} into dataset.yaml"
        )
    bits = Counter(file.bits for role in roles for file in role.files if file.bits)
    if config.dataset == "folder" and len(bits) > 1 and bits_stated is None:
        text = f"16-bit images need {min(bits)} to {max(bits)} bits, and each is scaled by its own range"
        yield Finding("warn", f"{config.dataset} bits", f"{text}; to scale all alike, write `bits: {max(bits)}` into dataset.yaml")


def _broken_images(role: _Role) -> Finding | None:
    broken = [file for file in role.files if file.image_fault]
    return _fault(role, broken, "not readable", (broken[0].image_fault or "") if broken else "")


def _too_small(role: _Role) -> Finding | None:
    if role.config is None:
        return None
    faults = {file: size_fault(file.size[::-1], role.config) for file in role.files if file.size}
    small = [file for file, fault in faults.items() if fault]
    return _fault(role, small, "images are too small", f"{small[0].name}: {faults[small[0]]}" if small else "")


def _nothing_labeled(role: _Role) -> Finding | None:
    """Whether no label has a pixel of a class, so that nothing can be trained or evaluated."""
    if not role.labeled or not role.needs_labels or any(map(_has_class, role.labeled)) or any(file.refused for file in role.labeled):
        return None
    names = first_few(file.name for file in role.labeled)
    detail = f"none of the {len(role.labeled)} labels has a pixel of a class, all are void: {names}; correct the masks or list other images"
    return Finding("fault", role.what, detail)


def _has_class(file: FileStatistics) -> bool:
    return any(file.counts[:VOID])


def _broken_labels(role: _Role) -> Finding | None:
    broken = [file for file in role.files if file.label_fault]
    return _label_fault(role, broken, "no label image", (broken[0].label_fault or "") if broken else "")


def _fault(role: _Role, files: Sequence[FileStatistics], what: str, example: str) -> Finding | None:
    """A fault that some files of a role share; None if there are no such files."""
    if not files:
        return None
    return Finding("fault", role.what, f"{len(files)} of {len(role.files)} {what}: {first_few(file.name for file in files)}; {example}")


def _label_fault(role: _Role, files: Sequence[FileStatistics], what: str, example: str) -> Finding | None:
    if role.needs_labels or not files:
        return _fault(role, files, what, example)
    found = _fault(role, files, what, f"{example}; diagnostics leave them out, because these images are unlabelled in this partition")
    return replace(found, level="warn") if found else None


def _wrong_sizes(role: _Role) -> Finding | None:
    wrong = [file for file in role.files if file.size and file.label_size and file.size != file.label_size]
    example = f"{wrong[0].label}: {_size(wrong[0].label_size)}, but its image is {_size(wrong[0].size)}" if wrong else ""
    return _label_fault(role, wrong, "labels differ in size from their images", example)


def _wrong_values(role: _Role) -> Finding | None:
    wrong = [file for file in role.labeled if file.refused]
    example = _refusal(wrong[0].label, role.legend) if wrong and wrong[0].label else ""
    return _label_fault(role, wrong, "labels hold values that are not allowed", example)


def _refusal(file: Path, legend: Legend) -> str:
    """The error that training would raise for the label file."""
    try:
        read_label(file, legend)
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
    values = allowed_values(role.legend.table)
    return f"{len(role.files)} images with labels ({sources}) of {values}, {100 * _void_share(role):.1f} % of the pixels void"


def _image_warnings(role: _Role) -> Iterator[str]:
    """Properties of the images that may not be intended."""
    if black := [file for file in role.files if file.brightness <= NEARLY_BLACK]:
        counted = f"{len(black)} of {len(role.files)} images are nearly black: {first_few(file.name for file in black)}"
        deep = "; if these 16-bit images have fewer bits, write `bits: 12`, or how many they have, into dataset.yaml"
        yield f"{counted}; 99 % of their values are at most {max(file.brightness for file in black)} of 255{deep if black[0].bits else ''}"
    if turned := [file for file in role.files if file.orientation > 1 and file.label]:
        counted = (
            f"{len(turned)} of {len(role.files)} images are turned by their EXIF orientation: {first_few(file.name for file in turned)}"
        )
        yield f"{counted}; their masks are turned alike, unless only the turned image has their size; check that masks are of stored pixels"


def _label_warnings(role: _Role) -> Iterator[str]:
    """Properties of the labels that may not be intended."""
    if (share := _void_share(role)) > MUCH_VOID:
        yield f"{100 * share:.1f} % of the label pixels are void; only the rest is trained or evaluated: is a class missing?"
    totals = _totals(role)
    if void := [file.name for file, pixels in zip(role.labeled, totals, strict=True) if 0 < pixels[VOID] == pixels.sum()]:
        yield f"{len(void)} of {len(role.labeled)} labels are wholly void: {first_few(void)}; they have no effect"
    if missing := [name for k, name in enumerate(role.classes) if role.complete and not totals[:, k].any()]:
        yield f"{len(missing)} of {len(role.classes)} classes do not occur: {first_few(missing)}"
    yield from _mixtures(role)


def _mixtures(role: _Role) -> Iterator[str]:
    """Folders whose files are read in two ways: they come from two sources, and one may be converted wrongly."""
    for folder in dict.fromkeys(file.label.parent for file in role.labeled if file.label):
        inside = [file for file in role.labeled if file.label and file.label.parent == folder]
        few, other = sorted(([file for file in inside if file.kind == kind] for kind in ("grey", "palette")), key=len)
        if few:
            names = first_few(file.name for file in few)
            counts = f"{len(few)} {few[0].kind} label files among {len(other)} {other[0].kind} ones"
            yield f"{folder}: {counts}: {names}; check that the values of both have the same meaning"
        by_value, by_colour = ([file for file in inside if file.kind == "colour" and bool(file.values) == plain] for plain in (True, False))
        if by_value and by_colour:
            counts = f"{len(by_colour)} RGB masks are read by their colours, {len(by_value)} as grey values"
            yield f"{folder}: {counts}: {first_few(file.name for file in by_value)}; save all masks as grey values"


def _void_share(role: _Role) -> float:
    totals = _totals(role)
    return float(totals[:, VOID].sum() / max(1, totals.sum()))


def _totals(role: _Role) -> NDArray[np.int64]:
    """Number of pixels of each class and of void (255) in each label file, (files, 256)."""
    return np.array([file.counts for file in role.labeled], np.int64).reshape(-1, 256)


def _padding(config: TrainConfig, files: Iterable[FileStatistics]) -> Finding:
    """The share of a training crop outside the image, as a mean over the images and `config.scales`."""
    sizes = np.array([file.size for file in files if file.size], np.float64).reshape(-1, 2)
    scaled = np.floor(sizes[:, None] * np.array(config.scales)[:, None])  # (images, scales, 2)
    filled = (np.minimum(scaled, config.crop) / config.crop).prod(axis=-1)
    small = int((sizes.min(axis=1, initial=np.inf) < config.crop).sum())
    share = 100 * (1 - filled.mean()) if len(sizes) else 0.0
    text = f"{small} of {len(sizes)} images are smaller than the crop of {config.crop}; on average {share:.0f} % of a crop is padding"
    return Finding("ok", f"{config.dataset} crop {config.crop}", text)


def _partition_name(config: TrainConfig) -> str:
    rule = {"every_kth": "", "list": " list"}.get(config.partition_by, f" {config.partition_by} {config.partition_seed}")
    return f"{config.dataset} {config.partition}{rule}"


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "unknown"
