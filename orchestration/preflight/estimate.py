"""What trials will take: told by trials that ran, or by a probe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from orchestration.formatting import duration
from orchestration.plan.spec import Resources
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest
from rrn_core.config import Runtime, TrainConfig
from rrn_core.methods import settings_where

if TYPE_CHECKING:
    from rrn_core.probe import Cost

COSTLESS = settings_where(lambda setting: not setting.changes_cost)
"""Settings that change neither the time of an iteration, nor that of a validation image, nor the memory."""


@dataclass(frozen=True)
class Estimate:
    """Of a whole trial."""

    seconds: float
    peak_memory_mb: float
    """MiB; of GPU memory where the trial runs on one."""


@dataclass(frozen=True)
class _MeasuredPace:
    """What the epochs of one trial took."""

    iteration_s: float
    image_s: float
    """Evaluation, per validation image; per evaluation where their number is unknown."""
    peak_memory_mb: float


def estimate(plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> dict[str, Estimate | None]:
    """Time and memory of each plan, by trial_id, as measured in the trial itself or in others of equal cost, one epoch of which is enough.

    None where no such trial has run, or the number of iterations is not known. It ran wherever it ran: another machine takes another time.
    """
    paces: dict[str, list[_MeasuredPace]] = {}
    for manifest in manifests.values():
        if pace := _pace(manifest):
            paces.setdefault(_group(manifest.config), []).append(pace)
    return {plan.trial_id: _forecast(plan, paces.get(cost_group(plan.config), [])) for plan in plans}


def probed(
    plans: Sequence[TrialPlan], runtime: Runtime, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, Estimate | None]:
    """The same from a probe on this machine, one for all trials of equal cost. `progress`: probes done, and all of them.

    Raises:
        ValueError: a data set that cannot be opened, or a trial that does not fit the device.
    """
    import torch

    from rrn_core.probe import probe, task_of

    costs: dict[str, Cost] = {}
    groups = {cost_group(plan.config): plan for plan in plans}
    for done, (group, plan) in enumerate(groups.items(), start=1):
        try:
            costs[group] = probe(plan.config, runtime, num_classes=task_of(plan.config, runtime).num_classes)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"trial {plan.label} does not fit {runtime.device}; lower batch_size or crop") from error
        if progress:
            progress(done, len(groups))
    return {plan.trial_id: _from_probe(plan, runtime, costs[cost_group(plan.config)]) if plan.iterations else None for plan in plans}


def shown_costs(estimates: Mapping[str, Estimate | None]) -> dict[str, tuple[str, str]]:
    """Time and memory of each trial as a person reads them, where they are known."""
    known = {trial_id: cost for trial_id, cost in estimates.items() if cost}
    return {trial_id: (duration(cost.seconds), f"{cost.peak_memory_mb / 1024:.1f} GiB") for trial_id, cost in known.items()}


def total(plans: Sequence[TrialPlan], estimates: Mapping[str, Estimate | None], resources: Resources) -> str:
    """One line: the GPU-hours of some trials from their very start, or the CPU-hours where none asks for a GPU."""
    hours = [cost.seconds / 3600 for plan in plans if (cost := estimates.get(plan.trial_id))]
    if not hours:
        return "time and memory: unknown until a trial has completed an epoch; rrn-sweep plan --probe measures them on this machine"
    unit, each = ("GPU", resources.gpu) if resources.gpu else ("CPU", resources.cpu)
    missing = f", without {len(plans) - len(hours)} trials of unknown cost" if len(hours) < len(plans) else ""
    return f"at most about {sum(hours) * each:.3g} {unit}-hours for what is to run{missing}"


def cost_group(config: TrainConfig) -> str:
    """Equal for trials whose iterations cost the same."""
    return _group(config.model_dump(mode="json"))


def _from_probe(plan: TrialPlan, runtime: Runtime, cost: Cost) -> Estimate:
    from rrn_core.probe import task_of

    windows = task_of(plan.config, runtime).windows(plan.config.crop)
    return Estimate(cost.trial_s(iterations=plan.iterations, epochs=plan.config.epochs, windows=windows), cost.peak_memory_mb)


def _group(settings: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in settings.items() if name not in COSTLESS}, sort_keys=True)


def _pace(manifest: Manifest) -> _MeasuredPace | None:
    """Medians over the epochs: one that was interrupted counts only what was trained after it."""
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
    """Validation images where the settings tell; else 1, as every trial of such a data set evaluates on the same list."""
    return int(settings["val_images"]) if settings["dataset"] == "digits" else 1


def _highest(values: Iterable[float]) -> float:
    return max(values, default=0.0)
