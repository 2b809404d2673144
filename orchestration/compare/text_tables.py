"""A comparison as a table for the terminal, for Markdown, for LaTeX and for MLflow, with the notes that its numbers need."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from orchestration.compare.columns import CELLS_IN_DOCUMENTS, CELLS_IN_TERMINAL, GROUP, MEAN_AND_SD, cell_columns, texts
from orchestration.compare.comparison import Comparison, ComparisonGroup
from orchestration.compare.metrics import PLUS_MINUS, higher_is_better, number
from orchestration.compare.notes import notes
from orchestration.formatting import table

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
    defined = cell_columns(comparison)
    columns = [defined[name] for name in CELLS_IN_TERMINAL]
    head, *lines = table([[column.name for column in columns], *texts(columns, comparison.cells)]).splitlines()
    blocks = [comparison.title]
    for group in comparison.groups:
        of_group, lines = lines[: len(group.cells)], lines[len(group.cells) :]
        blocks.append("\n".join([*([group.label] if comparison.by else []), head, *of_group]))
    return "\n\n".join([*blocks, "\n".join(notes(comparison))])


def as_markdown(comparison: Comparison) -> str:
    """One table, the best mean of each group in bold, the notes as a list below."""
    head, rows, bold = _one_table(comparison)
    return f"{comparison.title}\n\n{markdown(head, rows, _notes(comparison, bold), bold=bold)}"


def as_latex(comparison: Comparison) -> str:
    """A table for the package booktabs, the best mean of each group in bold, title and notes as its caption."""
    head, rows, bold = _one_table(comparison)
    sizes = [len(group.cells) for group in comparison.groups]
    caption = [f"{comparison.title} of {', '.join(comparison.sweeps)}", *_notes(comparison, bold)]
    name = "-".join((*comparison.sweeps, comparison.metric, comparison.at))
    return latex(head, rows, caption, name=name, left=head.index("seeds"), blocks=sizes, bold=bold)


def as_mlflow_table(comparison: Comparison) -> str:
    """JSON that MLflow's UI shows as a table. It has no place for notes, so the checkpoint rule heads the means."""
    head, rows, _ = _one_table(comparison)
    return json.dumps({"columns": [comparison.title if name == MEAN_AND_SD else name for name in head], "data": rows})


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], *, bold: Collection[tuple[int, int]] = ()) -> str:
    """A table and a list of notes. `bold`: (row, column) of texts."""
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
        left: number of columns that are aligned to the left; the others are aligned to the right.
        blocks: number of rows of each block; a rule stands between blocks.
        bold: (row, column) of texts.
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
            f"  \\caption{{{_tex(sentences(notes))}}}",
            f"  \\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', name)}}}",
            f"  \\begin{{tabular}}{{{'l' * left}{'r' * (len(head) - left)}}}",
            *(f"    {line}" for line in ("\\toprule", *lines, "\\bottomrule")),
            "  \\end{tabular}",
            "\\end{table}",
        ]
    )


def typographic(text: str) -> str:
    """With a minus sign as wide as a plus, and the sign for plus-minus."""
    return _MINUS.sub("−", text.replace(PLUS_MINUS, "±"))


def sentences(notes: Iterable[str]) -> str:
    """Notes as running text."""
    return " ".join(f"{_capitalised(note)}." for note in notes)


def _one_table(comparison: Comparison) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Head and rows of a table that holds all groups, and the (row, column) of the best mean of each."""
    defined = cell_columns(comparison)
    columns = [defined[name] for name in CELLS_IN_DOCUMENTS]
    if comparison.by:
        columns.insert(0, replace(GROUP, name=", ".join(comparison.by)))
    head = [column.name for column in columns]
    marked = [best for group in comparison.groups for best in _are_best(group, comparison.metric)]
    return head, texts(columns, comparison.cells), {(row, head.index(MEAN_AND_SD)) for row, best in enumerate(marked) if best}


def _are_best(group: ComparisonGroup, metric: str) -> list[bool]:
    """Whether each cell's mean, as it is shown, is the best of several."""
    means = [float(number(cell.mean, metric)) if cell.values else None for cell in group.cells]
    known = [value for value in means if value is not None]
    best = (max if higher_is_better(metric) else min)(known) if len(known) > 1 else None
    return [value is not None and value == best for value in means]


def _notes(comparison: Comparison, bold: Collection[tuple[int, int]]) -> list[str]:
    return [*notes(comparison), *(["bold: the best mean of its group, significant or not"] if bold else [])]


def _capitalised(note: str) -> str:
    """A note with a capital, unless its first word is a symbol or an abbreviation."""
    return note[:1].upper() + note[1:] if note[:2].islower() and note[:2].isalpha() else note


def _md(text: str) -> str:
    return typographic(text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def _tex(text: str) -> str:
    spelt = "".join(_TEX.get(letter, letter) for letter in text)
    return _MINUS.sub("$-$", spelt.replace(PLUS_MINUS, "$\\pm$"))
