"""`logs`: what happened to one trial, followed from any machine that reaches the store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from orchestration.errors import SweepError
from orchestration.observe.trial_log import Key, kept, story
from orchestration.observe.watch import impatient, quiet_about_the_store
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest, read_manifest
from orchestration.record.trial_record import spent
from orchestration.sweep import Sweep

CANDIDATES = 8
"""So many trials are named where it is not clear which one is meant."""


def logs(
    sweep: Sweep, word: str, say: Callable[[str], None], *, follow: bool = False, every_s: float = 2.0, stop: threading.Event | None = None
) -> None:
    """Say what happened to a trial, line by line, and what the store keeps of it.

    Args:
        word: a beginning of the trial's identity, or its label.
        follow: go on as it goes on, until it has finished or failed for good, or `stop` is set.

    Raises:
        SweepError: `word` fits no trial, or several.
    """
    plan = find_trial(sweep, word)
    manifest = sweep.manifests.get(plan.trial_id)
    if manifest is None:
        say(f"trial {plan.trial_id} {plan.label}: not started yet")
    told = _tell(manifest, set(), say)
    if follow:
        with quiet_about_the_store():
            manifest = _followed(impatient(sweep), plan.trial_id, manifest, told, say, every_s=every_s, stop=stop or threading.Event())
    for line in kept(manifest, sweep.store.uri) if manifest else ():
        say(line)


def find_trial(sweep: Sweep, word: str) -> TrialPlan:
    """The trial with the label `word`, or whose identity begins so. Raises SweepError, with candidates, where none or several fit."""
    named = [plan for plan in sweep.plans if plan.label == word]
    fitting = named or [plan for plan in sweep.plans if word and plan.trial_id.startswith(word)]
    if len(fitting) == 1:
        return fitting[0]
    if not sweep.plans:
        raise SweepError(f"{word}: no trial of sweep {sweep.name} has started yet")
    near = fitting or [plan for plan in sweep.plans if word and word in plan.label] or sweep.plans
    listed = ", ".join(f"{plan.trial_id} ({plan.label})" for plan in near[:CANDIDATES])
    more = f", and {len(near) - CANDIDATES} more" if len(near) > CANDIDATES else ""
    what = "begins several identities" if fitting else "no trial has such a label, or an identity that begins so"
    raise SweepError(f"{word}: {what}; give one of {listed}{more}")


def _followed(
    sweep: Sweep,
    trial_id: str,
    manifest: Manifest | None,
    told: set[Key],
    say: Callable[[str], None],
    *,
    every_s: float,
    stop: threading.Event,
) -> Manifest | None:
    """Tell what is new of a trial until it is over; its last manifest."""
    away = False
    while not _is_over(manifest, sweep) and not stop.wait(every_s):
        try:
            manifest = read_manifest(sweep.store, sweep.name, trial_id) or manifest
        except SweepError as error:
            if not away:
                say(f"{error}; following on")
            away = True
            continue
        if away:
            say("the store answers again")
        away = False
        told = _tell(manifest, told, say)
    return manifest


def _is_over(manifest: Manifest | None, sweep: Sweep) -> bool:
    if manifest is None or manifest.status == "running":
        return False
    return manifest.status == "finished" or spent(manifest, sweep.spec.retries, driver=manifest.driver)


def _tell(manifest: Manifest | None, told: Iterable[Key], say: Callable[[str], None]) -> set[Key]:
    """Say what was not told yet; all that is told now."""
    before = set(told)
    for key, line in story(manifest) if manifest else ():
        if key not in before:
            say(line)
    return before | {key for key, _ in (story(manifest) if manifest else ())}
