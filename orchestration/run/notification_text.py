"""What there is to tell of a sweep, as a text, as a message for a webhook, and as facts for a command. Sends nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestration.errors import without_password
from orchestration.observe.status import failures
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import SCORE
from orchestration.sweep import Sweep

LONGEST_TEXT = 2900
"""Characters: Slack takes 3000 in a block."""

FAILURES_TOLD = 5
"""The notice of a sweep's end names so many failed trials."""

Kind = Literal["end", "failed", "breaker"]


@dataclass(frozen=True)
class Notification:
    """One thing to tell."""

    event: Kind
    sweep: str
    text: str
    finished: int
    total: int
    trial: str = ""
    label: str = ""
    reason: str = ""


def ended(sweep: Sweep, *, stopped: str | None = None) -> Notification:
    """The sweep has ended; `stopped` says why, where that was before its trials did."""
    failed = failures(sweep.plans, sweep.manifests)
    how = f"stopped: {stopped}" if stopped else "finished" if sweep.complete else f"ended, {len(failed)} failed"
    more = [f"and {len(failed) - FAILURES_TOLD} more failed"] if len(failed) > FAILURES_TOLD else []
    text = "\n".join([f"Sweep {sweep.name} {how}; {sweep.count}", *_best(sweep), *failed[:FAILURES_TOLD], *more])
    return _clean(Notification("end", sweep.name, text, len(sweep.plans) - len(sweep.unfinished), sweep.total, reason=how))


def failed(plan: TrialPlan, reason: str, *, finished: int, total: int) -> Notification:
    """A trial has failed for good."""
    text = f"Sweep {plan.sweep}: trial {plan.label} ({plan.trial_id}) failed for good: {reason}\n{finished} of {total} finished"
    return _clean(Notification("failed", plan.sweep, text, finished, total, plan.trial_id, plan.label, reason))


def tripped(sweep: str, reason: str, *, finished: int, total: int) -> Notification:
    """The circuit breaker has stopped the sweep."""
    text = f"Sweep {sweep}: {reason}\n{finished} of {total} finished"
    return _clean(Notification("breaker", sweep, text, finished, total, reason=reason))


def message(notice: Notification) -> dict[str, Any]:
    """What a webhook is sent that takes Slack's messages; plain text where blocks are understood, so that no label turns into an emoji."""
    escaped = notice.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    block = {"type": "section", "text": {"type": "plain_text", "text": notice.text, "emoji": False}}
    return {"text": escaped, "blocks": [block]}


def variables(notice: Notification) -> dict[str, str]:
    """The environment in which a command finds the facts; what does not apply is empty."""
    return {
        "RRN_EVENT": notice.event,
        "RRN_SWEEP": notice.sweep,
        "RRN_TRIAL": notice.trial,
        "RRN_LABEL": notice.label,
        "RRN_REASON": notice.reason,
        "RRN_FINISHED": str(notice.finished),
        "RRN_TOTAL": str(notice.total),
        "RRN_TEXT": notice.text,
    }


def _best(sweep: Sweep) -> list[str]:
    """The best of all finished trials, by the rule `best`."""
    found = [(plan, sweep.manifests[plan.trial_id]) for plan in sweep.plans if plan not in sweep.unfinished]
    scored = [(manifest.best.metrics[SCORE], manifest.best.epoch, plan) for plan, manifest in found if manifest.best]
    if not scored:
        return []
    score, epoch, plan = max(scored, key=lambda one: one[0])
    return [f"best {SCORE} {score:.3f}: {plan.label} after epoch {epoch} of {plan.config.epochs}, both chosen on the validation list"]


def _clean(notice: Notification) -> Notification:
    """Without passwords, cut, and of characters that an environment can hold."""

    def clean(text: str) -> str:
        text = without_password(text).replace("\0", "").encode(errors="replace").decode()
        return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."

    return replace(notice, text=clean(notice.text), label=clean(notice.label), reason=clean(notice.reason))
