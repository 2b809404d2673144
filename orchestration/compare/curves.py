"""Figures of single epochs: IoU of each class, learning curves, the terms of the loss."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from orchestration.compare.comparison import Cell, Comparison, named, parted, seeds_named
from orchestration.compare.metrics import axis_title, higher_is_better, metric_name, scale
from orchestration.compare.plot_points import averaged, cell_points, free, validation_list
from orchestration.compare.results import TrialResult, setting_keys
from orchestration.compare.theme import DASHES, HEIGHT, NEUTRAL, TILES, SeriesStyle, blank, dress, faint, series_style, text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_SYMBOLS, _ROWS = 8, 24
"""Most cells that colours and symbols distinguish, and most rows of a heat map."""
_SINGLE = 10
"""Up to this many epochs, each has a tick."""
_HEADS = {"ensemble": "the ensemble", "branch1": "branch 1", "branch2": "branch 2"}
_MANY = 12
"""Most lines with a colour each; of more, only the best has one."""
_PANEL = 170
"""Height of one panel among several, in pixels."""


@dataclass(frozen=True, eq=False)
class Curve:
    """A metric over the epochs for trials that differ only in the seed."""

    group: str
    label: str
    by_seed: Mapping[int, Mapping[int, float]]
    """Value by seed and epoch."""
    counted: frozenset[int]
    """Seeds that the mean is over: of finished trials, or of all where none has finished."""

    @property
    def mean(self) -> dict[int, float]:
        """By epoch, up to the last one that every counted seed has completed."""
        counted = [values for seed, values in self.by_seed.items() if seed in self.counted]
        common = sorted(set.intersection(*map(set, counted)))
        return {epoch: mean(values[epoch] for values in counted) for epoch in common}


def by_class(comparison: Comparison) -> Figure | None:
    """IoU of each class that occurs or is predicted, for every cell; a heat map where the cells are too many for symbols."""
    found = cell_points(comparison)
    best = sorted(range(len(found)), key=lambda i: found[i].mean, reverse=higher_is_better(comparison.metric))[:_ROWS]
    kept = [found[i] for i in sorted(best)]
    scores = {point.label: _ious(point.cell, head_of(comparison.metric, point.config)) for point in kept}
    listed = dict.fromkeys(name for point in found for result in point.cell.results for name in result.classes)
    classes = [name for name in listed if any(name in ious for ious in scores.values())]
    if not classes:
        return None
    heads = ", ".join(dict.fromkeys(_HEADS[head_of(comparison.metric, point.config)] for point in found))
    some = f"; the {len(kept)} best of {len(found)}" if len(kept) < len(found) else ""
    lines = f"IoU (%) of {heads} on the {validation_list(comparison.used)} {comparison.rule}", averaged(comparison) + some
    figure = blank("IoU of each class", *lines, height=max(HEIGHT, 190 + 22 * len(classes)))
    (_dots if len(scores) <= _SYMBOLS else _tiles)(figure, classes, scores)
    return figure


def learning_curves(comparison: Comparison) -> Figure | None:
    """The metric over the epochs: a panel for each group, in it each cell and thinner its seeds; None before the second epoch."""
    from plotly.subplots import make_subplots

    curves = _curves(comparison, comparison.metric)
    if not any(len(curve.mean) > 1 for curve in curves):
        return None
    groups = list(dict.fromkeys(curve.group for curve in curves))
    begun = [result for result in comparison.results if result.history]
    what = f"{axis_title(comparison.metric)} on the {validation_list(begun)} after every epoch"
    thin = "; thin: each seed, also of unfinished trials" if any(len(curve.by_seed) > 1 for curve in curves) else ""
    figure = make_subplots(rows=len(groups), shared_xaxes=True, subplot_titles=list(map(text, groups)), vertical_spacing=0.2 / len(groups))
    height = max(HEIGHT, 190 + _PANEL * len(groups))
    dress(
        figure,
        f"{metric_name(comparison.metric)} while training",
        what,
        f"mean over {seeds_named(result.seed for result in begun)}{thin}",
        height=height,
    )
    figure.update_annotations(x=0, xanchor="left", font_size=13)
    figure.update_layout(margin_t=130)
    styles = _styles(curves, _best(comparison, curves))
    for curve, style, in_legend in zip(curves, styles, _in_legend(curves, styles), strict=True):
        for trace in _traces(curve, style, in_legend=in_legend):
            figure.add_scatter(**trace, row=1 + groups.index(curve.group), col=1)
    figure.update_xaxes(**_epochs(curves))
    figure.update_xaxes(title_text="epoch", row=len(groups))
    figure.update_yaxes(title_text=text(axis_title(comparison.metric)))
    for row in range(2, len(groups) + 1):
        figure.update_yaxes(matches="y", row=row)
    figure.update_layout(showlegend=len({curve.label for curve in curves}) > 1)
    return figure


def loss_curves(comparison: Comparison) -> Figure | None:
    """Every term of the loss over the epochs, one at a time by a menu; mean over the seeds."""
    results = comparison.results
    terms = sorted({name for result in results for entry in result.history[-1:] for name in entry.metrics if name.startswith("train/loss")})
    by_term = {term: _curves(comparison, term) for term in terms}
    by_term = {term: curves for term, curves in by_term.items() if any(len(curve.mean) > 1 for curve in curves)}
    if not by_term:
        return None
    groups = list(dict.fromkeys(curve.group for curves in by_term.values() for curve in curves))
    dashes = "; ".join(f"{DASHES[series_style(0, n).dash]}: {group}" for n, group in enumerate(groups)) if len(groups) > 1 else ""
    over = "; ".join(filter(None, (f"mean over {seeds_named(result.seed for result in results if result.history)}", dashes)))
    figure = blank("Terms of the loss while training", "mean over the iterations of each epoch, without its weight lambda", over)
    best = _best(comparison, _curves(comparison, comparison.metric))
    of_traces: list[str] = []
    for term, curves in by_term.items():
        for trace in _loss_traces(curves, groups, best):
            figure.add_scatter(**trace, visible=not of_traces or term == of_traces[0])
            of_traces.append(term)
    figure.update_layout(updatemenus=[_menu(by_term, of_traces)], showlegend=len({c.label for cs in by_term.values() for c in cs}) > 1)
    figure.update_xaxes(title_text="epoch", **_epochs(by_term[of_traces[0]]))
    figure.update_yaxes(title_text="loss", rangemode="tozero")
    return figure


def head_of(metric: str, config: Mapping[str, Any]) -> str:
    """The predictions that the metric scores: `ensemble`, `branch1` or `branch2`."""
    for head in ("branch1", "branch2", "ensemble"):
        if metric.startswith((f"val/miou_{head}", f"val/iou_{head}/")):
            return head
    return "branch1" if config.get("ensemble") == "none" else "ensemble"


def _ious(cell: Cell, head: str) -> dict[str, list[float]]:
    """IoU in percent by class, one for each seed that has it, at the epoch where the cell's value was read."""
    prefix = f"val/iou_{head}/"
    entries = [e for r in cell.results if r.seed in cell.values for e in r.history if e.epoch == cell.epochs[r.seed]]
    found: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in entry.metrics.items():
            if name.startswith(prefix):
                found.setdefault(name.removeprefix(prefix), []).append(100 * value)
    return found


def _dots(figure: Figure, classes: Sequence[str], scores: Mapping[str, Mapping[str, list[float]]]) -> None:
    for number, (name, ious) in enumerate(scores.items()):
        style = series_style(number)
        present = [each for each in classes if each in ious]
        spread = [stdev(ious[each]) if len(ious[each]) > 1 else 0 for each in present]
        figure.add_scatter(
            x=[mean(ious[each]) for each in present],
            y=list(map(text, present)),
            error_x={"array": spread, "thickness": 1, "width": 0} if any(spread) else None,
            name=text(name),
            mode="markers",
            marker={"color": style.colour, "symbol": style.symbol, "size": 9},
            hovertemplate="%{y}: %{x:.1f}%",
        )
    figure.update_xaxes(title_text="IoU (%)", rangemode="tozero")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=list(map(text, reversed(classes))))
    figure.update_layout(showlegend=len(scores) > 1)


def _tiles(figure: Figure, classes: Sequence[str], scores: Mapping[str, Mapping[str, list[float]]]) -> None:
    z = [[mean(ious[name]) if name in ious else None for name in classes] for ious in scores.values()]
    names = {"x": list(map(text, classes)), "y": list(map(text, scores))}
    figure.add_heatmap(z=z, **names, **TILES, texttemplate="%{z:.0f}", hovertemplate="%{y}, %{x}: %{z:.1f}%<extra></extra>")
    figure.update_xaxes(type="category", showgrid=False, side="top", autotickangles=[0, -45, -90])
    figure.update_yaxes(type="category", showgrid=False, autorange="reversed")
    width = 60 + 7 * max(map(len, scores)) + 30 * len(classes)
    figure.update_layout(height=max(HEIGHT, 220 + 22 * len(scores)), meta={"min_width": width})


def _curves(comparison: Comparison, metric: str) -> list[Curve]:
    names = free([result.settings for result in comparison.results])
    measured = [result for result in comparison.results if any(metric in entry.metrics for entry in result.history)]
    by_cell = parted(measured, lambda result: setting_keys(result.settings, names))
    varied = {name for result in comparison.results for name in result.settings}
    by = [name for name in comparison.by if name in varied]
    return [_curve(by, metric, [name for name in names if name not in by], trials) for trials in by_cell]


def _curve(by: Sequence[str], metric: str, names: Sequence[str], trials: Sequence[TrialResult]) -> Curve:
    settings, factor = trials[0].settings, scale(metric)[0]
    by_seed = {trial.seed: {e.epoch: factor * e.metrics[metric] for e in trial.history if metric in e.metrics} for trial in trials}
    counted = [trial.seed for trial in trials if trial.finished] or by_seed
    return Curve(named(settings, by), named(settings, names), by_seed, frozenset(counted))


def _best(comparison: Comparison, curves: Iterable[Curve]) -> set[tuple[str, str]]:
    """Group and label of the cell with the best last mean of each group."""
    ends = parted(((list(curve.mean.values())[-1], curve.group, curve.label) for curve in curves if curve.mean), lambda end: end[1])
    return {(max if higher_is_better(comparison.metric) else min)(of_group)[1:] for of_group in ends}


def _styles(curves: Sequence[Curve], best: Collection[tuple[str, str]]) -> list[SeriesStyle]:
    """Cells of one label have one style in every group; where they are too many, only the best of each group have a colour."""
    names = list(dict.fromkeys(curve.label for curve in curves))
    if len(names) <= _MANY:
        return [series_style(names.index(curve.label)) for curve in curves]
    return [series_style(1) if (curve.group, curve.label) in best else SeriesStyle(NEUTRAL, "solid", "circle") for curve in curves]


def _traces(curve: Curve, style: SeriesStyle, *, in_legend: bool) -> list[dict[str, Any]]:
    """Every seed, and their mean."""
    common = {"mode": "lines", "legendgroup": text(curve.label)}
    seeds = curve.by_seed.values() if len(curve.by_seed) > 1 else ()
    line = {"color": faint(style.colour, 0.4), "width": 1}
    thin = [{**_points(values), **common, "line": line, "showlegend": False, "hoverinfo": "skip"} for values in seeds]
    return [*thin, _mean_trace(curve, style, in_legend=in_legend)]


def _loss_traces(curves: Sequence[Curve], groups: Sequence[str], best: Collection[tuple[str, str]]) -> list[dict[str, Any]]:
    """Colours by the cell, dashes by the group."""
    styles = _styles(curves, best)
    in_legend = _in_legend(curves, styles)
    if len(groups) > 1:
        styles = [replace(style, dash=series_style(0, groups.index(curve.group)).dash) for curve, style in zip(curves, styles, strict=True)]
    return [_mean_trace(curve, style, in_legend=named) for curve, style, named in zip(curves, styles, in_legend, strict=True)]


def _in_legend(curves: Sequence[Curve], styles: Sequence[SeriesStyle]) -> list[bool]:
    """The legend names each label once, at its first curve with a colour."""
    first = {curve.label: i for i, curve in reversed(list(enumerate(curves))) if styles[i].colour != NEUTRAL}
    return [first.get(curve.label) == i for i, curve in enumerate(curves)]


def _mean_trace(curve: Curve, style: SeriesStyle, *, in_legend: bool) -> dict[str, Any]:
    quiet = style.colour == NEUTRAL
    return {
        **_points(curve.mean),
        "mode": "lines",
        "name": text(curve.label or "mean"),
        "legendgroup": text(curve.label),
        "line": {"color": faint(style.colour, 0.6) if quiet else style.colour, "dash": style.dash, "width": 1.2 if quiet else 2.5},
        "zorder": 0 if quiet else 1,
        "showlegend": in_legend,
        "meta": text(" ".join(filter(None, (curve.group, curve.label))) or "mean"),
        "hovertemplate": "epoch %{x}: %{y:.4g}<extra>%{meta}</extra>",
    }


def _epochs(curves: Iterable[Curve]) -> dict[str, Any]:
    """An axis of whole epochs from 0."""
    last = max(epoch for curve in curves for values in curve.by_seed.values() for epoch in values)
    return {"rangemode": "tozero", **({"dtick": 1} if last <= _SINGLE else {})}


def _points(values: Mapping[int, float]) -> dict[str, list[float]]:
    """Rounded to five digits: more are invisible and would double the size of the page."""
    return {"x": list(values), "y": [float(f"{value:.5g}") for value in values.values()]}


def _menu(terms: Iterable[str], of_traces: Sequence[str]) -> dict[str, Any]:
    shown = {term: [of == term for of in of_traces] for term in terms}
    buttons = [{"label": text(t.removeprefix("train/")), "method": "restyle", "args": [{"visible": shown[t]}]} for t in shown]
    return {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "bordercolor": NEUTRAL}
