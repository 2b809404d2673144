"""The published numbers of a sweep file beside those of our finished trials, as a list or in the form of the paper's own table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from orchestration.compare.columns import TableColumn, texts
from orchestration.compare.comparison import seeds_named
from orchestration.compare.metrics import NONE, PLUS_MINUS, mean_and_sd, measured_on, metric_name, number, signed
from orchestration.compare.text_tables import latex, markdown
from orchestration.formatting import label, table
from orchestration.plan.spec import Published, PublishedRow
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest
from orchestration.record.trial_state import TrialState

Form = Literal["text", "md", "latex"]
_PARTITION = "partition"


@dataclass(frozen=True)
class Reproduction:
    """A published number beside those of our finished trials that differ only in the seed. All in percent."""

    name: str
    """Its name in the source; else the settings that distinguish it."""
    row: str
    """The same without the partition."""
    partition: str | None
    metric: str
    value: float | None
    seeds: tuple[int, ...] = ()
    last: tuple[float, ...] = ()
    """After the last epoch, one for each seed."""
    highest: tuple[float, ...] = ()
    """At the epoch where this very metric is highest."""


PublishedColumn = TableColumn[Reproduction]


def _ours(name: str, help: str, values: Callable[[Reproduction], Sequence[float]]) -> tuple[PublishedColumn, PublishedColumn]:
    """The columns of our mean and of its difference to the published number."""

    def average(at: Reproduction) -> float | None:
        return mean(values(at)) if values(at) else None

    def difference(at: Reproduction) -> float | None:
        return mean(values(at)) - at.value if values(at) and at.value is not None else None

    return (
        PublishedColumn(name, help, average, lambda at: mean_and_sd(values(at), at.metric)),
        PublishedColumn("difference", "to the published number", difference, lambda at: signed(difference(at), at.metric)),
    )


_HIGHEST_HELP = "at the epoch where the row's own metric is highest, chosen on the very images that it is measured on"
ROW = PublishedColumn("row", "name in the source; else the settings that distinguish it", lambda at: at.name)
METRIC = PublishedColumn("metric", "metric of the published number, in percent", lambda at: metric_name(at.metric))
PUBLISHED = PublishedColumn("published", "number of the source", lambda at: at.value, lambda at: number(at.value, at.metric))
LAST, LAST_DIFFERENCE = _ours("ours: last", "after the last epoch", lambda at: at.last)
HIGHEST, HIGHEST_DIFFERENCE = _ours("ours: highest", _HIGHEST_HELP, lambda at: at.highest)
SEEDS = PublishedColumn("seeds", "number of seeds of ours", lambda at: len(at.seeds) or None)
COLUMNS = (ROW, METRIC, PUBLISHED, LAST, LAST_DIFFERENCE, HIGHEST, HIGHEST_DIFFERENCE, SEEDS)


def reproductions(numbers: Published, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[Reproduction]:
    """Every published number with ours; a `when` that fits several kinds of trials gives one for each kind."""
    return [found for row in numbers.rows for found in _reproduced(row, plans, manifests)]


def notes(numbers: Published, found: Sequence[Reproduction]) -> list[str]:
    """What the published numbers and ours are."""
    seeds = {seed for reproduction in found for seed in reproduction.seeds}
    over = f"the seeds of finished trials{f' ({seeds_named(seeds)})' if seeds else ''}"
    helps = f"last: {LAST.help}; highest: {HIGHEST.help}"
    ours = f"ours: in percent, mean {PLUS_MINUS} sample standard deviation over {over}, and the difference to the published number; {helps}"
    return [f"published: {numbers.source}", ours]


def published_table(numbers: Published, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], *, form: Form = "text") -> str:
    """Published numbers beside ours, in percent, with how ours were measured below; a column for each partition where there are several."""
    found = reproductions(numbers, plans, manifests)
    by_partition = _fit_partitions(found)
    head, *rows = _by_partition(found) if by_partition else [[column.name for column in COLUMNS], *texts(COLUMNS, found)]
    split = (f"split: {line}" for line in measured_on(plan.config.model_dump(mode="json") for plan in plans))
    below = [*notes(numbers, found), *split]
    match form:
        case "text":
            return "\n".join([table([head, *rows]), *below])
        case "md":
            return markdown(head, rows, below)
    size, left = (3, 3) if by_partition else (1, 2)
    name = f"published-{plans[0].sweep if plans else ''}"
    return latex(head, rows, below, name=name, left=left, blocks=[size] * (len(rows) // size))


def _reproduced(row: PublishedRow, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[Reproduction]:
    kinds: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        if _fits(plan, row):
            kinds.setdefault(_kind(plan, row), []).append(plan)
    return [_reproduction(row, kind if len(kinds) > 1 else "", fitting, manifests) for kind, fitting in (kinds or {"": []}).items()]


def _fits(plan: TrialPlan, row: PublishedRow) -> bool:
    """Whether the trial has every setting that the row names, at its value."""
    settings = plan.config.model_dump(mode="json", include=set(row.when))
    return all(name in settings and settings[name] == value for name, value in row.when.items())


def _kind(plan: TrialPlan, row: PublishedRow) -> str:
    """The settings of a trial that the row does not name, except the seed."""
    return label({key: value for key, value in plan.settings.items() if key not in {*row.when, "seed"}})


def _reproduction(row: PublishedRow, kind: str, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> Reproduction:
    found = [(plan, manifests[plan.trial_id]) for plan in plans if plan.trial_id in manifests]
    finished = {plan.config.seed: manifest for plan, manifest in found if manifest.status is TrialState.FINISHED}
    measured = {seed: values for seed, manifest in finished.items() if (values := _history(manifest, row.metric))}
    partition = row.when.get(_PARTITION)
    name = row.name or label(row.when)
    others = {key: value for key, value in row.when.items() if key != _PARTITION}
    only = {"method": plans[0].config.method} if plans else {}
    short = (row.name or "").removesuffix(f" {partition}") or label(others or only)
    return Reproduction(
        f"{name} {kind}".rstrip(),
        f"{short} {kind}".rstrip(),
        partition,
        row.metric,
        row.value,
        tuple(measured),
        tuple(values[-1] for values in measured.values()),
        tuple(map(max, measured.values())),
    )


def _history(manifest: Manifest, metric: str) -> list[float]:
    """The metric after each epoch, in percent; empty where the trial does not report it."""
    return [100 * entry.metrics[metric] for entry in manifest.history if metric in entry.metrics]


def _fit_partitions(found: Sequence[Reproduction]) -> bool:
    """Whether the numbers fill a table with a column for each partition."""
    places = {(reproduction.row, reproduction.metric, reproduction.partition) for reproduction in found}
    partitions = {reproduction.partition for reproduction in found}
    return len(places) == len(found) and len(partitions) > 1 and None not in partitions


def _by_partition(found: Sequence[Reproduction]) -> Iterator[list[str]]:
    """Head and rows, as papers print them: a column for each partition; for each published row its numbers, ours at the last epoch, ours
    at the highest."""
    partitions = list(dict.fromkeys(one.partition for one in found))
    yield [ROW.name, METRIC.name, "number", SEEDS.name, *map(str, partitions)]
    rows: dict[tuple[str, str], dict[str | None, Reproduction]] = {}
    for one in found:
        rows.setdefault((one.row, METRIC.text(one)), {})[one.partition] = one
    for (name, metric), by_partition in rows.items():
        of_row = [by_partition.get(partition) for partition in partitions]
        yield [name, metric, PUBLISHED.name, "", *(PUBLISHED.text(one) if one else NONE for one in of_row)]
        for column, difference in ((LAST, LAST_DIFFERENCE), (HIGHEST, HIGHEST_DIFFERENCE)):
            yield ["", "", column.name, _counts(of_row), *(_beside(one, column, difference) if one else NONE for one in of_row)]


def _counts(found: Sequence[Reproduction | None]) -> str:
    """Number of seeds, by partition where they differ."""
    counts = [SEEDS.text(one) if one else NONE for one in found]
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def _beside(one: Reproduction, column: PublishedColumn, difference: PublishedColumn) -> str:
    """`71.20 +- 0.31 (+0.42)`."""
    beside = difference.text(one)
    return column.text(one) if beside == NONE else f"{column.text(one)} ({beside})"
