"""The figures of a comparison: metric against settings and labelled share, heat maps, parallel coordinates; with curves.py all of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orchestration.compare.comparison import Comparison
from orchestration.compare.curves import by_class, learning_curves, loss_curves
from orchestration.compare.heat_maps import heat_map
from orchestration.compare.metrics import axis_title, metric_name
from orchestration.compare.plot_points import (
    CellPoint,
    Line,
    averaged,
    free,
    key,
    lines,
    logarithmic,
    measured,
    named,
    numeric,
    position,
    seeds,
    share,
    spots,
    values_of,
)
from orchestration.compare.results import TrialResult
from orchestration.compare.theme import COLOURS, LOW_TO_HIGH, NEUTRAL, Style, blank, style, text
from orchestration.formatting import shown
from orchestration.plan.spec import PublishedRow

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_FEW = 9
"""So many different numbers get a tick each."""


def figures(comparison: Comparison, results: Sequence[TrialResult], published: Sequence[PublishedRow] = ()) -> dict[str, Figure]:
    """Every figure that the data can fill, by a name fit for a file, in the order in which to read them.

    Args:
        results: all trials, finished or not: learning curves show both.
        published: rows with a partition stand beside ours.
    """
    names = free([spot.settings for spot in spots(comparison)])
    found = {"labelled-share": by_share(comparison, published)}
    found |= {f"against-{name}": by_setting(comparison, name) for name in names}
    found |= {f"heat-map-{a}-{b}": heat_map(comparison, a, b) for a, b in itertools.combinations(names, 2)}
    found["parallel-coordinates"] = parallel_coordinates(comparison)
    found["classes"] = by_class(comparison)
    found["learning-curves"] = learning_curves(comparison, results)
    found["losses"] = loss_curves(comparison, results)
    return {name: figure for name, figure in found.items() if figure is not None}


def by_setting(comparison: Comparison, name: str) -> Figure | None:
    """The metric against a number that varies: a line for each set of trials that differ in nothing else, or points where no two do.

    None where the setting is no number, or has one value.
    """
    found = spots(comparison)
    names = free([spot.settings for spot in found])
    if name not in names or not numeric(found, name):
        return None
    drawn = [line for line in lines(found, name, names) if len(line.spots) > 1]
    loose = [] if drawn else _by_group(found)
    shown_spots = [spot for line in drawn or loose for spot in line.spots]
    figure = blank(f"{metric_name(comparison.metric)} against {name}", *_said(comparison, drawn))
    _draw(figure, drawn or loose, [spot.settings[name] for spot in shown_spots], joined=bool(drawn))
    figure.update_yaxes(title_text=text(axis_title(comparison.metric)))
    figure.update_xaxes(title_text=text(name), **_ticks(values_of(shown_spots, name)))
    return figure


def by_share(comparison: Comparison, published: Sequence[PublishedRow] = ()) -> Figure | None:
    """The metric against the labelled share, which doubles from tick to tick, with the published numbers dashed; None of one partition."""
    found = [spot for spot in spots(comparison) if share(str(spot.settings.get("partition")), spot.config)]
    names = free([spot.settings for spot in found])
    if "partition" not in names:
        return None
    drawn = lines(found, "partition", names)
    figure = blank(f"{metric_name(comparison.metric)} against the labelled share", *_said(comparison, drawn))
    _draw(figure, drawn, [position(spot.settings["partition"], spot.config) for line in drawn for spot in line.spots])
    ticks = {position(value, found[0].config): str(value) for value in values_of(found, "partition")}
    for rows in _published_lines(published, comparison, found[0]):
        shares = {position(row.when["partition"], found[0].config): row for row in rows}
        ticks |= {at: str(row.when["partition"]) for at, row in shares.items()}
        _draw_published(figure, named(rows[0].when, [name for name in rows[0].when if name != "partition"]), drawn, shares)
    figure.update_yaxes(title_text=text(axis_title(comparison.metric)))
    figure.update_xaxes(title_text="labelled training images", type="log", tickvals=list(ticks), ticktext=list(map(text, ticks.values())))
    return figure


def parallel_coordinates(comparison: Comparison) -> Figure | None:
    """A line a trial through its settings to its result; None where fewer than two settings vary."""
    import plotly.graph_objects as go

    found = spots(comparison)
    names = free([spot.settings for spot in found])
    if len(names) < 2:
        return None
    trials = [(spot, value) for spot in found for value in spot.cell.values.values()]
    scores = [value for _, value in trials]
    how = f"one line a trial, {seeds(comparison.used)}; drag along an axis to choose lines"
    figure = blank(f"Settings and {metric_name(comparison.metric)}", measured(comparison), how)
    axes = [_axis([spot for spot, _ in trials], name) for name in names]
    axes.append({"label": text(axis_title(comparison.metric)), "values": scores})
    line = {"color": scores, "colorscale": LOW_TO_HIGH}
    figure.add_trace(go.Parcoords(dimensions=axes, line=line, unselected={"line": {"opacity": 0.08}}, labelside="top"))
    figure.update_layout(margin={"t": 150, "l": 70, "r": 50, "b": 30}, meta={"min_width": 75 * len(axes), "wide": True})
    return figure


def _said(comparison: Comparison, drawn: Sequence[Line]) -> tuple[str, str]:
    """What is measured, and what a single line, which needs no legend, has in common."""
    only = drawn[0].label if len(drawn) == 1 else ""
    return measured(comparison), "; ".join(filter(None, (averaged(comparison), only)))


def _draw(figure: Figure, drawn: Sequence[Line], xs: Sequence[float], *, joined: bool = True) -> None:
    """Means with their spread, and every seed; `xs` for the spots of all lines in turn."""
    places = iter(xs)
    for line, look in zip(drawn, _styles(drawn), strict=True):
        at = list(itertools.islice(places, len(line.spots)))
        _draw_means(figure, line, at, look, joined=joined)
        _draw_seeds(figure, line, at, look)
    figure.update_layout(showlegend=len(drawn) > 1)


def _draw_means(figure: Figure, line: Line, at: list[float], look: Style, *, joined: bool) -> None:
    name = line.label or "ours"
    spread = [spot.spread or 0 for spot in line.spots]
    told = [text(_told(spot)) for spot in line.spots]
    figure.add_scatter(
        x=at,
        y=[spot.mean for spot in line.spots],
        error_y={"array": spread, "thickness": 1.5, "width": 0} if any(spread) else None,
        name=text(name),
        legendgroup=text(name),
        mode="lines+markers" if joined else "markers",
        line={"color": look.colour, "dash": look.dash, "width": 2},
        marker={"color": look.colour, "symbol": look.symbol, "size": 9},
        hovertext=told,
        hoverinfo="text",
    )


def _draw_seeds(figure: Figure, line: Line, at: list[float], look: Style) -> None:
    """The single runs, where a mean hides them."""
    several = [(x, spot) for x, spot in zip(at, line.spots, strict=True) if len(spot.cell.values) > 1]
    runs = [(x, spot, seed, value) for x, spot in several for seed, value in spot.cell.values.items()]
    if runs:
        figure.add_scatter(
            x=[x for x, *_ in runs],
            y=[value for *_, value in runs],
            legendgroup=text(line.label or "ours"),
            showlegend=False,
            mode="markers",
            marker={"color": look.colour, "symbol": f"{look.symbol}-open", "size": 6},
            hovertext=[text(f"{spot.label} seed {seed}: {value:.2f}") for _, spot, seed, value in runs],
            hoverinfo="text",
        )


def _draw_published(figure: Figure, words: str, drawn: Sequence[Line], shares: Mapping[float, PublishedRow]) -> None:
    """Dashed, in the colour of the one line of ours that it belongs to."""
    when = {name: key(value) for row in shares.values() for name, value in row.when.items() if name != "partition"}
    belongs = [i for i, line in enumerate(drawn) if all(key(line.settings.get(name)) == value for name, value in when.items())]
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


def _published_lines(rows: Iterable[PublishedRow], comparison: Comparison, spot: CellPoint) -> list[list[PublishedRow]]:
    """Rows of the comparison's metric by all that they name except the partition."""
    found: dict[tuple[str, ...], list[PublishedRow]] = {}
    for row in rows:
        if row.value is not None and "partition" in row.when and _same_metric(row.metric, comparison.metric, spot.config):
            rest = tuple(f"{name} {key(value)}" for name, value in row.when.items() if name != "partition")
            found.setdefault(rest, []).append(row)
    return list(found.values())


def _same_metric(one: str, other: str, config: Mapping[str, Any]) -> bool:
    """`val/miou` is the metric of whatever the trials ensemble by."""
    head = "val/miou_branch1" if config.get("ensemble") == "none" else "val/miou_ensemble"
    return (head if one == "val/miou" else one) == (head if other == "val/miou" else other)


def _by_group(found: Iterable[CellPoint]) -> list[Line]:
    """Loose spots, those of a group in one colour."""
    groups: dict[str, list[CellPoint]] = {}
    for spot in found:
        groups.setdefault(spot.group, []).append(spot)
    return [Line(group, group, {}, tuple(members)) for group, members in groups.items()]


def _styles(drawn: Sequence[Line]) -> list[Style]:
    """A colour a line; of more lines than colours, a colour a group and a dash for the rest."""
    groups = list(dict.fromkeys(line.group for line in drawn))
    if len(drawn) <= len(COLOURS) or len(groups) in (1, len(drawn)):
        return [style(i) for i in range(len(drawn))]
    within: dict[str, int] = {}
    made = []
    for line in drawn:
        made.append(style(groups.index(line.group), within.get(line.group, 0)))
        within[line.group] = within.get(line.group, 0) + 1
    return made


def _axis(found: Sequence[CellPoint], name: str) -> dict[str, Any]:
    """One axis of the parallel coordinates; what has no numbers gets a place for each of its values."""
    values = values_of(found, name)
    if not numeric(found, name):
        places = {key(value): place for place, value in enumerate(values)}
        ticks = {"tickvals": list(places.values()), "ticktext": [text(shown(value)) for value in values]}
        return {"label": text(name), "values": [places[key(spot.settings.get(name))] for spot in found], **ticks}
    to = math.log10 if logarithmic(values) else float
    ticks = {"tickvals": [to(value) for value in values], "ticktext": [shown(value) for value in values]} if len(values) <= _FEW else {}
    if to is math.log10 and not ticks:
        powers = [10.0**n for n in range(math.floor(to(values[0])), math.ceil(to(values[-1])) + 1)]
        ticks = {"tickvals": list(map(to, powers)), "ticktext": list(map(shown, powers)), "range": [to(powers[0]), to(powers[-1])]}
    return {"label": text(name), "values": [to(spot.settings[name]) for spot in found], **ticks}


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """Of an axis of numbers: logarithmic where they span much, and every one of a few named."""
    named = list(values) if len(values) <= _FEW else _round_numbers(values) if logarithmic(values) else []
    ticks = {"tickvals": named, "ticktext": [shown(value) for value in named]} if named else {}
    return ticks | ({"type": "log"} if logarithmic(values) else {})


def _round_numbers(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten between the values; only the powers where those are many."""
    low, high = min(values), max(values)
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    steps = (1, 2, 5) if len(powers) <= _FEW // 2 else (1,)
    return [step * power for power in powers for step in steps if low <= step * power <= high]


def _told(spot: CellPoint) -> str:
    spread = "" if spot.spread is None else f" ± {spot.spread:.2f}"
    return f"{spot.label}: {spot.mean:.2f}{spread} ({seeds(spot.cell.results)})"
