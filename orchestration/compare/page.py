"""A comparison as one HTML file: its tables, its interactive figures and the library that draws them."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration.compare.columns import MEAN_AND_SD, CellColumn, cell_columns
from orchestration.compare.comparison import Cell, Comparison, ComparisonGroup, seeds_named
from orchestration.compare.figures import figures
from orchestration.compare.metrics import higher_is_better, metric_name, scale
from orchestration.compare.notes import notes
from orchestration.compare.page_tables import comparison_tables, published_page_table, trials_table
from orchestration.compare.paired import ALPHA, can_show
from orchestration.compare.published import Reproduction
from orchestration.compare.text_tables import typographic
from orchestration.compare.theme import CONFIG, template
from orchestration.plan.spec import Published
from orchestration.record.trial_state import TrialState

_TEMPLATE = "page.html"
_COLUMN = 560
"""Width of a column of figures, in pixels; a figure that needs more takes both columns."""


def page(
    comparison: Comparison,
    *,
    title: str,
    published: Sequence[tuple[Published, Sequence[Reproduction]]] = (),
    source: Mapping[str, str],
    updated: str,
    plotly_js: bool = True,
) -> str:
    """The page as HTML. It loads nothing, and its content security policy forbids it.

    Args:
        published: the numbers of a sweep file, and ours for each of its rows.
        source: what is needed to reproduce the page, by name: command, file, versions, commit.
        updated: the instant of the newest result, as a person reads it.
        plotly_js: with the figures and the 5 MB of code that draws them; without, only the tables.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = _figures(comparison, [row for numbers, _ in published for row in numbers.rows]) if plotly_js else []
    return environment.get_template(_TEMPLATE).render(
        title=title,
        updated=updated,
        summary=summary(comparison),
        notes=notes(comparison),
        groups=comparison_tables(comparison),
        published=[published_page_table(numbers, found) for numbers, found in published],
        figures=drawn,
        trials=trials_table(comparison) if comparison.results else None,
        source=source,
        library=_library() if drawn else "",
        data=_script_json({"figures": drawn, "config": CONFIG, "themes": {mode: template(mode) for mode in ("light", "dark")}}),
    )


def summary(comparison: Comparison) -> list[str]:
    """What a reader needs first, in sentences: the number of trials, the best of each group, what the seeds can show."""
    columns = cell_columns(comparison)
    best = [_best(comparison, group, columns) for group in comparison.groups]
    return [_finished(comparison), *filter(None, best), *_significance(comparison)]


def _finished(comparison: Comparison) -> str:
    results = comparison.results
    states = Counter(result.state for result in results)
    done = states.pop(TrialState.FINISHED, 0)
    rest = "".join(f", {count} {state}" for state, count in states.items())
    return f"{done} of {len(results)} trials of {', '.join(comparison.sweeps)} finished{rest}."


def _best(comparison: Comparison, group: ComparisonGroup, columns: Mapping[str, CellColumn]) -> str:
    """`1/8: eps=0.6 is highest with ...`; empty for a group without values."""
    found = [cell for cell in group.cells if cell.values]
    if not found:
        return ""
    higher, metric = higher_is_better(comparison.metric), comparison.metric
    best = (max if higher else min)(found, key=lambda cell: cell.mean or 0.0)
    value = " ".join(filter(None, (typographic(columns[MEAN_AND_SD].text(best)), scale(metric)[1], metric_name(metric))))
    what = f"{value} {comparison.rule} ({seeds_named(best.values)})"
    where = f"{group.label}: " if comparison.by else ""
    if len(found) == 1:
        return f"{where}{what}."
    return f"{where}{best.label} is {'highest' if higher else 'lowest'} with {what}{_against_baseline(best, group, columns)}."


def _against_baseline(cell: Cell, group: ComparisonGroup, columns: Mapping[str, CellColumn]) -> str:
    if cell.difference is None or group.baseline is None:
        return ", the baseline" if cell.is_baseline else ""
    difference, interval, p = (typographic(columns[name].text(cell)) for name in ("difference", "95 % interval", "p (Holm)"))
    ends = f"95 % interval {interval}, " if cell.difference.low is not None else ""
    return f"; {difference} from {group.baseline.label} ({ends}p = {p} after Holm's correction)"


def _significance(comparison: Comparison) -> list[str]:
    """What the seeds can and do show."""
    found = comparison.differences
    if not found:
        return []
    sure = sum(difference.p_holm <= ALPHA for difference in found)
    claim = f"{sure or 'None'} of {len(found)} differences from a baseline is significant at {100 * ALPHA:.0f} % after Holm's correction."
    possible = [f"{line[0].upper()}{line[1:]}." for line in can_show([len(difference.seeds) for difference in found])]
    return [claim.replace(" is ", " are ") if sure > 1 else claim, *possible]


def _figures(comparison: Comparison, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The figures as the page needs them: their titles are HTML, so that they wrap; the wide ones last."""
    made = []
    for name, figure in figures(comparison, rows).items():
        content = json.loads(figure.to_json(validate=False))
        title = content["layout"].pop("title")
        content["layout"].pop("template")
        lines = [html.unescape(line) for line in title["subtitle"]["text"].split("<br>")]
        made.append({"name": name, "title": html.unescape(title["text"]), "lines": lines, "wide": _is_wide(content), **content})
    return sorted(made, key=lambda figure: bool(figure["wide"]))


def _is_wide(figure: Mapping[str, Any]) -> bool:
    meta = figure["layout"].get("meta") or {}
    return bool(meta.get("wide")) or int(meta.get("min_width", 0)) > _COLUMN


def _library() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _script_json(value: Any) -> str:
    """JSON that cannot end the script element in which it stands."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
