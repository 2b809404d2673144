"""Read commit and uncommitted changes of the git checkout that holds the running code."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import MappingProxyType

_TIMEOUT_S = 10.0


@cache
def git_state() -> Mapping[str, str]:
    """`git_commit` and `dirty` ("true" or "false") of the running code; both `unknown` outside a checkout. Read once per process."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # fails if the package only lies inside another project's checkout
        state = {"git_commit": _git("rev-parse", "HEAD").strip(), "dirty": str(bool(_git("status", "--porcelain").strip())).lower()}
    except (OSError, subprocess.SubprocessError):
        state = {"git_commit": "unknown", "dirty": "unknown"}
    return MappingProxyType(state)


def git_diff() -> dict[str, str]:
    """Uncommitted changes of the running code as the file `git.diff`; empty if there are none."""
    if git_state()["dirty"] == "true":
        with suppress(OSError, subprocess.SubprocessError):
            return {"git.diff": _git("diff", "HEAD")}
    return {}


def _git(*arguments: str) -> str:
    """Standard output of a git command. Raises OSError, SubprocessError."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=_TIMEOUT_S).stdout
