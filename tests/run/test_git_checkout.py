"""git_checkout.py: which code runs, seen in a real repository."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.run import git_checkout

ASK = "import json, git_checkout; print(json.dumps([dict(git_checkout.git_state()), git_checkout.git_diff()]))"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the module alone in it; not yet a repository."""
    shutil.copy(git_checkout.__file__, tmp_path / "git_checkout.py")
    (tmp_path / "notes.txt").write_bytes(b"one\n")
    return tmp_path


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True, timeout=60)


def asked(folder: Path) -> list[dict[str, str]]:
    done = subprocess.run([sys.executable, "-B", "-c", ASK], cwd=folder, check=True, capture_output=True, text=True, timeout=60)
    found: list[dict[str, str]] = json.loads(done.stdout)
    return found


def test_outside_a_repository_and_untracked_in_another_one_nothing_is_known(folder: Path) -> None:
    unknown = [{"git_commit": "unknown", "dirty": "unknown"}, {}]
    assert asked(folder) == unknown
    git(folder, "init")
    assert asked(folder) == unknown


def test_the_commit_is_named_and_changes_are_shown_whatever_their_bytes(folder: Path) -> None:
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    clean, nothing = asked(folder)
    assert (len(clean["git_commit"]), clean["dirty"], nothing) == (40, "false", {})
    (folder / "notes.txt").write_bytes(b"caf\xe9\n")  # no UTF-8
    changed, files = asked(folder)
    assert changed == clean | {"dirty": "true"}
    assert "-one\n+caf\ufffd\n" in files["git.diff"]
