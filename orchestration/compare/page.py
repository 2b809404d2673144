"""One page that shows a comparison anywhere: a single HTML file with its tables, interactive figures and their library inside."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestration.compare.comparison import Comparison, ComparisonGroup
from orchestration.compare.figures import figures
from orchestration.compare.metrics import higher_is_better, metric_name, number, scale
from orchestration.compare.page_tables import comparison_table, minus, published_table, trials_table
from orchestration.compare.paired import ALPHA, can_show
from orchestration.compare.plot_points import CellPoint, seeds, spots
from orchestration.compare.published import Reproduction
from orchestration.compare.results import TrialResult
from orchestration.compare.text_tables import interval_shown, p_shown, signed
from orchestration.compare.theme import CONFIG, template
from orchestration.plan.spec import Published

_TEMPLATE = "page.html"
_COLUMN = 560
"""Pixels of width of a column of figures; a figure that needs more takes both."""


def page(
    comparison: Comparison,
    results: Sequence[TrialResult],
    *,
    title: str,
    published: Sequence[tuple[Published, Sequence[Reproduction]]] = (),
    source: Mapping[str, str],
    updated: str,
    plotly_js: bool = True,
) -> str:
    """The page as HTML. It loads nothing, and says so to the browser, which then refuses to.

    Args:
        results: all trials, also those without a value.
        published: the numbers of a sweep file, and what we have for each of its rows.
        source: what it takes to reproduce the page, by name: command, file, versions, commit.
        updated: the instant for which it holds, as a person reads it.
        plotly_js: with the figures and the 5 MB of code that draw them; without, the tables alone.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = _figures(comparison, results, [row for numbers, _ in published for row in numbers.rows]) if plotly_js else []
    return environment.get_template(_TEMPLATE).render(
        title=title,
        updated=updated,
        summary=summary(comparison, results),
        notes=comparison.notes,
        groups=[comparison_table(comparison, group) for group in comparison.groups if any(cell.values for cell in group.cells)],
        published=[published_table(numbers.source, found) for numbers, found in published],
        figures=drawn,
        trials=trials_table(comparison, results) if results else None,
        source=source,
        library=_library() if drawn else "",
        data=_script_json({"figures": drawn, "config": CONFIG, "themes": {mode: template(mode) for mode in ("light", "dark")}}),
    )


def summary(comparison: Comparison, results: Sequence[TrialResult]) -> list[str]:
    """What a reader needs first, in sentences: how many trials there are, the best of each group, what the seeds can show."""
    found = spots(comparison)
    best = [_best(comparison, group, [spot for spot in found if spot.group == group.label]) for group in comparison.groups]
    return [_finished(comparison, results), *filter(None, best), *_significance(comparison)]


def _finished(comparison: Comparison, results: Sequence[TrialResult]) -> str:
    states = Counter(result.state.partition(" at epoch ")[0] for result in results)
    done = states.pop("finished", 0)
    rest = "".join(f", {count} {state}" for state, count in states.items())
    return f"{done} of {len(results)} trials of {', '.join(comparison.sweeps)} finished{rest}."


def _best(comparison: Comparison, group: ComparisonGroup, found: Sequence[CellPoint]) -> str:
    """`1/8: eps=0.6 is highest with ...`; nothing of a group without values."""
    if not found:
        return ""
    higher, metric = higher_is_better(comparison.metric), comparison.metric
    best = (max if higher else min)(found, key=lambda spot: spot.mean)
    spread = "" if best.spread is None else f" ± {number(best.spread, metric)}"
    value = " ".join(filter(None, (number(best.mean, metric) + spread, scale(metric)[1], metric_name(metric))))
    what = f"{value} {comparison.rule} ({seeds(result for result in best.cell.results if result.seed in best.cell.values)})"
    where = f"{group.label}: " if comparison.by else ""
    if len(found) == 1:
        return f"{where}{what}."
    return f"{where}{best.cell.label} is {'highest' if higher else 'lowest'} with {what}{_against(best, group, metric)}."


def _against(spot: CellPoint, group: ComparisonGroup, metric: str) -> str:
    found = spot.cell.difference
    if found is None:
        return ", the baseline" if spot.cell.label == group.baseline else ""
    ends = f"95 % interval {minus(interval_shown(found, metric))}, " if found.low is not None else ""
    return f"; {minus(signed(found.mean, metric))} from {group.baseline} ({ends}p = {p_shown(found.p_holm)} after Holm's correction)"


def _significance(comparison: Comparison) -> list[str]:
    """What the seeds can and do show."""
    found = comparison.differences
    if not found:
        return []
    sure = sum(difference.p_holm <= ALPHA for difference in found)
    claim = f"{sure or 'None'} of {len(found)} differences from a baseline is significant at {100 * ALPHA:.0f} % after Holm's correction."
    possible = [f"{line[0].upper()}{line[1:]}." for line in can_show([len(difference.seeds) for difference in found])]
    return [claim.replace(" is ", " are ") if sure > 1 else claim, *possible]


def _figures(comparison: Comparison, results: Sequence[TrialResult], rows: Sequence[Any]) -> list[dict[str, Any]]:
    """The figures as the page takes them: their titles are HTML, so that they wrap; the wide ones last."""
    made = []
    for name, figure in figures(comparison, results, rows).items():
        content = json.loads(figure.to_json(validate=False))
        words = content["layout"].pop("title")
        content["layout"].pop("template")
        lines = [html.unescape(line) for line in words["subtitle"]["text"].split("<br>")]
        made.append({"name": name, "title": html.unescape(words["text"]), "lines": lines, "wide": _is_wide(content), **content})
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
