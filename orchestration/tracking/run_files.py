"""The files that MLflow shows of a trial: its settings, where it ran, its predictions, its confusions, its IoU of every class."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from orchestration.errors import Corrupt
from orchestration.record.manifest import SCORE, Attempt, EpochMetrics, EpochPictures, Manifest, ObjectRef, sha256_of
from orchestration.store.base import Store

IMAGES = "images"
"""MLflow's folder for pictures of several steps."""
CONFIG, IOU = "config.yaml", "iou_per_class.json"
PREDICTIONS, CONFUSION_TABLE, CONFUSION_MAP = "predictions.png", "confusion.json", "confusion.png"
_ATTEMPTS = "attempts"
_HEADS = ("branch1", "branch2", "ensemble")
_THUMBNAIL = 1024  # longest side in pixels
_LONGEST_CODE = 2**20  # characters
_ANNOTATED = 16  # classes up to which every cell of a heat map has its number

Fetch = Callable[[ObjectRef], bytes]
"""An object of the store, intact. Raises SweepError."""


@dataclass(frozen=True)
class RunFile:
    """A file of a run."""

    name: str
    made_of: str
    """Changes with its content; empty for what only one driver knows, which is no part of the whole."""
    make: Callable[[], bytes]
    """May read the store; raises SweepError."""
    fixed: bool = False
    """What lies under the name never changes."""
    table: bool = False
    """In MLflow's layout of tables, columns and data."""


@dataclass(frozen=True)
class CodeOrigin:
    """What only the driver that orders an attempt knows of its code."""

    driver: int
    """Its token."""
    facts: Mapping[str, str]
    """Versions and the like."""
    code: Mapping[str, str]
    """Texts by file name, such as a `git.diff`."""


def stored(store: Store) -> Fetch:
    """Reads from `store`; raises StoreError, Corrupt among them."""

    def fetch(ref: ObjectRef) -> bytes:
        body = store.read(ref.key)[0]
        if sha256_of(body) != ref.sha256:
            raise Corrupt(ref.key)
        return body

    return fetch


def digest_of(files: Iterable[RunFile]) -> str:
    """Changes with any of the files, but for those that only one driver knows."""
    made = sorted((file.name, file.made_of) for file in files if file.made_of)
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]


def trial_files(manifest: Manifest, fetch: Fetch, *, live: bool, origin: CodeOrigin | None = None) -> tuple[RunFile, ...]:
    """All that the manifest and the store make, and what `origin` adds to the attempts that it ordered.

    Args:
        live: while the trial trains, the IoU of its classes stays that of the newest epoch that was drawn.
    """
    fetch = cache(fetch)
    settings = RunFile(CONFIG, manifest.trial_id, lambda: _config(manifest).encode(), fixed=True)
    attempts = (file for attempt in manifest.attempts for file in _attempt(attempt, origin))
    images = (file for pictures in manifest.pictures for file in _images(manifest, pictures, fetch))
    return (settings, *attempts, *_iou(manifest, live=live), *_newest(manifest, fetch), *_confusion(manifest, fetch), *images)


def overview_files(bodies: Mapping[str, bytes]) -> tuple[RunFile, ...]:
    """Files of the sweep's own run, from their contents."""
    return tuple(_overview_file(name, body) for name, body in sorted(bodies.items()))


def _overview_file(name: str, body: bytes) -> RunFile:
    return RunFile(name, sha256_of(body), lambda: body, table=name.endswith(".json") and _is_table(body))


def _is_table(body: bytes) -> bool:
    try:
        found = json.loads(body)
    except ValueError:
        return False
    return isinstance(found, dict) and {"columns", "data"} <= found.keys()


def _config(manifest: Manifest) -> str:
    """A sweep of this one trial, under a name of its own, so that it disturbs nothing of the sweep that it comes from."""
    name = f"{manifest.sweep[: 99 - len(manifest.trial_id)]}-{manifest.trial_id}"
    order = dict.fromkeys([*manifest.varied, *manifest.config])
    settings = [f"  {key}: {json.dumps(manifest.config[key])}" for key in order if manifest.config.get(key) is not None]
    head = f"# {' '.join(manifest.label.split())}: trial {manifest.trial_id} of {manifest.sweep}, alone. Start it with: rrn-sweep {CONFIG}"
    return "\n".join([head, f"name: {name}", "base:", *settings, ""])


def _attempt(attempt: Attempt, origin: CodeOrigin | None) -> Iterator[RunFile]:
    """Each attempt has files of its own, so that none is replaced by what a later driver knows less well."""
    ours = origin if origin and origin.driver == attempt.driver else None
    where = {"attempt": attempt.number, "driver": attempt.driver, "node": attempt.node, "machine": attempt.machine}
    known = {**where, **({"code": dict(ours.facts)} if ours else {})}
    prefix = f"{_ATTEMPTS}/{attempt.number}-"
    yield RunFile(f"{prefix}environment.json", str(attempt.number), lambda: _json(known), fixed=True)
    for name, text in sorted(ours.code.items()) if ours else ():
        yield RunFile(f"{prefix}{name}", "", partial(_bounded, text), fixed=True)


def _bounded(text: str) -> bytes:
    more = len(text) - _LONGEST_CODE
    return (text if more <= 0 else f"{text[:_LONGEST_CODE]}\n(cut here: {more} more characters)\n").encode()


def _iou(manifest: Manifest, *, live: bool) -> Iterator[RunFile]:
    drawn = max((pictures.epoch for pictures in manifest.pictures), default=0)
    entries = [entry for entry in manifest.history if not live or manifest.status == "finished" or entry.epoch <= drawn]
    if entries and any(name.startswith("val/iou_") for name in entries[-1].metrics):
        rule = "last" if manifest.status == "finished" else "newest"
        yield RunFile(IOU, f"{rule} {entries[-1].epoch}", lambda: _iou_table(entries, rule), table=True)


def _iou_table(entries: Sequence[EpochMetrics], rule: str) -> bytes:
    """Percent; empty where a class neither occurs nor is predicted."""
    last, best = entries[-1], max(entries, key=lambda entry: entry.metrics[SCORE])
    shown = [(last, head, f"{head}, {rule} ({last.epoch})") for head in _HEADS]
    shown.append((best, "ensemble", f"ensemble, best ({best.epoch})"))
    prefixes = [f"val/iou_{head}/" for head in _HEADS]
    named = (
        name.removeprefix(prefix) for entry in (last, best) for name in entry.metrics for prefix in prefixes if name.startswith(prefix)
    )
    rows = [[name, *(_percent(entry, f"val/iou_{head}/{name}") for entry, head, _ in shown)] for name in dict.fromkeys(named)]
    mean = ["mean", *(_percent(entry, f"{SCORE}_{head}") for entry, head, _ in shown)]
    return table(["IoU in percent, epoch", *(title for *_, title in shown)], [mean, *rows])


def _percent(entry: EpochMetrics, name: str) -> float | None:
    return round(100 * entry.metrics[name], 2) if name in entry.metrics else None


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """A table as MLflow's UI shows it."""
    return json.dumps({"columns": list(columns), "data": [list(row) for row in rows]}).encode()


def _newest(manifest: Manifest, fetch: Fetch) -> Iterator[RunFile]:
    """The newest predictions once more, where one looks for files."""
    if found := _drawn(manifest, PREDICTIONS):
        yield RunFile(PREDICTIONS, found[1].sha256, partial(fetch, found[1]))


def _drawn(manifest: Manifest, name: str) -> tuple[int, ObjectRef] | None:
    """The newest epoch that has such a picture, and the picture."""
    found = [(pictures.epoch, pictures.objects[name]) for pictures in manifest.pictures if name in pictures.objects]
    return max(found, key=lambda drawn: drawn[0], default=None)


def _confusion(manifest: Manifest, fetch: Fetch) -> Iterator[RunFile]:
    found = _drawn(manifest, CONFUSION_TABLE)
    if found is None:
        return
    epoch, ref = found

    @cache
    def counted() -> dict[str, Any]:
        known: dict[str, Any] = json.loads(fetch(ref))
        return known | {"said": f"{known['head']}, epoch {epoch}"}

    yield RunFile(CONFUSION_TABLE, ref.sha256, lambda: _confusion_table(counted()), table=True)
    yield RunFile(CONFUSION_MAP, ref.sha256, lambda: _confusion_map(counted()))


def _confusion_table(known: Mapping[str, Any]) -> bytes:
    """A row for each true class: its pixels, and what percent of them was predicted as each class."""
    rows = [[name, sum(row), *_shares(row)] for name, row in zip(known["classes"], known["counts"], strict=True)]
    return table([f"truth, and percent of its pixels ({known['said']})", "pixels", *known["classes"]], rows)


def _shares(row: Sequence[int]) -> list[float | None]:
    return [round(100 * count / sum(row), 2) if sum(row) else None for count in row]


def _confusion_map(known: Mapping[str, Any]) -> bytes:
    """The table as a heat map, PNG."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # on a new machine it tells that it looks for fonts
    from matplotlib.figure import Figure

    classes = known["classes"]
    shares = [[math.nan if value is None else value for value in _shares(row)] for row in known["counts"]]
    side = max(4.0, 0.45 * len(classes))  # inches
    figure = Figure(figsize=(side + 2.0, side + 1.5), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), classes, rotation=90)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="prediction", ylabel="truth", title=f"Percent of each true class's pixels\n{known['said']}, validation list")
    figure.colorbar(picture, shrink=0.8)
    if len(classes) <= _ANNOTATED:
        for y, row in enumerate(shares):
            for x, value in ((x, value) for x, value in enumerate(row) if not math.isnan(value)):
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", color="black" if value > 50 else "white", fontsize=8)
    body = io.BytesIO()
    figure.savefig(body, format="png")
    return body.getvalue()


def _images(manifest: Manifest, pictures: EpochPictures, fetch: Fetch) -> Iterator[RunFile]:
    """Named as MLflow's `log_image` names what it logs by key and step, but for its random part: a replay replaces, and adds nothing."""
    time_ms = next((entry.time_ms for entry in manifest.history if entry.epoch == pictures.epoch), manifest.created_ms)
    for name, ref in pictures.objects.items():
        if name.endswith(".png"):
            base = f"{IMAGES}/{name.removesuffix('.png')}+step+{pictures.epoch}+timestamp+{time_ms}+{manifest.trial_id}"
            yield RunFile(f"{base}.png", ref.sha256, partial(fetch, ref), fixed=True)
            yield RunFile(f"{base}+compressed.webp", ref.sha256, partial(_thumbnail, fetch, ref), fixed=True)


def _thumbnail(fetch: Fetch, ref: ObjectRef) -> bytes:
    from PIL import Image

    made = io.BytesIO()
    with Image.open(io.BytesIO(fetch(ref))) as picture:
        picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
        picture.convert("RGB").save(made, "WEBP")
    return made.getvalue()


def _json(known: Mapping[str, Any]) -> bytes:
    return json.dumps(known, indent=2, default=str).encode()
