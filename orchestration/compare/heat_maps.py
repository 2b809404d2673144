"""Heat maps of the metric over two settings: which cells may be averaged, and which are shown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from orchestration.compare.comparison import Comparison
from orchestration.compare.metrics import metric_name
from orchestration.compare.plot_points import CellPoint, averaged, free, key, measured, named, spots, values_of
from orchestration.compare.theme import TILES, blank, text
from orchestration.formatting import shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_DENSE = 0.5
"""A heat map needs this share of its cells filled."""


def heat_map(comparison: Comparison, first: str, second: str) -> Figure | None:
    """The mean for every pair of values of two settings; None where fewer than half of the pairs were tried.

    Where other settings vary too, the mean is over them if every pair was tried with the same of them; else one choice of them is shown.
    """
    tiles = _tiles(spots(comparison), first, second)
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
    """What became of the other settings that vary."""


def _tiles(found: Sequence[CellPoint], first: str, second: str) -> _Tiles | None:
    others = [name for name in free([spot.settings for spot in found]) if name not in (first, second)]
    chosen, said = _comparable(found, (first, second), others)
    x, y = sorted((first, second), key=lambda name: -len(values_of(chosen, name)))
    columns, rows = values_of(chosen, x), values_of(chosen, y)
    cells: dict[tuple[str, str], list[float]] = {}
    for spot in chosen:
        cells.setdefault((key(spot.settings.get(y)), key(spot.settings.get(x))), []).append(spot.mean)
    if min(len(columns), len(rows)) < 2 or len(cells) < _DENSE * len(columns) * len(rows):
        return None
    means = [[mean(cells[place]) if (place := (key(row), key(column))) in cells else None for column in columns] for row in rows]
    return _Tiles(x, y, columns, rows, means, said)


def _comparable(found: Sequence[CellPoint], pair: Iterable[str], others: Sequence[str]) -> tuple[list[CellPoint], str]:
    """The spots to average or to show, and how to say so."""
    by_rest: dict[tuple[str, ...], list[CellPoint]] = {}
    by_pair: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for spot in found:
        rest = tuple(key(spot.settings.get(name)) for name in others)
        by_rest.setdefault(rest, []).append(spot)
        by_pair.setdefault(tuple(key(spot.settings.get(name)) for name in pair), set()).add(rest)
    if all(rests == set(by_rest) for rests in by_pair.values()):
        return list(found), f"mean also over {', '.join(others)}" if others else ""
    fullest = max(by_rest.values(), key=len)
    return fullest, f"at {named(fullest[0].settings, others)}"
