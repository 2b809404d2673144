"""The tables of a paper in their own form: its numbers beside those of our finished trials."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from orchestration.compare.comparison import seeds_named
from orchestration.compare.metrics import measured_on
from orchestration.compare.text_tables import NONE, PLUS_MINUS, latex, markdown
from orchestration.formatting import label, table
from orchestration.plan.spec import Published, PublishedRow
from orchestration.plan.trial_plan import TrialPlan
from orchestration.record.manifest import Manifest

Form = Literal["text", "md", "latex"]
_PARTITION = "partition"
_NUMBERS = 3
"""Rows for each published one: its own, ours after the last epoch, ours at the highest."""


@dataclass(frozen=True)
class Reproduction:
    """A published number beside those of our finished trials that differ in nothing but the seed. All in percent."""

    name: str
    """What the source calls it; else what distinguishes it."""
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


def reproductions(numbers: Published, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[Reproduction]:
    """Every published number with what we have for it; one `when` that fits several kinds of trials gives one for each."""
    return [found for row in numbers.rows for found in _reproduced(row, plans, manifests)]


def published_table(numbers: Published, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest], *, form: Form = "text") -> str:
    """Published numbers beside ours, in percent, with how ours were measured below; a column for each partition where there are several."""
    found = reproductions(numbers, plans, manifests)
    parted = _fit_partitions(found)
    head, *rows = _by_partition(found) if parted else _listed(found)
    seeds = sorted({seed for reproduction in found for seed in reproduction.seeds})
    notes = [
        f"published: {numbers.source}",
        f"ours: in percent, mean {PLUS_MINUS} sample standard deviation over the seeds of finished trials"
        f"{f' ({seeds_named(seeds)})' if seeds else ''}, and the difference to the published number; last: after the last epoch;"
        " highest: at the epoch where the row's own metric is highest, chosen on the very images that it is measured on",
        *(f"split: {line}" for line in measured_on(plan.config.model_dump(mode="json") for plan in plans)),
    ]
    if form == "text":
        return "\n".join([table([head, *rows]), *notes])
    if form == "md":
        return markdown(head, rows, notes)
    size = _NUMBERS if parted else 1
    return latex(
        head, rows, notes, name=f"published-{plans[0].sweep if plans else ''}", left=3 if parted else 2, blocks=[size] * (len(rows) // size)
    )


def _reproduced(row: PublishedRow, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> list[Reproduction]:
    kinds: dict[str, list[TrialPlan]] = {}
    for plan in plans:
        if _fits(plan, row):
            kinds.setdefault(_kind(plan, row), []).append(plan)
    return [_reproduction(row, kind if len(kinds) > 1 else "", fitting, manifests) for kind, fitting in (kinds or {"": []}).items()]


def _fits(plan: TrialPlan, row: PublishedRow) -> bool:
    settings = plan.config.model_dump(mode="json", include=set(row.when))
    return all(settings.get(key) == value for key, value in row.when.items())


def _kind(plan: TrialPlan, row: PublishedRow) -> str:
    """What a fitting trial varies beyond the row and the seed."""
    return label({key: value for key, value in plan.settings.items() if key not in {*row.when, "seed"}})


def _reproduction(row: PublishedRow, kind: str, plans: Sequence[TrialPlan], manifests: Mapping[str, Manifest]) -> Reproduction:
    found = [(plan, manifests[plan.trial_id]) for plan in plans if plan.trial_id in manifests]
    finished = {plan.config.seed: manifest for plan, manifest in found if manifest.status == "finished"}
    histories = [[100 * entry.metrics[row.metric] for entry in manifest.history] for manifest in finished.values()]
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
        tuple(finished),
        tuple(values[-1] for values in histories),
        tuple(map(max, histories)),
    )


def _fit_partitions(found: Sequence[Reproduction]) -> bool:
    """Whether the numbers fill a table with a column for each partition."""
    places = {(reproduction.row, reproduction.metric, reproduction.partition) for reproduction in found}
    partitions = {reproduction.partition for reproduction in found}
    return len(places) == len(found) and len(partitions) > 1 and None not in partitions


def _listed(found: Iterable[Reproduction]) -> Iterator[list[str]]:
    """Head and rows, a row a number."""
    yield ["row", "metric", "published", "ours: last", "diff", "highest", "diff", "seeds"]
    for one in found:
        ours = [text for values in (one.last, one.highest) for text in (_spread(values), _difference(values, one.value) or NONE)]
        yield [one.name, _metric(one), _published(one), *ours, str(len(one.seeds) or NONE)]


def _by_partition(found: Sequence[Reproduction]) -> Iterator[list[str]]:
    """Head and rows, as papers print them: _NUMBERS rows a published row, a column a partition."""
    partitions = list(dict.fromkeys(one.partition for one in found))
    yield ["row", "metric", "number", "seeds", *map(str, partitions)]
    rows: dict[tuple[str, str], dict[str | None, Reproduction]] = {}
    for one in found:
        rows.setdefault((one.row, _metric(one)), {})[one.partition] = one
    for (name, metric), by_partition in rows.items():
        of_row = [by_partition.get(partition) for partition in partitions]
        yield [name, metric, "published", "", *(_published(one) if one else NONE for one in of_row)]
        yield ["", "", "ours: last", _counts(of_row), *(_beside(one.last, one.value) if one else NONE for one in of_row)]
        yield ["", "", "ours: highest", _counts(of_row), *(_beside(one.highest, one.value) if one else NONE for one in of_row)]


def _counts(found: Sequence[Reproduction | None]) -> str:
    """Number of seeds, by partition where they differ."""
    counts = [str(len(one.seeds) or NONE) if one else NONE for one in found]
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def _beside(values: Sequence[float], published: float | None) -> str:
    difference = _difference(values, published)
    return f"{_spread(values)} ({difference})" if difference else _spread(values)


def _metric(one: Reproduction) -> str:
    return one.metric.removeprefix("val/")


def _published(one: Reproduction) -> str:
    return NONE if one.value is None else f"{one.value:.2f}"


def _spread(values: Sequence[float]) -> str:
    if not values:
        return NONE
    return f"{mean(values):.2f}" + (f" {PLUS_MINUS} {stdev(values):.2f}" if len(values) > 1 else "")


def _difference(values: Sequence[float], published: float | None) -> str | None:
    return f"{mean(values) - published:+.2f}" if values and published is not None else None
