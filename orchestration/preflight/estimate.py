"""Estimate time and memory of trials, from trials that ran or from a probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from orchestration.errors import SweepError
from orchestration.formatting import counted, duration
from orchestration.plan.spec import Resources
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest
from rrn_core.config import Runtime, TrainConfig
from rrn_core.methods import METHODS, settings_class, settings_where

if TYPE_CHECKING:
    from rrn_core.probe import Cost

COSTLESS = settings_where(lambda setting: not setting.changes_cost)
"""Settings that change neither the time per iteration or validation image nor the memory."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a whole trial."""

    seconds: float
    peak_memory_mb: float
    """MiB; GPU memory if the trial runs on a GPU."""


@dataclass(frozen=True)
class _MeasuredPace:
    """Measured over the epochs of one trial."""

    iteration_s: float
    image_s: float
    """Evaluation time per validation image; per evaluation if the number of images is unknown."""
    peak_memory_mb: float


def estimate(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> dict[str, Estimate | None]:
    """Time and memory of each plan, by trial_id, as measured in trials of equal cost that completed at least one epoch.

    None if there is no such trial, or if the number of iterations is unknown. The estimate is that of the machine that ran them.
    """
    paces: dict[str, list[_MeasuredPace]] = {}
    for manifest in manifests.values():
        if pace := _pace(manifest):
            paces.setdefault(_group(manifest.config), []).append(pace)
    return {plan.trial_id: _forecast(plan, paces.get(cost_group(plan.config), [])) for plan in plans}


def probed(
    plans: Sequence[TrialPlan], runtime: Runtime, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Estimate | None]:
    """Time and memory of each plan, by trial_id, from probes on this machine: one probe for all trials of equal cost.

    Args:
        progress: called with the probes done and the number of probes.

    Raises:
        SweepError: a trial does not fit the device.
        DataError, ConfigError: a data set cannot be opened, or this machine does not have the device.
    """
    costs = _measured(plans, runtime, 3, progress)
    return {plan.trial_id: _from_probe(plan, runtime, costs[cost_group(plan.config)]) if plan.iterations else None for plan in plans}


def main_memory_mb(
    plans: Sequence[TrialPlan],
    manifests: Mapping[str, Manifest],
    runtime: Runtime,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """MiB of main memory of the largest of the trials: as measured where a trial of equal cost ran on a CPU, else by a probe here.

    To a probe, which trains on random images, the images that a trial keeps in memory are added. Loader processes are not counted.

    Raises:
        SweepError, DataError, ConfigError: as `probed`.
    """
    from rrn_core.data.dataset import cached_bytes

    on_cpu = {id_: found for id_, found in manifests.items() if not any("cuda" in attempt.machine for attempt in found.attempts)}
    known = {id_: cost.peak_memory_mb for id_, cost in estimate(plans, on_cpu).items() if cost and runtime.device == "cpu"}
    unknown = [plan for plan in plans if not known.get(plan.trial_id)]
    costs, images = _measured(unknown, runtime, 1, progress), {cost_group(plan.config): plan.config for plan in unknown}
    return _highest(
        [*known.values(), *(cost.host_memory_mb + cached_bytes(images[group], runtime) / 2**20 for group, cost in costs.items())]
    )


def shown_costs(estimates: Mapping[str, Estimate | None]) -> dict[str, tuple[str, str]]:
    """Time and memory as text, by trial_id; unknown costs are left out."""
    known = {trial_id: cost for trial_id, cost in estimates.items() if cost}
    return {trial_id: (duration(cost.seconds), f"{cost.peak_memory_mb / 1024:.1f} GiB") for trial_id, cost in known.items()}


def total(plans: Sequence[TrialPlan], estimates: Mapping[str, Estimate | None], resources: Resources) -> str:
    """One line: the GPU-hours of these trials from iteration 0, or the CPU-hours if they use no GPU."""
    hours = [cost.seconds / 3600 for plan in plans if (cost := estimates.get(plan.trial_id))]
    if not hours:
        return "time and memory: unknown until a trial has completed an epoch; rrn-sweep plan --probe measures them on this machine"
    unit, each = ("GPU", resources.gpu) if resources.gpu else ("CPU", resources.cpu)
    missing = f", without {counted(len(plans) - len(hours), 'trial')} of unknown cost" if len(hours) < len(plans) else ""
    return f"at most about {sum(hours) * each:.3g} {unit}-hours for the trials to run{missing}"


def cost_group(config: TrainConfig) -> str:
    """A key that is equal for trials whose iterations cost the same."""
    return _group(config.model_dump(mode="json"))


def _measured(
    plans: Sequence[TrialPlan], runtime: Runtime, iterations: int, progress: Callable[[int, int], None] | None
) -> dict[str, Cost]:
    """The cost of each kind of trial, by its group."""
    import torch

    from rrn_core.probe import probe, task_of

    costs: dict[str, Cost] = {}
    groups = {cost_group(plan.config): plan for plan in plans}
    for done, (group, plan) in enumerate(groups.items(), start=1):
        try:
            costs[group] = probe(plan.config, runtime, num_classes=task_of(plan.config, runtime).num_classes, iterations=iterations)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise SweepError(f"trial {plan.label} does not fit {runtime.device}; lower batch_size or crop") from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise SweepError(f"trial {plan.label} does not fit the main memory; lower batch_size or crop") from error
        if progress:
            progress(done, len(groups))
    return costs


def _from_probe(plan: TrialPlan, runtime: Runtime, cost: Cost) -> Estimate:
    from rrn_core.probe import task_of

    windows = task_of(plan.config, runtime).windows(plan.config.crop)
    return Estimate(cost.trial_s(iterations=plan.iterations, epochs=plan.config.epochs, windows=windows), cost.peak_memory_mb)


def _group(settings: Mapping[str, Any]) -> str:
    read = settings_class(str(settings["method"])).model_fields if settings.get("method") in METHODS else settings
    return json.dumps({name: value for name, value in settings.items() if name in read and name not in COSTLESS}, sort_keys=True)


def _pace(manifest: Manifest) -> _MeasuredPace | None:
    """Medians over the epochs, because an interrupted epoch measures only its part after the resume."""
    entries = [entry for entry in manifest.history if {"perf/train_s", "perf/eval_s"} <= entry.metrics.keys()]
    if not entries:
        return None
    steps = [after - before for before, after in pairwise([0, *(entry.step for entry in manifest.history)])]
    per_epoch = max(1, median(steps))
    return _MeasuredPace(
        median(entry.metrics["perf/train_s"] for entry in entries) / per_epoch,
        median(entry.metrics["perf/eval_s"] for entry in entries) / _val_images(manifest.config),
        _highest(entry.metrics.get("perf/peak_memory_mb", 0.0) for entry in entries),
    )


def _forecast(plan: TrialPlan, paces: Sequence[_MeasuredPace]) -> Estimate | None:
    if not paces or not plan.iterations:
        return None
    training_s = plan.iterations * median(pace.iteration_s for pace in paces)
    evaluation_s = plan.config.epochs * _val_images(plan.config.model_dump(mode="json")) * median(pace.image_s for pace in paces)
    return Estimate(training_s + evaluation_s, _highest(pace.peak_memory_mb for pace in paces))


def _val_images(settings: Mapping[str, Any]) -> int:
    """Number of validation images if the settings contain it; else 1, because all trials of a data set share one validation list."""
    return int(settings["val_images"]) if settings["dataset"] == "digits" else 1


def _highest(values: Iterable[float]) -> float:
    return max(values, default=0.0)
