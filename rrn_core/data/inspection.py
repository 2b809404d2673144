"""Looks at the files of a data set before anything is trained on them, and tells every fault at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rrn_core.config import Runtime, TrainConfig
from rrn_core.data import DataSet, Images, open_dataset, open_layout, split_indices
from rrn_core.data.files import REFUSED, VOID, Files, Record, allowed, plain_table, raw_label, read_label
from rrn_core.data.lists import some

Progress = Callable[[int, int], None]
"""Called with the number of files looked at so far, and of all of them."""

Level = Literal["ok", "warn", "fault"]

MUCH_VOID = 0.5
"""Above this share of void pixels a role is warned about."""

_THREADS = min(8, os.cpu_count() or 1)
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Finding:
    """One line of an inspection. A `fault` stops training or spoils its result, a `warn` may be meant, `ok` informs."""

    level: Level
    what: str
    detail: str


@dataclass(frozen=True)
class Look:
    """What one image and its label file show. Sizes are (width, height)."""

    name: str
    label: Path | None = None
    size: tuple[int, int] | None = None
    label_size: tuple[int, int] | None = None
    kind: str = ""
    """How the label file stores its values: `grey`, `palette`, `mat`; empty where it was not read."""
    counts: tuple[int, ...] = ()
    """Pixels of each of the 256 values in the label file."""
    broken_image: str | None = None
    broken_label: str | None = None


Looks = dict[tuple[Record, bool], Look]
"""What was seen, by files and whether the label was read."""


@dataclass(frozen=True)
class _Role:
    """The images that a run uses in one way, with what their label values mean."""

    what: str
    looks: list[Look]
    table: NDArray[np.int16]
    classes: tuple[str, ...]

    @property
    def labeled(self) -> list[Look]:
        return [look for look in self.looks if look.counts]


def inspect_data(config: TrainConfig, runtime: Runtime, *, looks: Looks | None = None, progress: Progress | None = None) -> list[Finding]:
    """Look at every image that a run of `config` would use, and at the labels of the labelled and the validation images.

    Of an image only the header is read; the labels of unlabelled images are never opened. No fault is raised: each is a finding.

    Args:
        looks: files that an earlier inspection looked at; those of this one are added. Configurations of a sweep share most files.
    """
    try:
        data = open_dataset(config, runtime.model_copy(update={"cache_images": False}))
        labeled, unlabeled = split_indices(config, data)
        table = plain_table(len(data.classes)) if config.dataset == "digits" else open_layout(config, runtime).table
    except (ValueError, OSError) as error:
        return [Finding("fault", _named(config), " ".join(str(error).split()))]
    roles = _roles(config, data, labeled, unlabeled, table, _Eyes({} if looks is None else looks, progress))
    counts = f"{len(labeled)} labelled, {len(unlabeled)} unlabelled, {len(data.val)} validation images"
    findings = [Finding("ok", _named(config), counts)]
    for role in roles:
        findings += _findings(role)
    return [*findings, _padding(config, [look for role in roles[:2] for look in role.looks])]


def _roles(
    config: TrainConfig, data: DataSet, labeled: Sequence[int], unlabeled: Sequence[int], table: NDArray[np.int16], eyes: _Eyes
) -> list[_Role]:
    """Labelled, unlabelled, validation."""
    # in a full partition the unlabelled images are the labelled ones
    hidden = sorted(set(unlabeled) - set(labeled))
    eyes.expect(len(labeled) + len(hidden) + len(data.val))
    partition, classes = _named(config), data.classes
    return [
        _Role(f"{partition} labelled", eyes.look(data.train, labeled, with_labels=True), table, classes),
        _Role(f"{partition} unlabelled", eyes.look(data.train, hidden, with_labels=False), table, classes),
        _Role(f"{config.dataset} validation", eyes.look(data.val, range(len(data.val)), with_labels=True), table, classes),
    ]


class _Eyes:
    """Looks at many images in threads, at each once, and tells how far it is."""

    def __init__(self, looks: Looks, progress: Progress | None) -> None:
        self._looks, self._progress = looks, progress
        self._done = self._total = 0

    def expect(self, total: int) -> None:
        self._total = total

    def look(self, images: Images, indices: Sequence[int], *, with_labels: bool) -> list[Look]:
        if not isinstance(images, Files):
            return [self._told(_scene_look(images, index, with_label=with_labels)) for index in indices]
        wanted = [(images.records[index], with_labels) for index in indices]
        fresh = [key for key in wanted if key not in self._looks]
        self._advance(len(wanted) - len(fresh))
        with ThreadPoolExecutor(_THREADS) as pool:
            pending = {pool.submit(_file_look, record, with_label=with_label): (record, with_label) for record, with_label in fresh}
            for done in as_completed(pending):
                self._looks[pending[done]] = self._told(done.result())
        return [self._looks[key] for key in wanted]

    def _told(self, look: Look) -> Look:
        self._advance(1)
        return look

    def _advance(self, count: int) -> None:
        self._done += count
        if self._progress and count:
            self._progress(self._done, self._total)


def _scene_look(images: Images, index: int, *, with_label: bool) -> Look:
    """Of an image that has no file."""
    image, label = images[index]
    return Look(images.names[index], size=(image.shape[1], image.shape[0]), counts=_counts(label) if with_label else ())


def _file_look(record: Record, *, with_label: bool) -> Look:
    size, kind, label_size, counts = None, "", None, tuple[int, ...]()
    broken_image = broken_label = None
    try:
        size = _image_size(record.image)
    except ValueError as error:
        broken_image = str(error)
    if with_label and record.label is not None:
        try:
            values = raw_label(record.label)
            kind, label_size, counts = _kind(record.label), (values.shape[1], values.shape[0]), _counts(values)
        except (ValueError, OSError) as error:
            broken_label = str(error)
    return Look(record.name, record.label, size, label_size, kind, counts, broken_image, broken_label)


def _image_size(file: Path) -> tuple[int, int]:
    """As training decodes it: a photograph is turned as its header says."""
    try:
        with Image.open(file) as image:
            turned = image.format == "JPEG" and image.getexif().get(_ORIENTATION) in _TURNED
            return (image.height, image.width) if turned else (image.width, image.height)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{file}: not a readable image") from error


def _kind(file: Path) -> str:
    if file.suffix == ".mat":
        return "mat"
    with Image.open(file) as image:
        return "palette" if image.mode == "P" else "grey"


def _counts(values: NDArray[np.uint8]) -> tuple[int, ...]:
    return tuple(np.bincount(values.ravel(), minlength=256).tolist())


def _findings(role: _Role) -> list[Finding]:
    """Its faults and warnings, and one line of what is in order."""
    faults = [
        _fault(role, [look for look in role.looks if look.broken_image], "not readable", _first(role, "broken_image")),
        _fault(role, [look for look in role.looks if look.broken_label], "no label image", _first(role, "broken_label")),
        _sizes(role),
        _values(role),
        *_mixtures(role),
    ]
    found = [fault for fault in faults if fault]
    warnings = _warnings(role) if role.labeled else []
    sound = [] if found or not role.looks else [Finding("ok", role.what, _sound(role))]
    return [*sound, *found, *(Finding("warn", role.what, warning) for warning in warnings)]


def _first(role: _Role, kind: Literal["broken_image", "broken_label"]) -> str:
    texts = [look.broken_image if kind == "broken_image" else look.broken_label for look in role.looks]
    return next((text for text in texts if text), "")


def _fault(role: _Role, looks: Sequence[Look], what: str, example: str) -> Finding | None:
    if not looks:
        return None
    return Finding("fault", role.what, f"{len(looks)} of {len(role.looks)} {what}: {some(look.name for look in looks)}; {example}")


def _sizes(role: _Role) -> Finding | None:
    wrong = [look for look in role.looks if look.size and look.label_size and look.size != look.label_size]
    example = f"{wrong[0].label}: {_size(wrong[0].label_size)}, but its image is {_size(wrong[0].size)}" if wrong else ""
    return _fault(role, wrong, "labels differ in size from their images", example)


def _values(role: _Role) -> Finding | None:
    refused = np.flatnonzero(role.table == REFUSED)
    wrong = [look for look in role.labeled if any(look.counts[value] for value in refused)]
    example = _refusal(wrong[0].label, role.table) if wrong and wrong[0].label else ""
    return _fault(role, wrong, "labels hold values that mean nothing", example)


def _refusal(file: Path, table: NDArray[np.int16]) -> str:
    """What training would say of the file."""
    try:
        read_label(file, table)
    except ValueError as error:
        return str(error)
    return f"{file}: changed while it was looked at"


def _mixtures(role: _Role) -> list[Finding]:
    """Folders that hold palette and grey files: two sources, of which one was probably converted wrongly."""
    folders = dict.fromkeys(look.label.parent for look in role.labeled if look.label)
    return [finding for folder in folders if (finding := _mixture(role, folder))]


def _mixture(role: _Role, folder: Path) -> Finding | None:
    inside = [look for look in role.labeled if look.label and look.label.parent == folder]
    grey, palette = ([look for look in inside if look.kind == kind] for kind in ("grey", "palette"))
    if not (grey and palette):
        return None
    few, other = sorted([grey, palette], key=len)
    detail = f"{folder}: {len(few)} {few[0].kind} label files among {len(other)} {other[0].kind} ones: {some(look.name for look in few)}"
    return Finding("fault", role.what, f"{detail}; write all in one way")


def _sound(role: _Role) -> str:
    if not role.labeled:
        return f"{len(role.looks)} images are there"
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


def _padding(config: TrainConfig, looks: Iterable[Look]) -> Finding:
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
