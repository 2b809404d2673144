"""A comparison as a table: for the terminal, for Markdown, for LaTeX; every one with the notes that its numbers need."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from statistics import mean, stdev

from orchestration.compare.comparison import Cell, Comparison, ComparisonGroup
from orchestration.compare.metrics import higher_is_better, number, scale
from orchestration.compare.paired import Difference
from orchestration.formatting import table

NONE = "-"
"""Stands where there is nothing to show."""
PLUS_MINUS = "+-"
"""Of plain text; Markdown and LaTeX have a sign for it."""
_DIFFERENCE = ("difference", "95 % interval", "p", "p (Holm)", "P(better)")
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")
_TEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    '"': "''",
    "[": "{[}",  # which after \\ would open an argument
    "]": "{]}",
}


def as_text(comparison: Comparison) -> str:
    """For the terminal: a block for each group, the notes below."""
    rows = [_row(cell, group, comparison.metric) for group in comparison.groups for cell in group.cells]
    head, *lines = table([["cell", "seeds", "mean", "sd", *_DIFFERENCE], *rows]).splitlines()
    blocks = [comparison.title]
    for group in comparison.groups:
        of_group, lines = lines[: len(group.cells)], lines[len(group.cells) :]
        blocks.append("\n".join([*([group.label] if comparison.by else []), head, *of_group]))
    return "\n\n".join([*blocks, "\n".join(comparison.notes)])


def as_markdown(comparison: Comparison) -> str:
    """One table, the best mean of each group in bold, the notes as a list below."""
    head, rows, bold = one_table(comparison)
    return f"{comparison.title}\n\n{markdown(head, rows, _with_bold_note(comparison, bold), bold=bold)}"


def as_latex(comparison: Comparison) -> str:
    """A table for the package booktabs, the best mean of each group in bold, title and notes as its caption."""
    head, rows, bold = one_table(comparison)
    sizes = [len(group.cells) for group in comparison.groups]
    caption = [f"{comparison.title} of {', '.join(comparison.sweeps)}", *_with_bold_note(comparison, bold)]
    name = "-".join((*comparison.sweeps, comparison.metric, comparison.at))
    return latex(head, rows, caption, name=name, left=len(head) - len(_DIFFERENCE) - 2, blocks=sizes, bold=bold)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], *, bold: Collection[tuple[int, int]] = ()) -> str:
    """A table and a list of notes. `bold`: (row, column) of cells."""
    marked = [[f"**{_md(text)}**" if (i, j) in bold else _md(text) for j, text in enumerate(row)] for i, row in enumerate(rows)]
    lines = [[_md(name) for name in head], ["---"] * len(head), *marked]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *(f"- {_md(note)}" for note in notes)])


def latex(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    *,
    name: str,
    left: int,
    blocks: Sequence[int],
    bold: Collection[tuple[int, int]] = (),
) -> str:
    """A floating table whose caption holds the notes.

    Args:
        left: so many columns are aligned to the left, the others to the right.
        blocks: numbers of rows that belong together; a rule stands between blocks.
        bold: (row, column) of cells.
    """
    marked = [[f"\\textbf{{{_tex(text)}}}" if (i, j) in bold else _tex(text) for j, text in enumerate(row)] for i, row in enumerate(rows)]
    lines = [" & ".join(map(_tex, head)) + " \\\\"]
    for size in blocks:
        lines += ["\\midrule", *(f"{' & '.join(row)} \\\\" for row in marked[:size])]
        marked = marked[size:]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}",
            "\\begin{table}",
            "  \\centering",
            f"  \\caption{{{' '.join(f'{_tex(_sentence(note))}.' for note in notes)}}}",
            f"  \\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', name)}}}",
            f"  \\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}",
            *(f"    {line}" for line in ("\\toprule", *lines, "\\bottomrule")),
            "  \\end{tabular}",
            "\\end{table}",
        ]
    )


def best_cells(group: ComparisonGroup, metric: str) -> set[str]:
    """Labels of the cells whose mean, as it is shown, is the best of a group of several."""
    means = {cell.label: number(mean(cell.values.values()), metric) for cell in group.cells if cell.values}
    if len(means) < 2:
        return set()
    best = (max if higher_is_better(metric) else min)(means.values(), key=float)
    return {label for label, shown in means.items() if shown == best}


def mean_shown(values: Sequence[float], metric: str) -> str:
    """`71.20`."""
    return number(mean(values), metric) if values else NONE


def spread_shown(values: Sequence[float], metric: str) -> str:
    """Sample standard deviation."""
    return number(stdev(values), metric) if len(values) > 1 else NONE


def p_shown(p: float) -> str:
    """`0.031`, `<0.001`."""
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def signed(value: float, metric: str) -> str:
    """A difference."""
    return f"{value:+.2f}" if scale(metric)[1] else f"{value:+.3g}"


def interval_shown(difference: Difference, metric: str) -> str:
    """`[+0.10, +0.90]`."""
    if difference.low is None or difference.high is None:
        return NONE
    return f"[{signed(difference.low, metric)}, {signed(difference.high, metric)}]"


def better_shown(difference: Difference) -> str:
    """`67 % of 3`: the share of so many seeds in which the cell is better."""
    return f"{100 * difference.better:.0f} % of {len(difference.seeds)}"


def _row(cell: Cell, group: ComparisonGroup, metric: str) -> list[str]:
    values = list(cell.values.values())
    start = [cell.label, str(len(values)), mean_shown(values, metric), spread_shown(values, metric)]
    if (found := cell.difference) is None:
        return [*start, "baseline" if cell.label == group.baseline else NONE, *[NONE] * (len(_DIFFERENCE) - 1)]
    tested = [interval_shown(found, metric), p_shown(found.p), p_shown(found.p_holm), better_shown(found)]
    return [*start, signed(found.mean, metric), *tested]


def one_table(comparison: Comparison) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Head and rows with the group in front, and where the best means stand."""
    parts = [", ".join(comparison.by)] if comparison.by else []
    head = [*parts, "cell", "seeds", f"mean {PLUS_MINUS} sd", *_DIFFERENCE]
    rows: list[list[str]] = []
    bold = set()
    for group in comparison.groups:
        best = best_cells(group, comparison.metric)
        for cell in group.cells:
            label, seeds, average, spread, *rest = _row(cell, group, comparison.metric)
            if cell.label in best:
                bold.add((len(rows), len(parts) + 2))
            together = average if spread == NONE else f"{average} {PLUS_MINUS} {spread}"
            rows.append([*([group.label] if parts else []), label, seeds, together, *rest])
    return head, rows, bold


def _with_bold_note(comparison: Comparison, bold: Collection[tuple[int, int]]) -> list[str]:
    return [*comparison.notes, *(["bold: the best mean of its group, significant or not"] if bold else [])]


def _sentence(note: str) -> str:
    """A note with a capital, unless its first word is a symbol or an abbreviation."""
    return note[:1].upper() + note[1:] if note[:2].islower() and note[:2].isalpha() else note


def _md(text: str) -> str:
    return _MINUS.sub("−", text.replace(PLUS_MINUS, "±").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*"))


def _tex(text: str) -> str:
    spelt = "".join(_TEX.get(letter, letter) for letter in text)
    return _MINUS.sub("$-$", spelt.replace(PLUS_MINUS, "$\\pm$"))
