"""Sweeps compared, in every format; and the comparison files that MLflow shows for a sweep."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args

from orchestration.compare.comparison import Comparison, compare
from orchestration.compare.long_table import as_csv, as_parquet
from orchestration.compare.page import page
from orchestration.compare.published import Form, published_table, reproductions
from orchestration.compare.results import At, results
from orchestration.compare.text_tables import as_latex, as_markdown, as_mlflow_table, as_text
from orchestration.formatting import instant
from orchestration.record.manifest import SCORE
from orchestration.sweep import Sweep

Format = Literal["text", "md", "latex", "csv", "parquet", "html"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[str, Format] = {".txt": "text", ".md": "md", ".tex": "latex", ".csv": "csv", ".parquet": "parquet", ".html": "html"}
PARTITION = "partition"


def compared(
    sweeps: Iterable[Sweep], *, by: Sequence[str] = (PARTITION,), metric: str = SCORE, at: At = "last", baseline: str | None = None
) -> Comparison:
    """The trials of all sweeps side by side. Raises SweepError for an unknown setting, metric or baseline."""
    found = list(sweeps)
    trials = results([(sweep.plans, sweep.manifests) for sweep in found], [sweep.states for sweep in found])
    return compare(trials, by=by, metric=metric, at=at, baseline=baseline)


def rendered(comparison: Comparison, sweeps: Sequence[Sweep], form: Format, *, source: Mapping[str, str]) -> bytes:
    """A comparison as a file of that format; text, Markdown, LaTeX and HTML with the published numbers of the sweep files beside ours.

    The same trials give the same bytes.

    Args:
        source: what is needed to reproduce a page, by name.
    """
    match form:
        case "csv":
            return as_csv(comparison).encode()
        case "parquet":
            return as_parquet(comparison)
        case "html":
            return _page(comparison, sweeps, source).encode()
        case "md":
            return _joined(as_markdown(comparison), sweeps, "md")
        case "latex":
            return _joined(as_latex(comparison), sweeps, "latex")
    return _joined(as_text(comparison), sweeps, "text")


def overview(sweep: Sweep, *, source: Mapping[str, str]) -> dict[str, bytes]:
    """One sweep compared, as a page and as tables: at the last epoch once all trials are finished, before that at the common one."""
    comparison = compared([sweep], at="last" if sweep.complete else "common")
    files = {f"comparison.{suffix}": rendered(comparison, [sweep], form, source=source) for suffix, form in _SHOWN.items()}
    return files | {"comparison.json": as_mlflow_table(comparison).encode()}


def load() -> None:
    """Import the packages that `rendered` needs, which load slowly."""
    for name in ("jinja2", "plotly.graph_objects", "plotly.io", "plotly.subplots", "pyarrow.parquet", "scipy.stats"):
        importlib.import_module(name)


def source(files: Iterable[Path], *, command: str, code: Mapping[str, str]) -> dict[str, str]:
    """What is needed to reproduce a page, by name: the command, the versions and commit that ran it, and each sweep file.

    Args:
        code: commit and state of the code that runs.
    """
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    state = ", ".join(f"{name} {value}" for name, value in code.items())
    facts = {"command": command, "versions": f"Python {platform.python_version()}, {versions}", "code": state}
    return facts | {str(file): file.read_text(encoding="utf-8").rstrip() for file in files}


_PACKAGES = ("rrn-sweep", "torch", "ray", "mlflow", "optuna")
_SHOWN: dict[str, Format] = {"html": "html", "md": "md", "csv": "csv"}


def _page(comparison: Comparison, sweeps: Sequence[Sweep], source: Mapping[str, str]) -> str:
    with_published = [(sweep, sweep.spec.published) for sweep in sweeps if sweep.spec.published]
    return page(
        comparison,
        title=", ".join(dict.fromkeys(sweep.name for sweep in sweeps)),
        published=[(numbers, reproductions(numbers, sweep.plans, sweep.manifests)) for sweep, numbers in with_published],
        source=source,
        updated=_newest(sweeps),
    )


def _newest(sweeps: Iterable[Sweep]) -> str:
    """The instant of the newest commit, `2026-11-26 04:10:33 UTC`; empty before the first."""
    newest_ms = max((manifest.updated_ms for sweep in sweeps for manifest in sweep.manifests.values()), default=None)
    return instant(newest_ms, UTC) if newest_ms is not None else ""


def _joined(text: str, sweeps: Iterable[Sweep], form: Form) -> bytes:
    tables = [published_table(sweep.spec.published, sweep.plans, sweep.manifests, form=form) for sweep in sweeps if sweep.spec.published]
    return ("\n\n".join([text, *tables]).rstrip() + "\n").encode()
