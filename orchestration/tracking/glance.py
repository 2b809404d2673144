"""A glance at MLflow without importing it, which takes seconds: whether it plainly lacks something of a sweep that is complete."""

from __future__ import annotations

import base64
import json
import sqlite3
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Iterator
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from orchestration.errors import without_password

_SQLITE = "sqlite:///"
_PATIENCE_S = 2.0
_PER_PAGE = 1000
_RUNS = """
    SELECT runs.status, kind.value, trial.value FROM experiments JOIN runs USING (experiment_id)
    JOIN tags AS kind ON kind.run_uuid = runs.run_uuid AND kind.key = 'rrn.kind'
    LEFT JOIN tags AS trial ON trial.run_uuid = runs.run_uuid AND trial.key = 'trial_id'
    WHERE experiments.name = ? AND experiments.lifecycle_stage = 'active' AND runs.lifecycle_stage = 'active'
"""

_Row = tuple[str, str | None, str | None]
"""Status, kind and trial of a run that is not deleted."""


def shows_all(uri: str, sweep: str, trial_ids: Collection[str], *, auth: tuple[str, str] | None = None) -> bool:
    """False when MLflow plainly lacks something: the sweep's own run, a FINISHED run of one of these trials, or the end of any run.

    A server that does not answer within two seconds, or refuses, is not looked into: True.

    Args:
        trial_ids: all finished.
        auth: user and password of a server; else those in `uri`.
    """
    if uri.startswith(_SQLITE):
        return _complete_in_database(Path(uri.removeprefix(_SQLITE)), sweep, trial_ids)
    answers = [True]

    def ask() -> None:
        answers[0] = _complete_on_server(uri, sweep, trial_ids, auth)

    thread = threading.Thread(target=ask, daemon=True)  # looking up a name, or a server that drips, knows no timeout
    thread.start()
    thread.join(_PATIENCE_S)
    return answers[0]


def experiment_id(uri: str, sweep: str, *, auth: tuple[str, str] | None = None) -> str | None:
    """MLflow's name of the sweep's experiment; None where it has none, or does not answer within a few seconds."""
    try:
        if uri.startswith(_SQLITE):
            with closing(_opened(Path(uri.removeprefix(_SQLITE)))) as connection:
                found = connection.execute("SELECT experiment_id FROM experiments WHERE name = ?", [sweep]).fetchone()
                return str(found[0]) if found else None
        question = urlencode({"experiment_name": sweep})
        return str(_answer(uri, f"experiments/get-by-name?{question}", None, auth)["experiment"]["experiment_id"])
    except (sqlite3.Error, OSError, HTTPException, ValueError, LookupError, TypeError):
        return None


def _complete(rows: Iterable[_Row], trial_ids: Collection[str]) -> bool:
    runs = [(status, kind, trial_id) for status, kind, trial_id in rows if kind in ("sweep", "trial")]
    finished = {trial_id for status, kind, trial_id in runs if kind == "trial" and status == "FINISHED"}
    return any(kind == "sweep" for _, kind, _ in runs) and finished >= set(trial_ids) and all(run[0] != "RUNNING" for run in runs)


def _complete_in_database(path: Path, sweep: str, trial_ids: Collection[str]) -> bool:
    try:
        with closing(_opened(path)) as connection:
            return _complete(connection.execute(_RUNS, [sweep]), trial_ids)
    except sqlite3.Error as error:  # a database that somebody writes to just now may be whole; one that does not open is not
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY


def _opened(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=_PATIENCE_S)


def _complete_on_server(uri: str, sweep: str, trial_ids: Collection[str], auth: tuple[str, str] | None) -> bool:
    try:
        return _complete(_runs_on_server(uri, sweep, auth), trial_ids)
    except urllib.error.HTTPError as error:
        with error:
            return b"RESOURCE_DOES_NOT_EXIST" not in error.read()
    except (OSError, HTTPException, ValueError, LookupError, TypeError):  # no answer, or not one of MLflow's
        return True


def _runs_on_server(uri: str, sweep: str, auth: tuple[str, str] | None) -> Iterator[_Row]:
    found = _answer(uri, f"experiments/get-by-name?{urlencode({'experiment_name': sweep})}", None, auth)["experiment"]
    question = {"experiment_ids": [found["experiment_id"]], "run_view_type": "ACTIVE_ONLY", "max_results": _PER_PAGE}
    token: str | None = None
    while token != "" and found["lifecycle_stage"] == "active":
        page = _answer(uri, "runs/search", question | ({"page_token": token} if token else {}), auth)
        for run in page.get("runs", []):
            tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
            yield run["info"]["status"], tags.get("rrn.kind"), tags.get("trial_id")
        token = page.get("next_page_token", "")


def _answer(uri: str, path: str, question: dict[str, Any] | None, auth: tuple[str, str] | None) -> dict[str, Any]:
    parts = urlsplit(uri)
    user, password = auth or (unquote(parts.username or ""), unquote(parts.password or ""))
    headers = {"Content-Type": "application/json"}
    if user:
        headers["Authorization"] = f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    body = None if question is None else json.dumps(question).encode()
    request = urllib.request.Request(f"{without_password(uri).rstrip('/')}/api/2.0/mlflow/{path}", body, headers)
    with urllib.request.urlopen(request, timeout=_PATIENCE_S) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer
