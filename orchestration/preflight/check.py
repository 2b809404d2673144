"""Tries everything that a sweep will need, before a GPU is spent on it: data, store, MLflow, disk and device."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.errors import Conflict, NotFound, StoreError, SweepError, TrackingError, without_password
from orchestration.formatting import bytes_shown, table
from orchestration.plan.spec import Resources, Retention, SweepSpec
from orchestration.plan.trial_plan import TrialPlan
from orchestration.preflight.estimate import cost_group
from orchestration.record.inputs import InputContents
from orchestration.store.base import Store
from orchestration.store.directory import DirectoryStore
from rrn_core.config import Runtime, TrainConfig
from rrn_core.setting import setting_of

if TYPE_CHECKING:
    from rrn_core.data.inspection import Finding, Level, Looks

MARKS = {"ok": "ok", "warn": "warn", "fault": "FAULT"}

_SQLITE = "sqlite:///"
_DATA_SETTINGS = tuple(name for name, field in TrainConfig.model_fields.items() if setting_of(field).data)
"""What an inspection of the data depends on."""
_TIGHT = 0.8
"""Share of the free disk or of the GPU's memory above which a need is warned about."""
_CONTEXT_MB = 600
"""MiB that a process takes of a GPU for CUDA itself."""


def check(
    spec: SweepSpec,
    plans: Sequence[TrialPlan],
    *,
    store: Store,
    tracking: str,
    runtime: Runtime,
    local: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """All that is found about the trials of a sweep; nothing is raised for what a user can mend.

    Args:
        plans: all of them, finished or not: the room for checkpoints is an upper bound; of a search its samples.
        local: trials run on this machine; else its data and device say nothing about theirs, and are left out where they are absent.
        progress: files looked at, and all files of the data configuration under way.
    """
    trials = spec.search.trials if spec.search else len(plans)
    return [
        *check_data([plan.config for plan in plans], runtime, local=local, progress=progress),
        *check_weights([plan.config for plan in plans], runtime, store),
        check_store(store, spec.name),
        *check_disk([plan.config for plan in plans], runtime, trials=trials, retention=spec.retention, store=store),
        check_tracking(tracking, spec.name),
        *check_device([plan.config for plan in plans], spec.resources, runtime, local=local),
    ]


def render(findings: Iterable[Finding]) -> str:
    """A line for each, its mark first."""
    return table([[MARKS[finding.level], finding.what, finding.detail] for finding in findings])


def faulty(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "fault" for finding in findings)


def check_data(
    configs: Iterable[TrainConfig], runtime: Runtime, *, local: bool = True, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Every distinct choice of images once; files that several share are read once, and equal lines are told once."""
    looks: Looks = {}
    distinct = {tuple(getattr(config, name) for name in _DATA_SETTINGS): config for config in configs}.values()
    findings = [finding for config in distinct for finding in _data(config, runtime, looks, local, progress)]
    return list(dict.fromkeys(findings))


def check_weights(configs: Iterable[TrainConfig], runtime: Runtime, store: Store) -> list[Finding]:
    """Weights to start from: each file is there and fits the networks that it is meant for."""
    contents = InputContents(runtime, store)
    starting = {(config.init_weights, cost_group(config)): config for config in configs if config.init_weights}
    return list(dict.fromkeys(_weights(config, runtime, contents) for config in starting.values()))


def check_store(store: Store, sweep: str) -> Finding:
    """Write, read back, compare and swap, delete: what every trial will do, on a small object that is gone afterwards."""
    key = f"{sweep}/check-{uuid.uuid4().hex}"
    try:
        return _tried(store, key)
    except StoreError as error:
        return _finding("fault", "store", str(error))
    finally:
        with suppress(StoreError):
            store.delete([key])


def check_disk(configs: Sequence[TrainConfig], runtime: Runtime, *, trials: int, retention: Retention, store: Store) -> list[Finding]:
    """The checkpoints that the trials will keep, against the room in the store's folder; a bucket's room is unknown."""
    if not configs:
        return []
    largest = max(_checkpoint_bytes(config, runtime) for config in {cost_group(config): config for config in configs}.values())
    kept = retention.last + retention.best
    need, sum_ = trials * kept * largest, f"{trials} trials x {kept} checkpoints x {bytes_shown(largest)}"
    if not isinstance(store, DirectoryStore):
        return [_finding("ok", "store room", f"{sum_}: up to {bytes_shown(need)} in {store.uri}")]
    free = shutil.disk_usage(_existing(store.root)).free
    text = f"{sum_} need up to {bytes_shown(need)}, {bytes_shown(free)} are free at {store.root}"
    if need > free:
        return [_finding("fault", "store room", f"{text}; make room, lower retention, or use another store")]
    return [_finding("warn" if need > _TIGHT * free else "ok", "store room", text)]


def check_tracking(uri: str, sweep: str) -> Finding:
    """A database opens and may be written, or will be made; a server makes the sweep's experiment, as the first run would."""
    if uri.startswith(_SQLITE):
        return _database(Path(uri.removeprefix(_SQLITE)))
    return _server(uri, sweep)


def check_device(configs: Iterable[TrainConfig], resources: Resources, runtime: Runtime, *, local: bool = True) -> list[Finding]:
    """Where trials ask for a GPU: there is one, and each kind of trial fits into its share, shown by training a few steps on it."""
    import torch

    from rrn_core.training import device_of

    if not local:
        return [_finding("warn", "device", "not looked at: trials run on a cluster")]
    if resources.gpu and not torch.cuda.is_available():
        return [_finding("fault", "device", f"resources.gpu is {resources.gpu:g}, but torch finds no CUDA device; set gpu: 0, or mend it")]
    try:
        device = device_of(runtime)
    except ValueError as error:
        return [_finding("fault", "device", str(error))]
    if device.type != "cuda":
        return [_finding("ok", "device", f"trials run on {device}")]
    share = min(1.0, resources.gpu or 1.0)
    return [_fit(config, runtime, share) for config in {cost_group(config): config for config in configs}.values()]


def _data(config: TrainConfig, runtime: Runtime, looks: Looks, local: bool, progress: Callable[[int, int], None] | None) -> list[Finding]:
    from rrn_core.data.inspection import inspect_data

    root = runtime.data_root
    if config.dataset != "digits":
        if root is None:
            return [_finding("fault", config.dataset, "no data root: give --data-root DIR, or set RRN_DATA_ROOT")]
        if not root.is_dir():
            if not local:
                return [_finding("warn", config.dataset, f"not looked at: {root} is not on this machine")]
            return [_finding("fault", config.dataset, f"{root} is not a folder: correct --data-root or RRN_DATA_ROOT")]
    return inspect_data(config, runtime, looks=looks, progress=progress)


def _weights(config: TrainConfig, runtime: Runtime, contents: InputContents) -> Finding:
    import torch

    from rrn_core.methods import build_networks
    from rrn_core.probe import task_of
    from rrn_core.weights import initialise

    what = f"init_weights {config.init_weights}"
    try:
        sha256 = contents.weights_hash(config.init_weights or "")
        if sha256 is None:
            return _finding("fault", what, "no such file; write it by rrn-sweep weights import, and name it relative to the sweep file")
        with torch.device("meta"):
            quartet = build_networks(config, task_of(config, runtime).num_classes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nothing is copied into networks without memory: only names and shapes are compared
            return _finding("ok", what, initialise(quartet, contents.weights[sha256], sha256=sha256))
    except (SweepError, ValueError, OSError) as error:
        return _finding("fault", what, " ".join(str(error).split()))


def _tried(store: Store, key: str) -> Finding:
    first, second = b"first", b"second"
    store.write(key, first)
    body, etag = store.read(key)
    if body != first:
        return _finding("fault", "store", f"{store.uri}: gave back other bytes than were written")
    store.replace(key, second, expected=etag)
    for stale in (etag, None):
        with suppress(Conflict):
            store.replace(key, b"third", expected=stale)
            return _finding("fault", "store", f"{store.uri}: ignores the condition of a conditional put; use a server that honours it")
    store.delete([key])
    with suppress(NotFound):
        store.read(key)
        return _finding("fault", "store", f"{store.uri}: still holds a deleted object")
    return _finding("ok", "store", f"{store.uri}: writes, reads, swaps and deletes")


def _checkpoint_bytes(config: TrainConfig, runtime: Runtime) -> int:
    from rrn_core.probe import checkpoint_bytes, task_of

    try:
        return checkpoint_bytes(config, task_of(config, runtime).num_classes)
    except (ValueError, OSError):  # told by the data's own check; how many classes there are hardly counts here
        return checkpoint_bytes(config, 21)


def _existing(folder: Path) -> Path:
    """The folder, or what is there that lies nearest above it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _database(path: Path) -> Finding:
    try:
        if path.exists():
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=5, isolation_level=None)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                connection.execute("ROLLBACK")
            return _finding("ok", "tracking", f"{path}: opens and may be written")
        with tempfile.TemporaryFile(dir=_existing(path.parent)):
            return _finding("ok", "tracking", f"{path}: will be made")
    except (OSError, sqlite3.Error) as error:
        return _finding("fault", "tracking", f"{path}: {error}; correct the path in `tracking:` or MLFLOW_TRACKING_URI")


def _server(uri: str, sweep: str) -> Finding:
    from orchestration.tracking.tracker import make_experiment

    shown = without_password(uri)
    if not uri.startswith(("http://", "https://")):
        return _finding("fault", "tracking", f"must be sqlite:////absolute/path.db or http(s)://host..., got {shown!r}")
    try:
        make_experiment(uri, sweep)
    except TrackingError as error:
        return _finding("fault", "tracking", f"{shown}: {error}")
    return _finding("ok", "tracking", f"{shown}: answers, and holds the experiment {sweep}")


def _fit(config: TrainConfig, runtime: Runtime, share: float) -> Finding:
    """Whether a trial fits into its share of the GPU."""
    import torch

    from rrn_core.probe import probe, task_of

    what = f"device, {config.method} {config.backbone} crop {config.crop} batch {config.batch_size}"
    room_mb = share * torch.cuda.get_device_properties(runtime.device).total_memory / 2**20
    try:
        cost = probe(config, runtime, num_classes=task_of(config, runtime).num_classes)
    except torch.OutOfMemoryError:
        return _finding("fault", what, f"does not fit {bytes_shown(room_mb / share * 2**20)} of GPU memory; lower batch_size or crop")
    except ValueError as error:
        return _finding("fault", what, str(error))
    need_mb = cost.peak_memory_mb + _CONTEXT_MB
    need, room = bytes_shown(need_mb * 2**20), bytes_shown(room_mb * 2**20)
    text = f"needs {need} of its {room} of GPU memory, {cost.seconds_per_iteration:.3g} s an iteration"
    if need_mb > room_mb:
        return _finding("fault", what, f"{text}; raise resources.gpu, or lower batch_size or crop")
    return _finding("warn" if need_mb > _TIGHT * room_mb else "ok", what, text)


def _finding(level: Level, what: str, detail: str) -> Finding:
    from rrn_core.data.inspection import Finding  # it needs numpy and images, which a plan does without

    return Finding(level, what, detail)
