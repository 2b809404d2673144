"""The style of figures: colours that are safe for the colour-blind, a light and a dark theme, and the controls of a figure."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Mode = Literal["light", "dark"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's, without black and yellow, which vanish on a dark and on a white page."""
NEUTRAL = "#80868F"
"""Grey that is legible on both."""
TILES = {"colorscale": "Cividis", "showscale": False, "xgap": 2, "ygap": 2, "hoverongaps": False}
"""Options of a heat map. It has no colour scale, because its cells show their numbers."""
LOW_TO_HIGH = [[0.0, COLOURS[0]], [0.5, NEUTRAL], [1.0, COLOURS[4]]]
"""Colour scale of lines, which need contrast with the page at both ends."""

CONFIG: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    # by default, plotly.js 4 offers to send the data to its vendor's cloud
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "plotGlPixelRatio": 1,  # at 2 the lines of parallel coordinates are half a pixel wide
    "showAxisRangeEntryBoxes": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
}
"""plotly.js's options, for every place where a figure is shown."""

DASHES = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "dash-dotted", "longdash": "long-dashed"}
"""plotly's name of each dash, and the word for it."""
HEIGHT = 460
"""Height of a figure, in pixels."""

_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "star", "hexagon", "x", "pentagon")
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_INK = {"light": ("#1F2328", "#DFE3E8", "#FFFFFF"), "dark": ("#E6E8EB", "#363C45", "#1B1F24")}
"""Colours of text, grid and paper."""


@dataclass(frozen=True)
class SeriesStyle:
    """What distinguishes one series from the others, with and without colours."""

    colour: str
    dash: str
    symbol: str


def series_style(colour: int, other: int | None = None) -> SeriesStyle:
    """The style of a series by its number; with `other`, colour and dash are counted separately."""
    dash = colour // len(COLOURS) if other is None else other
    symbol = colour if other is None else other
    return SeriesStyle(COLOURS[colour % len(COLOURS)], tuple(DASHES)[dash % len(DASHES)], _SYMBOLS[symbol % len(_SYMBOLS)])


def faint(colour: str, opacity: float) -> str:
    """The colour, partly transparent; a trace's own `opacity` makes some browsers darken the background too."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def template(mode: Mode) -> dict[str, Any]:
    """A plotly template."""
    ink, grid, paper = _INK[mode]
    axis = {"gridcolor": grid, "linecolor": grid, "zerolinecolor": grid, "tickcolor": grid, "automargin": True, "title": {"standoff": 8}}
    return {
        "layout": {
            "font": {"family": _FONT, "size": 12, "color": ink},
            "title": {
                "x": 0,
                "xref": "container",
                "y": 1,
                "yref": "container",
                "yanchor": "top",
                "pad": {"l": 12, "t": 14},
                "font": {"size": 16},
                "subtitle": {"font": {"size": 12}},
            },
            "paper_bgcolor": paper,
            "plot_bgcolor": "rgba(0,0,0,0)",
            "colorway": list(COLOURS),
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"bgcolor": "rgba(0,0,0,0)", "itemwidth": 36},
            "hoverlabel": {"bgcolor": paper, "bordercolor": NEUTRAL, "font": {"color": ink, "family": _FONT}, "align": "left"},
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": NEUTRAL, "activecolor": ink},
            "updatemenudefaults": {"bgcolor": paper, "bordercolor": NEUTRAL},
            "annotationdefaults": {"font": {"color": ink}},
        }
    }


def blank(title: str, *lines: str, height: int = HEIGHT) -> Figure:
    """An empty figure with its title; `lines` stand below it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    dress(figure, title, *lines, height=height)
    return figure


def dress(figure: Figure, title: str, *lines: str, height: int = HEIGHT) -> None:
    """Set the theme and the title of a figure."""
    figure.update_layout(template=template("light"), height=height, margin={"t": 110, "b": 60, "r": 20}, uirevision="kept")
    figure.update_layout(title={"text": text(title), "subtitle": {"text": "<br>".join(map(text, lines))}}, hovermode="closest")


def text(words: object) -> str:
    """Words as a figure shows them literally: plotly interprets tags."""
    return html.escape(str(words), quote=False)
