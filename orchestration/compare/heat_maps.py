"""Heat maps of the metric over two settings: which cells may be averaged, and which are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from orchestration.compare.comparison import Comparison, named, parted
from orchestration.compare.metrics import metric_name
from orchestration.compare.plot_points import CellPoint, averaged, cell_points, free, measured, values_of
from orchestration.compare.results import setting_keys, value_key
from orchestration.compare.theme import TILES, blank, text
from orchestration.formatting import shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DENSE = 0.5
"""Share of its pairs that a heat map needs filled."""


def heat_map(comparison: Comparison, first: str, second: str) -> Figure | None:
    """The mean for every pair of values of two settings; None where fewer than half of the pairs were tried.

    Cells without either setting are left out. Where other settings vary too, the mean is over them if every pair was tried with the same
    of them; else one choice of them is shown.
    """
    tiles = _tiles(cell_points(comparison), first, second)
    if tiles is None:
        return None
    over = "; ".join(filter(None, (averaged(comparison), tiles.others)))
    figure = blank(f"{metric_name(comparison.metric)} by {tiles.y} and {tiles.x}", measured(comparison), over)
    labels = {"x": [text(shown(value)) for value in tiles.columns], "y": [text(shown(value)) for value in tiles.rows]}
    figure.add_heatmap(z=tiles.means, **labels, **TILES, texttemplate="%{z:.1f}")
    figure.update_traces(hovertemplate=f"{text(tiles.y)} %{{y}}, {text(tiles.x)} %{{x}}: %{{z:.2f}}<extra></extra>")
    figure.update_xaxes(title_text=text(tiles.x), type="category", showgrid=False)
    figure.update_yaxes(title_text=text(tiles.y), type="category", showgrid=False)
    figure.update_layout(meta={"min_width": 90 + 44 * len(tiles.columns)})
    return figure


@dataclass(frozen=True)
class _Tiles:
    x: str
    y: str
    columns: list[Any]
    rows: list[Any]
    means: list[list[float | None]]
    others: str
    """How the other settings that vary are treated, in words."""


def _tiles(points: Sequence[CellPoint], first: str, second: str) -> _Tiles | None:
    others = [name for name in free([point.settings for point in points]) if name not in (first, second)]
    chosen, how = _comparable([point for point in points if {first, second} <= point.settings.keys()], (first, second), others)
    x, y = sorted((first, second), key=lambda name: -len(values_of(chosen, name)))
    columns, rows = values_of(chosen, x), values_of(chosen, y)
    cells: dict[tuple[str, ...], list[float]] = {}
    for point in chosen:
        cells.setdefault(setting_keys(point.settings, (y, x)), []).append(point.mean)
    if min(len(columns), len(rows)) < 2 or len(cells) < _DENSE * len(columns) * len(rows):
        return None
    means = [
        [mean(cells[place]) if (place := (value_key(row), value_key(column))) in cells else None for column in columns] for row in rows
    ]
    return _Tiles(x, y, columns, rows, means, how)


def _comparable(points: Sequence[CellPoint], pair: Sequence[str], others: Sequence[str]) -> tuple[list[CellPoint], str]:
    """The points to average or to show, and which these are, in words. A point without a setting agrees with every choice of it."""
    by_rest = parted(points, lambda point: setting_keys(point.settings, others))
    by_pair = parted(points, lambda point: setting_keys(point.settings, pair))
    if len(by_rest) > 1 and all(len({setting_keys(point.settings, others) for point in of_pair}) == len(by_rest) for of_pair in by_pair):
        return list(points), f"mean also over {', '.join(others)}"
    choice: dict[str, Any] = {}
    for members in sorted(by_rest, key=lambda members: (-len(members[0].settings), -len(members))):
        if _agrees(members[0], choice, others):
            choice |= {name: value for name, value in members[0].settings.items() if name in others}
    return [point for point in points if _agrees(point, choice, others)], f"at {named(choice, others)}" if others else ""


def _agrees(point: CellPoint, choice: Mapping[str, Any], names: Sequence[str]) -> bool:
    return all(choice.get(name, point.settings[name]) == point.settings[name] for name in names if name in point.settings)
