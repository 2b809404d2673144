"""The git checkout that the running code comes from, if it does."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType

_WITHIN_S = 10.0


@cache
def git_state() -> Mapping[str, str]:
    """Commit of the code that runs and whether it was changed since; `unknown` outside a checkout. Looked up once a process."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else the package merely lies inside someone else's checkout
        state = {"git_commit": _git("rev-parse", "HEAD").strip(), "dirty": str(bool(_git("status", "--porcelain").strip())).lower()}
    except (OSError, subprocess.SubprocessError):
        state = {"git_commit": "unknown", "dirty": "unknown"}
    return MappingProxyType(state)


def git_diff() -> dict[str, str]:
    """What was changed since the commit of the code that runs, as the file `git.diff`; nothing where nothing was."""
    if git_state()["dirty"] == "true":
        with suppress(OSError, subprocess.SubprocessError):
            return {"git.diff": _git("diff", "HEAD")}
    return {}


def _git(*words: str) -> str:
    """What git says. Raises OSError, SubprocessError."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=_WITHIN_S).stdout
