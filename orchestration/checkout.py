"""The git checkout that the running code comes from, if it does."""

from __future__ import annotations

import subprocess
from contextlib import suppress
from pathlib import Path

LONGEST_DIFF = 2**20
"""Characters of uncommitted changes that are shown."""


def git_diff() -> dict[str, str]:
    """What was changed since the commit of the code that runs, as the file `git.diff`; nothing where nothing was."""
    if git_state()["dirty"] != "true":
        return {}
    command = ["git", "-C", str(Path(__file__).parent), "diff", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        return {"git.diff": subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout[:LONGEST_DIFF]}
    return {}


def git_state() -> dict[str, str]:
    """Commit of the code that runs and whether it was changed since; `unknown` outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the package merely lies inside someone else's checkout
        return {"git_commit": git("rev-parse", "HEAD"), "dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": "unknown", "dirty": "unknown"}
