"""Check what a sweep needs before it uses a GPU: data, initial weights, store, disk space, MLflow and device."""

from __future__ import annotations

import shlex
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.errors import Conflict, NotFound, StoreError, SweepError, TrackingError, user_errors, without_password
from orchestration.formatting import bytes_shown, counted, table
from orchestration.plan.spec import Resources, Retention, SweepSpec
from orchestration.plan.tracking_address import checked_address, database_of
from orchestration.plan.trial_plan import TrialPlan
from orchestration.preflight.estimate import cost_group, main_memory_mb
from orchestration.preflight.machine import RAY_KILLS_ABOVE, free_memory, granted_memory
from orchestration.record.inputs import InputContents
from orchestration.store.base import Store, require_conditions
from orchestration.store.directory import DirectoryStore
from rrn_core.config import Runtime, TrainConfig
from rrn_core.errors import ConfigError, DataError
from rrn_core.setting import setting_of

if TYPE_CHECKING:
    from rrn_core.data.inspection import Finding, Level, StatisticsCache

MARKS = {"ok": "ok", "warn": "warn", "fault": "FAULT"}

_TIGHT = 0.8
"""A need above this share of the free disk or GPU memory is a warning."""
_CONTEXT_MB = 600
"""MiB of GPU memory that the CUDA context of a process takes."""


def check(
    spec: SweepSpec,
    plans: Sequence[TrialPlan],
    *,
    store: Store,
    tracking: str,
    runtime: Runtime,
    local: bool = True,
    cpus: int = 1,
    visible: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Run every check. A fault that the user can fix is a finding, not an exception.

    Args:
        plans: all trials, finished or not, because the disk space for checkpoints is an upper bound; of a search, its samples.
        local: trials run on this machine. If not, a missing data root is a warning and the device is not checked.
        cpus: that all trials together may use on this machine.
        visible: CUDA_VISIBLE_DEVICES.
        progress: called with the files inspected and the number of files of the current data configuration.
    """
    trials = spec.search.trials if spec.search else len(plans)
    findings = [
        *check_data([plan.config for plan in plans], runtime, local=local, progress=progress),
        *check_weights([plan.config for plan in plans], runtime, store),
        check_store(store, spec.name),
        *check_disk([plan.config for plan in plans], runtime, trials=trials, retention=spec.retention, store=store),
        check_tracking(tracking, spec.name),
        *check_device([plan.config for plan in plans], spec.resources, runtime, local=local, visible=visible),
    ]
    if local and not faulty(findings):  # trains a few steps
        findings += _main_memory(plans, spec.resources, runtime, trials=trials, cpus=cpus)
    return findings


def render(findings: Iterable[Finding]) -> str:
    """One line per finding: mark, subject, detail."""
    return table([[MARKS[finding.level], finding.what, finding.detail] for finding in findings])


def faulty(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "fault" for finding in findings)


def check_data(
    configs: Iterable[TrainConfig],
    runtime: Runtime,
    *,
    local: bool = True,
    progress: Callable[[int, int], None] | None = None,
    sample: int | None = None,
) -> list[Finding]:
    """Inspect every distinct selection of images. Shared files are read once; equal findings are reported once.

    Args:
        sample: as for `inspect_data`.
    """
    inspected: StatisticsCache = {}
    distinct = {tuple((name, getattr(config, name)) for name in data_settings(config)): config for config in configs}.values()
    findings = [finding for config in distinct for finding in _data(config, runtime, inspected, local, progress, sample)]
    return list(dict.fromkeys(findings))


def data_notes(configs: Iterable[TrainConfig], runtime: Runtime, *, sample: int = 32) -> list[str]:
    """The faults and warnings of `check_data` that a sample of the files shows, a line each; none if the data are not on this machine.

    A start of a sweep has no time to decode every file: for each selection, `sample` labelled and `sample` validation images are read.
    """
    if runtime.data_root is None or not runtime.data_root.is_dir():
        return []
    findings = check_data((config for config in configs if config.dataset != "digits"), runtime, sample=sample)
    return [f"{MARKS[finding.level]} {finding.what}: {finding.detail}" for finding in findings if finding.level != "ok"]


def data_settings(config: TrainConfig) -> tuple[str, ...]:
    """Names of the settings that an inspection of the data depends on."""
    return tuple(name for name, field in type(config).model_fields.items() if setting_of(field).data)


def check_weights(configs: Iterable[TrainConfig], runtime: Runtime, store: Store) -> list[Finding]:
    """Check that each file of initial weights exists and fits the networks."""
    contents = InputContents(runtime, store)
    initialised = {(config.init_weights, cost_group(config)): config for config in configs if config.init_weights}
    return list(dict.fromkeys(_weights(config, runtime, contents) for config in initialised.values()))


def check_store(store: Store, sweep: str) -> Finding:
    """Write, read, conditional put and delete, as trials do, with a small object that is deleted afterwards."""
    key = f"{sweep}/check-{uuid.uuid4().hex}"
    try:
        return _tried_store(store, key)
    except StoreError as error:
        return _finding("fault", "store", str(error))
    finally:
        with suppress(StoreError):
            store.delete([key])


def check_disk(configs: Sequence[TrainConfig], runtime: Runtime, *, trials: int, retention: Retention, store: Store) -> list[Finding]:
    """Compare the size of the checkpoints that trials keep with the free disk space; that of a bucket is unknown."""
    if not configs:
        return []
    largest = max(_checkpoint_bytes(config, runtime) for config in {cost_group(config): config for config in configs}.values())
    kept = retention.last + retention.best
    need, calculation = trials * kept * largest, f"{counted(trials, 'trial')} x {counted(kept, 'checkpoint')} x {bytes_shown(largest)}"
    if not isinstance(store, DirectoryStore):
        return [_finding("ok", "store space", f"{calculation}: up to {bytes_shown(need)} in {store.uri}")]
    free = shutil.disk_usage(_existing(store.root)).free
    text = f"{calculation} need up to {bytes_shown(need)}, {bytes_shown(free)} are free at {store.root}"
    if need > free:
        return [_finding("fault", "store space", f"{text}; free disk space, lower retention, or use another store")]
    return [_finding("warn" if need > _TIGHT * free else "ok", "store space", text)]


def check_tracking(uri: str, sweep: str) -> Finding:
    """Use MLflow as the first run does: create the sweep's experiment, store a file. An absent database only gets its folder checked."""
    from orchestration.tracking.experiment import make_experiment

    try:
        database = database_of(checked_address(uri))
        where = str(database) if database else without_password(uri)
        if database and not database.exists():
            with tempfile.TemporaryFile(dir=_existing(database.parent)):
                return _finding("ok", "tracking", f"{where}: will be created")
        left = make_experiment(uri, sweep)
    except TrackingError as error:
        return _finding("fault", "tracking", str(error))
    except OSError as error:
        return _finding("fault", "tracking", f"{where}: {error}; correct the path in `tracking:` or MLFLOW_TRACKING_URI")
    if left:
        return _finding("warn", "tracking", f"{where}: works, but {left} could not be deleted; delete it")
    return _finding("ok", "tracking", f"{where}: works; experiment {sweep} exists, and files can be stored")


def check_device(
    configs: Iterable[TrainConfig], resources: Resources, runtime: Runtime, *, local: bool = True, visible: str | None = None
) -> list[Finding]:
    """Check that the device exists and that each kind of trial fits its share of GPU memory, by training a few steps."""
    import torch

    from rrn_core.training import device_of

    if not local:
        return [_finding("warn", "device", "not checked: trials run on a cluster")]
    if resources.gpu and not torch.cuda.is_available():
        return [_finding("fault", "device", _no_gpu(resources, visible))]
    try:
        device = device_of(runtime)
    except ConfigError as error:
        return [_finding("fault", "device", str(error))]
    if device.type != "cuda":
        return [_finding("ok", "device", f"trials run on {device}")]
    share = min(1.0, resources.gpu or 1.0)
    return [_fit(config, runtime, share) for config in {cost_group(config): config for config in configs}.values()]


def check_main_memory(peak_mb: float, resources: Resources, *, trials: int, cpus: int, gpus: int | None = None) -> Finding:
    """Compare the peaks of the trials that run at once with the main memory of this machine, above which Ray kills trials.

    Args:
        gpus: of this machine; unset: those that torch finds.
    """
    import torch

    granted, free, one = RAY_KILLS_ABOVE * granted_memory(), free_memory(), peak_mb * 2**20
    at_once = max(1, min(trials, int(cpus / resources.cpu + 1e-6)))
    if resources.gpu:
        at_once = min(at_once, max(1, int((torch.cuda.device_count() if gpus is None else gpus) / resources.gpu + 1e-6)))
    if resources.memory:
        at_once = min(at_once, max(1, int(free / (2**30 * reserved_gib(peak_mb, resources)))))
    need = at_once * one
    text = f"{counted(at_once, 'trial')} at once x {bytes_shown(one)} = {bytes_shown(need)} of main memory, {bytes_shown(free)} is free"
    if one > granted:
        return _finding("fault", "memory", f"{text}; lower batch_size or crop")
    if need > free:
        advice = "set resources: {memory: auto}, or raise resources.cpu" if at_once > 1 else "end other programs, or lower batch_size"
        return _finding("fault" if need > granted else "warn", "memory", f"{text}: Ray would kill trials; {advice}")
    return _finding("ok", "memory", text)


def reserved_gib(peak_mb: float, resources: Resources) -> float:
    """GiB of main memory that Ray reserves for a trial: as stated, or for `auto` the measured peak and a tenth."""
    return resources.memory if isinstance(resources.memory, float | int) else 1.1 * peak_mb / 1024


def require_device(runtime: Runtime, resources: Resources | None = None, *, visible: str | None = None) -> None:
    """Raises SweepError if this machine lacks the device or the GPUs. `visible`: CUDA_VISIBLE_DEVICES."""
    gpu = resources.gpu if resources else 0
    if runtime.device in ("cpu", "auto") and not gpu:
        return
    import torch

    from rrn_core.training import device_of

    if resources and gpu and not torch.cuda.device_count():
        raise SweepError(_no_gpu(resources, visible))
    with user_errors():
        device_of(runtime)


def _no_gpu(resources: Resources, visible: str | None) -> str:
    cause = (
        "fix the CUDA installation, or"
        if visible is None
        else f"CUDA_VISIBLE_DEVICES={shlex.quote(visible)} names none; correct or unset it, or"
    )
    return f"resources.gpu is {resources.gpu:g}, but torch finds no CUDA device; {cause} set resources.gpu: 0"


def _main_memory(plans: Sequence[TrialPlan], resources: Resources, runtime: Runtime, *, trials: int, cpus: int) -> list[Finding]:
    try:
        return [check_main_memory(main_memory_mb(plans, {}, runtime), resources, trials=trials, cpus=cpus)] if plans else []
    except SweepError as error:
        return [_finding("fault", "memory", str(error))]
    except (DataError, ConfigError, OSError):  # another check reports it
        return []


def _data(
    config: TrainConfig,
    runtime: Runtime,
    inspected: StatisticsCache,
    local: bool,
    progress: Callable[[int, int], None] | None,
    sample: int | None,
) -> list[Finding]:
    from rrn_core.data.inspection import inspect_data

    root = runtime.data_root
    if config.dataset != "digits":
        if root is None:
            return [_finding("fault", config.dataset, "no data root: give --data-root DIR, or set RRN_DATA_ROOT")]
        if not root.is_dir():
            if not local:
                return [_finding("warn", config.dataset, f"not checked: {root} is not on this machine")]
            return [_finding("fault", config.dataset, f"{root} is not a folder; correct --data-root or RRN_DATA_ROOT")]
    return inspect_data(config, runtime, cache=inspected, progress=progress, sample=sample)


def _weights(config: TrainConfig, runtime: Runtime, contents: InputContents) -> Finding:
    import torch

    from rrn_core.data.dataset import known_classes
    from rrn_core.methods import build_networks
    from rrn_core.weights import initialise, unpack

    what = f"init_weights {config.init_weights}"
    try:
        sha256 = contents.weights_hash(config.init_weights or "")
        if sha256 is None:
            advice = "create it with rrn-sweep weights import, and give its path relative to the sweep file"
            return _finding("fault", what, f"no such file; {advice}")
        classes, body = known_classes(config, runtime)[0], contents.weights[sha256]
        with torch.device("meta"):
            quartet = build_networks(config, len(classes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that meta tensors take no values; only names and shapes matter here
            text, metadata = initialise(quartet, body, classes=classes, sha256=sha256), unpack(body)[1]
            return _finding("warn" if metadata.kind == "branches" and metadata.classes is None else "ok", what, text)
    except (SweepError, DataError, ConfigError, OSError) as error:
        return _finding("fault", what, " ".join(str(error).split()))


def _tried_store(store: Store, key: str) -> Finding:
    first, second = b"first", b"second"
    store.write(key, first)
    body, etag = store.read(key)
    if body != first:
        return _finding("fault", "store", f"{store.uri}: returned other bytes than were written; use another store")
    store.replace(key, second, expected=etag)
    with suppress(Conflict):
        store.replace(key, b"third", expected=etag)
        return _finding("fault", "store", f"{store.uri}: a conditional put takes an outdated etag for the present one; use another store")
    require_conditions(store, key, b"third")
    store.delete([key])
    with suppress(NotFound):
        store.read(key)
        return _finding("fault", "store", f"{store.uri}: still returns a deleted object; use another store")
    return _finding("ok", "store", f"{store.uri}: write, read, conditional put and delete work")


def _checkpoint_bytes(config: TrainConfig, runtime: Runtime) -> int:
    from rrn_core.probe import checkpoint_bytes, task_of

    try:
        return checkpoint_bytes(config, task_of(config, runtime).num_classes)
    except (DataError, ConfigError, OSError):  # check_data reports it; the number of classes hardly changes the size
        return checkpoint_bytes(config, 21)


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _fit(config: TrainConfig, runtime: Runtime, share: float) -> Finding:
    """Whether a trial fits its share of the GPU's memory."""
    import torch

    from rrn_core.probe import probe, task_of

    what = f"device, {config.method} {config.backbone} crop {config.crop} batch {config.batch_size}"
    share_mb = share * torch.cuda.get_device_properties(runtime.device).total_memory / 2**20
    try:
        cost = probe(config, runtime, num_classes=task_of(config, runtime).num_classes)
    except torch.OutOfMemoryError:
        return _finding("fault", what, f"does not fit {bytes_shown(share_mb / share * 2**20)} of GPU memory; lower batch_size or crop")
    except (DataError, ConfigError) as error:
        return _finding("fault", what, str(error))
    need_mb = cost.peak_memory_mb + _CONTEXT_MB
    need, available = bytes_shown(need_mb * 2**20), bytes_shown(share_mb * 2**20)
    text = f"needs {need} of {available} of GPU memory, {cost.seconds_per_iteration:.3g} s an iteration"
    if need_mb > share_mb:
        return _finding("fault", what, f"{text}; raise resources.gpu, or lower batch_size or crop")
    return _finding("warn" if need_mb > _TIGHT * share_mb else "ok", what, text)


def _finding(level: Level, what: str, detail: str) -> Finding:
    from rrn_core.data.inspection import Finding  # loads numpy and image libraries, which `plan` does not need

    return Finding(level, what, detail)
