"""Descriptions for MLflow, in Markdown: of a trial from its manifest, of a sweep from summaries of its trials."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from orchestration.formatting import label
from orchestration.plan.trial_plan import ID_LENGTH
from orchestration.record.manifest import SCORE, EpochMetrics, Manifest
from orchestration.record.stored_trials import varied_settings
from orchestration.record.trial_state import TrialState
from orchestration.tracking.dataset_inputs import counts, split_hash

_HEADS = ("branch1", "branch2", "ensemble")
_MOST_CELLS, _MOST_SPLITS = 20, 10  # lines of a list, since MLflow bounds the length of a description


@dataclass(frozen=True)
class SweepFacts:
    """What the manifests of a sweep do not hold."""

    about: str = ""
    """Its purpose."""
    command: str = ""
    """Runs the whole sweep again."""
    total: int = 0
    """Trials in all, where a search has not proposed all of them yet."""


@dataclass(frozen=True)
class TrialSummary:
    """A trial, for the description of its sweep."""

    label: str
    cell: str
    """Its label without the seed."""
    seed: int | None
    state: TrialState
    epochs: int
    last: float | None
    """`val/miou` of the newest epoch, in 0..1; None before the first epoch, or if it is undefined."""
    best: float | None
    """The highest `val/miou`."""
    best_epoch: int | None
    method: str
    data: str
    varied: tuple[str, ...]
    reason: str
    drawn: int
    """The newest epoch that has pictures; 0 while none has."""


def summary_of(manifest: Manifest, state: TrialState) -> TrialSummary:
    last, best, config = manifest.last, manifest.best, manifest.config
    return TrialSummary(
        label=label_of(manifest),
        cell=cell_of(manifest),
        seed=config.get("seed"),
        state=state,
        epochs=manifest.epochs,
        last=last.score if last else None,
        best=best.score if best else None,
        best_epoch=best.epoch if best else None,
        method=str(config.get("method")),
        data=_data(config),
        varied=manifest.varied,
        reason=manifest.failure_text,
        drawn=max((pictures.epoch for pictures in manifest.pictures), default=0),
    )


def label_of(manifest: Manifest) -> str:
    """The label of the trial's plan. Release 0.1 stored labels with settings that the method does not have."""
    return label(varied_settings(manifest))


def cell_of(manifest: Manifest) -> str:
    """The common label of trials that differ only in the seed."""
    return label({name: value for name, value in varied_settings(manifest).items() if name != "seed"})


def trial_note(manifest: Manifest, *, store: str, state: TrialState) -> str:
    """Method, data, state and result of a trial, and how to run it again."""
    config = manifest.config
    command = f"rrn-sweep config.yaml{'' if config.get('dataset') == 'digits' else ' --data-root DATA'}"
    facts = {
        "Method": f"{text(config.get('method'))}, {text(config.get('backbone'))}, {config.get('epochs')} epochs, seed {config.get('seed')}",
        "Data": _data(config),
        "State": _state(manifest, state),
        "Result": _result(manifest),
        "Checkpoints": ", ".join(_checkpoints(manifest, store)),
        "Run again": f"download `config.yaml` from the artifacts, then {code(command)}",
    }
    lines = [f"- **{name}:** {value}" for name, value in facts.items() if value]
    return "\n".join([f"Trial {code(manifest.trial_id)} of the sweep {text(manifest.sweep)}: **{text(label_of(manifest))}**", "", *lines])


def sweep_note(name: str, summaries: Sequence[TrialSummary], facts: SweepFacts, *, links: Mapping[str, str], total: int) -> str:
    """What a sweep compares, its state, results and data, and how to run it again.

    Args:
        summaries: of the trials that have started, in the order of the file.
        links: URLs by their text.
        total: trials of the file.
    """
    paragraphs = [
        " · ".join(f"[{text(title)}]({url})" for title, url in links.items()),
        f"Sweep **{text(name)}**{_compares(summaries)}",
        text(facts.about),
        f"**State:** {_states(summaries, max(total, facts.total, len(summaries)))}",
        *_failures(summaries),
        *_results(summaries),
        "**Data:**\n\n" + "\n".join(_listed(dict.fromkeys(summary.data for summary in summaries), _MOST_SPLITS)) if summaries else "",
        f"**Run again:**\n\n    {' '.join(facts.command.split())}" if facts.command else "",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def text(value: object) -> str:
    """`value` escaped for Markdown, in one line."""
    line = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"[\\`*_\[\]#|~]", lambda found: f"&#{ord(found[0])};", line)


def code(value: object) -> str:
    """`value` as Markdown code, in one line."""
    return "`" + " ".join(str(value).replace("`", "'").split()) + "`"


def percent(values: Iterable[float | None]) -> str:
    """`41.20 ± 0.31`: mean and sample standard deviation, in percent, of shares in 0..1."""
    known = [100 * value for value in values if value is not None]
    return f"{mean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "") if known else "-"


def _data(config: Mapping[str, Any]) -> str:
    images = counts(config)
    chosen = f"{text(config.get('dataset'))}, partition {text(config.get('partition'))} ({code(config.get('partition_by'))})"
    return f"{chosen}{f': {images}' if images else ''}; split {code(split_hash(config)[:ID_LENGTH])}"


def _state(manifest: Manifest, state: TrialState) -> str:
    done = f"{manifest.epochs} of {manifest.config.get('epochs', '?')} epochs"
    outcomes = [attempt.outcome or "open" for attempt in manifest.attempts]
    attempts = f"; {len(outcomes)} attempt{'s' if len(outcomes) > 1 else ''}: {', '.join(outcomes)}" if outcomes else ""
    reason = f"; {text(manifest.failure_text)}" if manifest.reason else ""
    return f"{state}, {done}{attempts}{reason}"


def _result(manifest: Manifest) -> str:
    last, best = manifest.last, manifest.best
    if last is None or best is None:
        return ""
    rule = "after the last epoch" if manifest.status is TrialState.FINISHED else "after the newest epoch"
    heads = ", ".join(head for head in _HEADS if f"{SCORE}_{head}" in last.metrics)
    return (
        f"mIoU in percent on the validation list ({heads or 'reported'}): {rule}, {last.epoch}: {_scores(last)};"
        f" at the best epoch, {best.epoch}: {_scores(best)} (highest {SCORE}, chosen on the images that it is measured on)"
    )


def _scores(entry: EpochMetrics) -> str:
    heads = [entry.metrics[f"{SCORE}_{head}"] for head in _HEADS if f"{SCORE}_{head}" in entry.metrics]
    known = heads or ([entry.score] if entry.score is not None else [])
    return " / ".join(f"{100 * value:.2f}" for value in known) or "undefined"


def _checkpoints(manifest: Manifest, store: str) -> Iterator[str]:
    last, best = max(manifest.checkpoints, key=lambda c: c.step, default=None), manifest.best_checkpoint
    for rule, checkpoint in (("last", last), ("best", best)):
        if checkpoint:
            folder = min(ref.key for ref in checkpoint.objects.values()).rpartition("/")[0]
            place = f"{store.rstrip('/')}/{folder}"
            yield f"{rule} {code(place)}"


def _compares(summaries: Sequence[TrialSummary]) -> str:
    if not summaries:
        return ""
    names = [code(name) for name in summaries[-1].varied if name != "seed"]
    methods = ", ".join(sorted({text(summary.method) for summary in summaries}))
    seeds = ", ".join(map(str, sorted({summary.seed for summary in summaries if summary.seed is not None})))
    return f" compares {', '.join(names) or 'seeds'}; method {methods}; seeds {seeds}"


def _states(summaries: Sequence[TrialSummary], total: int) -> str:
    trials = Counter[str](summary.state for summary in summaries)
    trials["not started"] = total - len(summaries)
    others = [f"{count} {state}" for state, count in trials.items() if count and state != "finished"]
    return ", ".join([f"{trials['finished']} of {total} trials finished", *others])


def _failures(summaries: Sequence[TrialSummary]) -> list[str]:
    failed = [f"{text(summary.label)}: {text(summary.reason[:200])}" for summary in summaries if summary.state is TrialState.FAILED]
    return ["**Failed:**\n\n" + "\n".join(_listed(failed, 3))] if failed else []


def _results(summaries: Sequence[TrialSummary]) -> list[str]:
    """A line for each cell that has finished trials."""
    cells: dict[str, list[TrialSummary]] = {}
    for summary in summaries:
        if summary.state is TrialState.FINISHED:
            cells.setdefault(summary.cell, []).append(summary)
    if not cells:
        return []
    head = [
        f"**Result:** {SCORE} in percent on the validation list, finished trials, mean ± sample standard deviation over seeds; last: after"
        " the last epoch; best: at each trial's epoch with the highest value, chosen on the images that it is measured on",
        "",
        "| trials | seeds | last | best |\n|---|---|---|---|",
    ]
    rows = [_row(cell, trials) for cell, trials in list(cells.items())[:_MOST_CELLS]]
    more = [f"\n{len(cells) - len(rows)} more in the charts"] if len(cells) > len(rows) else []
    return ["\n".join([*head, *rows, *more]), _highest(cells)]


def _row(cell: str, trials: Sequence[TrialSummary]) -> str:
    last, best = (percent(summary.last for summary in trials), percent(summary.best for summary in trials))
    return f"| {text(cell)} | {len(trials)} | {last} | {best} |"


def _highest(cells: Mapping[str, Sequence[TrialSummary]]) -> str:
    last, best = ({cell: mean(_known(trials, rule)) for cell, trials in cells.items() if _known(trials, rule)} for rule in ("last", "best"))
    parts = [
        f"{rule}: {text(top)} with {100 * means[top]:.2f}"
        for rule, means in (("last", last), ("best", best))
        if means and (top := max(means, key=lambda cell: means[cell]))
    ]
    return f"**Highest mean** by rule {'; '.join(parts)}" if parts else ""


def _known(trials: Sequence[TrialSummary], rule: str) -> list[float]:
    values = [summary.last if rule == "last" else summary.best for summary in trials]
    return [value for value in values if value is not None]


def _listed(lines: Iterable[str], most: int) -> list[str]:
    every = list(lines)
    return [f"- {line}" for line in every[:most]] + ([f"- and {len(every) - most} more"] if len(every) > most else [])
