"""git_checkout.py in a real repository."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.run import git_checkout

SCRIPT = "import json, git_checkout; print(json.dumps([dict(git_checkout.git_state()), git_checkout.git_diff()]))"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the module and a text file; not yet a repository."""
    shutil.copy(git_checkout.__file__, tmp_path / "git_checkout.py")
    (tmp_path / "notes.txt").write_bytes(b"one\n")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, timeout=60)


def state_and_diff(folder: Path) -> list[dict[str, str]]:
    done = subprocess.run([sys.executable, "-B", "-c", SCRIPT], cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_outside_a_repository_or_untracked_in_another_one_everything_is_unknown(folder: Path) -> None:
    unknown = [{"git_commit": "unknown", "dirty": "unknown"}, {}]
    assert state_and_diff(folder) == unknown
    git(folder, "init")
    assert state_and_diff(folder) == unknown


def test_the_commit_and_changes_are_returned_even_if_they_are_not_utf_8(folder: Path) -> None:
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    clean, nothing = state_and_diff(folder)
    assert (len(clean["git_commit"]), clean["dirty"], nothing) == (40, "false", {})
    (folder / "notes.txt").write_bytes(b"caf\xe9\n")  # no UTF-8
    changed, files = state_and_diff(folder)
    assert changed == clean | {"dirty": "true"}
    assert "-one\n+caf\ufffd\n" in files["git.diff"]
