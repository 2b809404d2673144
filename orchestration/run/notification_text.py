"""Compose notifications about a sweep: text, webhook message, environment variables. Sends nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestration.errors import without_password
from orchestration.observe.status import failures
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import SCORE
from orchestration.sweep import Sweep

LONGEST_TEXT = 2900
"""Characters. Slack accepts 3000 per block."""

MAX_FAILURES = 5
"""Failed trials that the notification about the end of a sweep names."""

Kind = Literal["end", "failed", "breaker"]


@dataclass(frozen=True)
class Notification:
    """One event of a sweep, ready to send."""

    event: Kind
    sweep: str
    text: str
    finished: int
    total: int
    trial: str = ""
    label: str = ""
    reason: str = ""


def ended(sweep: Sweep, *, stopped: str | None = None) -> Notification:
    """The sweep ended. `stopped`: why it ended before its trials did."""
    failed = failures(sweep.plans, sweep.manifests, sweep.states, sweep.unreadable)
    outcome = f"stopped: {stopped}" if stopped else "finished" if sweep.complete else f"ended, {len(failed)} failed"
    more = [f"and {len(failed) - MAX_FAILURES} more failed"] if len(failed) > MAX_FAILURES else []
    text = "\n".join([f"Sweep {sweep.name} {outcome}; {sweep.count}", *_best(sweep), *failed[:MAX_FAILURES], *more])
    return _clean(Notification("end", sweep.name, text, len(sweep.finished), sweep.total, reason=outcome))


def failed(plan: TrialPlan, reason: str, *, finished: int, total: int) -> Notification:
    """A trial failed and has no retries left."""
    text = f"Sweep {plan.sweep}: trial {plan.label} ({plan.trial_id}) failed, no retries left: {reason}\n{finished} of {total} finished"
    return _clean(Notification("failed", plan.sweep, text, finished, total, plan.trial_id, plan.label, reason))


def tripped(sweep: str, reason: str, *, finished: int, total: int) -> Notification:
    """The circuit breaker stopped the sweep."""
    text = f"Sweep {sweep}: {reason}\n{finished} of {total} finished"
    return _clean(Notification("breaker", sweep, text, finished, total, reason=reason))


def message(notification: Notification) -> dict[str, Any]:
    """JSON for a webhook in Slack's format. The block is plain text, so that Slack does not turn parts of a label into an emoji."""
    escaped = notification.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    block = {"type": "section", "text": {"type": "plain_text", "text": notification.text, "emoji": False}}
    return {"text": escaped, "blocks": [block]}


def variables(notification: Notification) -> dict[str, str]:
    """Environment variables for a command; a variable that does not apply is empty."""
    return {
        "RRN_EVENT": notification.event,
        "RRN_SWEEP": notification.sweep,
        "RRN_TRIAL": notification.trial,
        "RRN_LABEL": notification.label,
        "RRN_REASON": notification.reason,
        "RRN_FINISHED": str(notification.finished),
        "RRN_TOTAL": str(notification.total),
        "RRN_TEXT": notification.text,
    }


def _best(sweep: Sweep) -> list[str]:
    """One line: the finished trial with the highest score at its best epoch; empty if none is finished."""
    found = [(plan, sweep.manifests[plan.trial_id]) for plan in sweep.finished]
    scored = [(manifest.best.metrics[SCORE], manifest.best.epoch, plan) for plan, manifest in found if manifest.best]
    if not scored:
        return []
    score, epoch, plan = max(scored, key=lambda one: one[0])
    return [f"best {SCORE} {score:.3f}: {plan.label} after epoch {epoch} of {plan.config.epochs}, both chosen on the validation list"]


def _clean(notification: Notification) -> Notification:
    """The notification without passwords, at most LONGEST_TEXT long, in characters that an environment variable can hold."""

    def clean(text: str) -> str:
        text = without_password(text).replace("\0", "").encode(errors="replace").decode()
        return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 3]}..."

    return replace(notification, text=clean(notification.text), label=clean(notification.label), reason=clean(notification.reason))
