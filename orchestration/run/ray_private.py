"""What is read of Ray 2.60 beyond its public API: attributes, formats and texts that another release may change.

All were read from the source of that release. pyproject.toml bounds Ray to it; check every one of them before you raise the bound.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import ray
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial

from orchestration.record.trial_record import WORKER_DIED


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
