"""What is read of Ray 2.60 beyond its public API: attributes, formats and texts that another release may change.

All were read from the source of that release. pyproject.toml bounds Ray to it; check every one of them before you raise the bound.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial

from orchestration.record.trial_record import WORKER_DIED

LONGEST_FOLDER = (107 if sys.platform == "linux" else 103) - len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1")
"""Bytes of the path of a user's folder for Ray, which has Ray's folder `r` in it: Unix allows no longer paths of the sockets below."""


@contextmanager
def private_cluster(tmpdir: str | None) -> Iterator[None]:
    """In this context `ray.init` starts a cluster with a token of its own, and its processes have the given TMPDIR.

    Ray reads the token from the environment of each of its processes. Without one it would keep a token in a file in the user's home
    that everybody can read.
    """
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)} | ({"TMPDIR": tmpdir} if tmpdir else {})
    before = {name: os.environ.get(name) for name in given}
    _set_environment(given)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    Config.initialize("")  # Ray has read the environment at its import
    AuthenticationTokenLoader.instance().reset_cache()


def fault_in(answer: str) -> str | None:
    """Why `ray_probe` says that a cluster cannot be joined; None if it can be."""
    try:
        error: str | None = json.loads(answer.splitlines()[-1]).get("error")
    except (ValueError, IndexError):
        return "Ray's client ended without an answer; restart the cluster, or correct RAY_ADDRESS"
    if error and "AuthToken" in error:
        return "the cluster refuses the token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
    return error


def withhold_credentials() -> None:
    """Keep the driver's AWS keys out of the environment that Tune sends with every trial, and Ray's logs with it: nodes have their own."""
    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update({name for name in names if name.startswith("AWS_")})


def living_nodes() -> list[dict[str, float]]:
    """The resources of each living node."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def error_text(trial: Trial) -> str:
    """All errors of a trial that Tune has written into the driver's scratch folder."""
    with suppress(OSError):
        return Path(trial.error_file).read_text(errors="replace") if trial.error_file else ""
    return ""


def error_line(text: str) -> str:
    """Why an attempt ended, from `error_text`: what Ray's memory monitor measured, or the last line that names an error or a death."""
    if measured := re.findall(r"was ([\d.]+)GB used / ([\d.]+)GB limit", text):
        used, limit = map(float, measured[-1])
        return f"killed for memory: {used:.1f} of {limit:.1f} GB used"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line or "died" in line), WORKER_DIED)


def first_sentence(error: BaseException) -> str:
    """The first sentence of the last line of Ray's exception; the others give advice for other causes."""
    last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return last[0].partition(". ")[0].rstrip(".")
