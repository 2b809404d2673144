"""`rrn-sweep logs`: print the history of one trial from the store, once or continuously."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from orchestration.errors import SweepError
from orchestration.formatting import one_line
from orchestration.observe.trial_log import Key, history, stored_objects
from orchestration.observe.watch import muted_store_warnings, with_short_store_timeout
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_state import TrialState, budget_spent
from orchestration.sweep import Sweep

CANDIDATES = 8
"""Trials that the error for an unknown or ambiguous name lists."""


def logs(
    sweep: Sweep, name: str, say: Callable[[str], None], *, follow: bool = False, every_s: float = 2.0, stop: threading.Event | None = None
) -> None:
    """Print the history of a trial and where the store keeps its checkpoints and pictures.

    Args:
        name: the trial's label, or a prefix of its ID.
        say: prints one line.
        follow: print new lines until the trial finishes, fails with no retries left, or `stop` is set.

    Raises:
        SweepError: `name` matches no trial or several.
    """
    plan = find_trial(sweep, name)
    manifest = sweep.manifests.get(plan.trial_id)
    if manifest is None:
        say(f"trial {plan.trial_id} {plan.label}: not started yet")
    printed = _print_new(manifest, set(), say)
    if follow:
        watched = with_short_store_timeout(sweep)
        with muted_store_warnings():
            manifest = _follow(watched, plan.trial_id, manifest, printed, say, every_s=every_s, stop=stop or threading.Event())
    for line in stored_objects(manifest, sweep.store.uri) if manifest else ():
        say(line)


def find_trial(sweep: Sweep, name: str) -> TrialPlan:
    """The trial with the label `name` or with an ID that starts with it.

    Raises:
        SweepError: no trial or several match; the text lists candidates.
    """
    labelled = [plan for plan in sweep.plans if plan.label == name]
    matching = labelled or [plan for plan in sweep.plans if name and plan.trial_id.startswith(name)]
    if len(matching) == 1:
        return matching[0]
    if not sweep.plans:
        raise SweepError(f"{name}: no trial of sweep {sweep.name} has started yet")
    near = matching or [plan for plan in sweep.plans if name and name in plan.label] or sweep.plans
    listed = ", ".join(f"{plan.trial_id} ({plan.label})" for plan in near[:CANDIDATES])
    more = f", and {len(near) - CANDIDATES} more" if len(near) > CANDIDATES else ""
    fault = "matches the IDs of several trials" if matching else "no trial has this label or an ID that starts with it"
    raise SweepError(f"{name}: {fault}; give one of {listed}{more}")


def _follow(
    sweep: Sweep,
    trial_id: str,
    manifest: Manifest | None,
    printed: set[Key],
    say: Callable[[str], None],
    *,
    every_s: float,
    stop: threading.Event,
) -> Manifest | None:
    """Print new lines until the trial ends. Returns its last manifest."""
    unavailable = False
    while not _ended(manifest, sweep) and not stop.wait(every_s):
        try:
            manifest = read_manifest(sweep.store, sweep.name, trial_id) or manifest
        except SweepError as error:
            if not unavailable:
                say(f"{error}; retrying")
            unavailable = True
            continue
        if unavailable:
            say("the store answers again")
        unavailable = False
        printed = _print_new(manifest, printed, say)
    return manifest


def _ended(manifest: Manifest | None, sweep: Sweep) -> bool:
    if manifest is None or not manifest.status.is_final:
        return False
    return manifest.status is TrialState.FINISHED or budget_spent(manifest, sweep.spec.retries, driver=manifest.driver)


def _print_new(manifest: Manifest | None, printed: Iterable[Key], say: Callable[[str], None]) -> set[Key]:
    """Print the lines whose keys are not in `printed`. Returns the keys of all lines printed so far."""
    before = set(printed)
    lines = list(history(manifest)) if manifest else []
    for key, line in lines:
        if key not in before:
            say(one_line(line))
    return before | {key for key, _ in lines}
