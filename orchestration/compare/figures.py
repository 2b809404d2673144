"""The figures of a comparison: metric against settings and labelled share, parallel coordinates; the others from their own files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestration.compare.comparison import Comparison, named, parted, seeds_named
from orchestration.compare.curves import by_class, head_of, learning_curves, loss_curves
from orchestration.compare.heat_maps import heat_map
from orchestration.compare.metrics import axis_title, metric_name
from orchestration.compare.plot_points import (
    CellPoint,
    PlotLine,
    averaged,
    cell_points,
    free,
    lines,
    logarithmic,
    measured,
    numeric,
    position,
    share,
    values_of,
)
from orchestration.compare.results import setting_keys, value_key
from orchestration.compare.theme import COLOURS, LOW_TO_HIGH, NEUTRAL, SeriesStyle, blank, series_style, text
from orchestration.formatting import shown
from orchestration.plan.spec import PublishedRow
from orchestration.record.manifest import SCORE

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_FEW = 9
"""Up to this many different numbers, each has a tick."""
_BELOW = 0.15
"""Distance of the place for cells without the setting below the lowest value, as a share of the range of values."""


def figures(comparison: Comparison, published: Sequence[PublishedRow] = ()) -> dict[str, Figure]:
    """Every figure that the data can fill, by a name fit for a file, in reading order.

    Args:
        published: rows with a partition are drawn beside ours.
    """
    names = free([point.settings for point in cell_points(comparison)])
    found = {"labelled-share": by_share(comparison, published)}
    found |= {f"against-{name}": by_setting(comparison, name) for name in names}
    found |= {f"heat-map-{a}-{b}": heat_map(comparison, a, b) for a, b in itertools.combinations(names, 2)}
    found["parallel-coordinates"] = parallel_coordinates(comparison)
    found["classes"] = by_class(comparison)
    found["learning-curves"] = learning_curves(comparison)
    found["losses"] = loss_curves(comparison)
    return {name: figure for name, figure in found.items() if figure is not None}


def by_setting(comparison: Comparison, name: str) -> Figure | None:
    """The metric against a number that varies: a line for each set of trials that differ in nothing else, or points where no two do.

    Cells without the setting are left out. None where the setting is no number, or has one value.
    """
    found = cell_points(comparison)
    names = free([point.settings for point in found])
    if name not in names or not numeric(found, name):
        return None
    having = [point for point in found if name in point.settings]
    joined = [line for line in lines(having, name, names) if len(line.points) > 1]
    drawn = joined or _by_group(having)
    points = [point for line in drawn for point in line.points]
    left_out = [] if len(having) == len(found) else [f"cells without {name} are left out"]
    figure = blank(f"{metric_name(comparison.metric)} against {name}", *_subtitle(comparison, joined, *left_out))
    _draw(figure, drawn, [point.settings[name] for point in points], joined=bool(joined))
    figure.update_yaxes(title_text=text(axis_title(comparison.metric)))
    figure.update_xaxes(title_text=text(name), **_ticks(values_of(points, name)))
    return figure


def by_share(comparison: Comparison, published: Sequence[PublishedRow] = ()) -> Figure | None:
    """The metric against the labelled share, which doubles from tick to tick, with the published numbers dashed; None for one partition."""
    found = [point for point in cell_points(comparison) if share(str(point.settings.get("partition")), point.config)]
    names = free([point.settings for point in found])
    if "partition" not in names:
        return None
    drawn = lines(found, "partition", names)
    figure = blank(f"{metric_name(comparison.metric)} against the labelled share", *_subtitle(comparison, drawn))
    _draw(figure, drawn, [position(point.settings["partition"], point.config) for line in drawn for point in line.points])
    ticks = {position(value, found[0].config): str(value) for value in values_of(found, "partition")}
    for rows in _published_lines(published, comparison, found[0]):
        shares = {position(row.when["partition"], found[0].config): row for row in rows}
        ticks |= {at: str(row.when["partition"]) for at, row in shares.items()}
        _draw_published(figure, named(rows[0].when, [name for name in rows[0].when if name != "partition"]), drawn, shares)
    figure.update_yaxes(title_text=text(axis_title(comparison.metric)))
    figure.update_xaxes(title_text="labelled training images", type="log", tickvals=list(ticks), ticktext=list(map(text, ticks.values())))
    return figure


def parallel_coordinates(comparison: Comparison) -> Figure | None:
    """A line for each trial through its settings to its value; None where fewer than two settings vary."""
    import plotly.graph_objects as go

    found = cell_points(comparison)
    names = free([point.settings for point in found])
    if len(names) < 2:
        return None
    trials = [(point, value) for point in found for value in point.cell.values.values()]
    scores = [value for _, value in trials]
    how = f"one line for each trial, {seeds_named(result.seed for result in comparison.used)}; drag along an axis to choose lines"
    figure = blank(f"Settings and {metric_name(comparison.metric)}", measured(comparison), how)
    axes = [_axis([point for point, _ in trials], name) for name in names]
    axes.append({"label": text(axis_title(comparison.metric)), "values": scores})
    line = {"color": scores, "colorscale": LOW_TO_HIGH}
    figure.add_trace(go.Parcoords(dimensions=axes, line=line, unselected={"line": {"opacity": 0.08}}, labelside="top"))
    figure.update_layout(margin={"t": 150, "l": 70, "r": 50, "b": 30}, meta={"min_width": 75 * len(axes), "wide": True})
    return figure


def _subtitle(comparison: Comparison, drawn: Sequence[PlotLine], *more: str) -> tuple[str, str]:
    """What is measured, over which seeds, and the label of a single line, which has no legend."""
    only = drawn[0].label if len(drawn) == 1 else ""
    return measured(comparison), "; ".join(filter(None, (averaged(comparison), only, *more)))


def _draw(figure: Figure, drawn: Sequence[PlotLine], xs: Iterable[float], *, joined: bool = True) -> None:
    """Means with their standard deviation, and every seed; `xs` for the points of all lines in turn."""
    places = iter(xs)
    for line, style in zip(drawn, _styles(drawn), strict=True):
        at = list(itertools.islice(places, len(line.points)))
        _draw_means(figure, line, at, style, joined=joined)
        _draw_seeds(figure, line, at, style)
    figure.update_layout(showlegend=len(drawn) > 1)


def _draw_means(figure: Figure, line: PlotLine, at: list[float], style: SeriesStyle, *, joined: bool) -> None:
    name = line.label or "ours"
    spread = [point.cell.sd or 0 for point in line.points]
    figure.add_scatter(
        x=at,
        y=[point.mean for point in line.points],
        error_y={"array": spread, "thickness": 1.5, "width": 0} if any(spread) else None,
        name=text(name),
        legendgroup=text(name),
        mode="lines+markers" if joined else "markers",
        line={"color": style.colour, "dash": style.dash, "width": 2},
        marker={"color": style.colour, "symbol": style.symbol, "size": 9},
        hovertext=[text(_hover(point)) for point in line.points],
        hoverinfo="text",
    )


def _draw_seeds(figure: Figure, line: PlotLine, at: list[float], style: SeriesStyle) -> None:
    """The single runs of a mean."""
    several = [(x, point) for x, point in zip(at, line.points, strict=True) if len(point.cell.values) > 1]
    runs = [(x, point, seed, value) for x, point in several for seed, value in point.cell.values.items()]
    if runs:
        figure.add_scatter(
            x=[x for x, *_ in runs],
            y=[value for *_, value in runs],
            legendgroup=text(line.label or "ours"),
            showlegend=False,
            mode="markers",
            marker={"color": style.colour, "symbol": f"{style.symbol}-open", "size": 6},
            hovertext=[text(f"{point.label} seed {seed}: {value:.2f}") for _, point, seed, value in runs],
            hoverinfo="text",
        )


def _draw_published(figure: Figure, words: str, drawn: Sequence[PlotLine], shares: Mapping[float, PublishedRow]) -> None:
    """Dashed, in the colour of the one line of ours that it belongs to."""
    when = {name: value_key(value) for row in shares.values() for name, value in row.when.items() if name != "partition"}
    belongs = [i for i, line in enumerate(drawn) if setting_keys(line.settings, when) == tuple(when.values())]
    colour = _styles(drawn)[belongs[0]].colour if len(belongs) == 1 else NEUTRAL
    name = f"published {words}".rstrip()
    at = sorted(shares)
    figure.add_scatter(
        x=at,
        y=[shares[x].value for x in at],
        name=text(name),
        mode="lines+markers",
        line={"color": colour, "dash": "dash", "width": 1.5},
        marker={"color": colour, "symbol": "circle-open", "size": 8},
        hovertext=[text(f"{name} {shares[x].when['partition']}: {shares[x].value:.2f}") for x in at],
        hoverinfo="text",
    )
    figure.update_layout(showlegend=True)


def _published_lines(rows: Iterable[PublishedRow], comparison: Comparison, point: CellPoint) -> list[list[PublishedRow]]:
    """Rows of the comparison's metric, by all settings that they name except the partition."""
    drawn = [row for row in rows if row.value is not None and "partition" in row.when]
    of_metric = [row for row in drawn if _same_metric(row.metric, comparison.metric, point.config)]
    return parted(of_metric, lambda row: {**row.when, "partition": None})


def _same_metric(one: str, other: str, config: Mapping[str, Any]) -> bool:
    """Whether two names are one metric: `val/miou` is that of branch 1 or of the ensemble, by the setting `ensemble`."""
    reported = f"val/miou_{head_of(SCORE, config)}"
    return (reported if one == SCORE else one) == (reported if other == SCORE else other)


def _by_group(points: Iterable[CellPoint]) -> list[PlotLine]:
    """Points that no line joins, in one colour for each group."""
    members = parted(points, lambda point: point.group)
    return [PlotLine(of_group[0].group, of_group[0].group, {}, tuple(of_group)) for of_group in members]


def _styles(drawn: Sequence[PlotLine]) -> list[SeriesStyle]:
    """A colour for each line; for more lines than colours, a colour for each group and a dash for the rest."""
    groups = list(dict.fromkeys(line.group for line in drawn))
    if len(drawn) <= len(COLOURS) or len(groups) in (1, len(drawn)):
        return [series_style(i) for i in range(len(drawn))]
    within: dict[str, int] = {}
    made = []
    for line in drawn:
        made.append(series_style(groups.index(line.group), within.get(line.group, 0)))
        within[line.group] = within.get(line.group, 0) + 1
    return made


def _axis(points: Sequence[CellPoint], name: str) -> dict[str, Any]:
    """One axis of the parallel coordinates. Names have a place each; cells without the setting have one below all values."""
    values = marked = values_of(points, name)
    to: Callable[[Any], float] = values.index
    if numeric(points, name):
        to = math.log10 if logarithmic(values) else float
        marked = values if len(values) <= _FEW else _powers(values) if logarithmic(values) else []
    low, high = to(values[0]), to(values[-1])
    below, ticks = low - _BELOW * (high - low), {to(value): shown(value) for value in marked}
    if not all(name in point.settings for point in points):
        ticks = {**(ticks or {low: shown(values[0]), high: shown(values[-1])}), below: f"no {name}"}
    scale = {"tickvals": list(ticks), "ticktext": list(map(text, ticks.values())), "range": [min(ticks), max(ticks)]} if ticks else {}
    return {"label": text(name), "values": [to(each.settings[name]) if name in each.settings else below for each in points], **scale}


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """An axis of numbers: logarithmic where they span orders of magnitude, with a tick for each of a few."""
    marked = list(values) if len(values) <= _FEW else _round_numbers(values) if logarithmic(values) else []
    ticks = {"tickvals": marked, "ticktext": [shown(value) for value in marked]} if marked else {}
    return ticks | ({"type": "log"} if logarithmic(values) else {})


def _round_numbers(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten between the values; only the powers where those are many."""
    powers = _powers(values)
    steps = (1, 2, 5) if len(powers) <= _FEW // 2 else (1,)
    return [step * power for power in powers for step in steps if min(values) <= step * power <= max(values)]


def _powers(values: Sequence[float]) -> list[float]:
    """The powers of ten that enclose the values."""
    return [10.0**n for n in range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)]


def _hover(point: CellPoint) -> str:
    spread = "" if point.cell.sd is None else f" ± {point.cell.sd:.2f}"
    return f"{point.label}: {point.mean:.2f}{spread} ({seeds_named(result.seed for result in point.cell.results)})"
