"""git_checkout.py in a real repository."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.run import git_checkout

SCRIPT = """
import json, git_checkout
diff = {name: body.decode("latin-1") for name, body in git_checkout.git_diff().items()}
print(json.dumps([dict(git_checkout.git_state()), diff]))
"""


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
    assert "-one\n+caf\xe9\n" in files["git.diff"]


@pytest.fixture
def repository(folder: Path) -> Path:
    """A commit with files of several kinds, in a repository whose user has changed everything that changes how git shows a diff."""
    (folder / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    (folder / "blob.bin").write_bytes(bytes(range(256)))
    (folder / "a name\u00e9.txt").write_text("".join(f"{i}\n" for i in range(40)))
    (folder / ".env").write_text("KEY=old\n")
    (folder / "link").symlink_to("notes.txt")
    (folder / ".gitattributes").write_text("*.bin diff=shown\n*.txt diff=shown\n")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    settings = {"noprefix": "true", "mnemonicPrefix": "true", "external": "true", "context": "0", "relative": "true", "renames": "copies"}
    settings |= {"shown.textconv": "true", "shown.command": "true"}
    others = {"color.ui": "always", "color.diff": "always", "status.showUntrackedFiles": "no"}
    for name, value in {**{f"diff.{name}": value for name, value in settings.items()}, **others}.items():
        git(folder, "config", name, value)
    return folder


def test_the_diff_applies_in_a_clean_clone_whatever_the_user_has_configured(repository: Path, tmp_path_factory: pytest.TempPathFactory):
    (repository / "notes.txt").write_bytes(b"caf\xe9\n")
    (repository / "dos.txt").write_bytes(b"one\r\nTWO\r\n")
    (repository / "blob.bin").write_bytes(bytes(range(255, -1, -1)))
    (repository / "a name\u00e9.txt").rename(repository / "moved.txt")
    git(repository, "add", "moved.txt")
    (repository / "link").unlink()
    (repository / "link").write_text("a file now\n")
    (repository / "pkg").mkdir()
    (repository / "pkg" / "mine.py").write_text("x = 1\n")
    clone = tmp_path_factory.mktemp("clone") / "clone"
    git(repository, "clone", "--no-local", str(repository), str(clone))
    diff = state_and_diff(repository)[1]["git.diff"].encode("latin-1")
    (clone / "git.diff").write_bytes(diff)
    git(clone, "apply", "--whitespace=nowarn", "git.diff")
    for name in ("notes.txt", "dos.txt", "blob.bin", "moved.txt", "link", "pkg/mine.py"):
        assert (clone / name).read_bytes() == (repository / name).read_bytes(), name
    assert not (clone / "a name\u00e9.txt").exists()
    assert b"untracked module: 'pkg/mine.py'" in diff


def test_an_untracked_module_alone_makes_the_checkout_dirty_and_is_in_the_diff(repository: Path):
    (repository / "mine.py").write_text("x = 1\n")
    state, files = state_and_diff(repository)
    assert state["dirty"] == "true"
    assert "+x = 1\n" in files["git.diff"]


@pytest.mark.parametrize(
    "name", [".env", "prod.env", ".env.local", "server.pem", "id_rsa", "id_ed25519", "aws_credentials.json", ".aws/config", "Secrets.yaml"]
)
def test_a_file_that_looks_like_a_secret_is_named_and_left_out(repository: Path, name: str):
    (repository / name).parent.mkdir(exist_ok=True)
    (repository / name).write_text("KEY=hunter2\n")
    (repository / "notes.txt").write_bytes(b"two\n")
    untracked = state_and_diff(repository)[1]["git.diff"]
    git(repository, "add", name)
    tracked = state_and_diff(repository)[1]["git.diff"]
    for diff in (untracked, tracked):
        assert "hunter2" not in diff
        assert f"# left out, may hold a secret: '{name}'\n" in diff
        assert "+two\n" in diff


def test_a_change_that_holds_a_key_is_left_out(repository: Path):
    for name in ("notes.txt", "mine.py"):
        (repository / name).write_text("-----BEGIN RSA PRIVATE KEY-----\nhunter2\n")
    diff = state_and_diff(repository)[1]["git.diff"]
    assert "hunter2" not in diff
    assert diff.count("left out, may hold a secret") == 2


def test_what_makes_the_diff_too_long_is_left_out_whole(repository: Path):
    (repository / "notes.txt").write_text("x" * 2**21)
    (repository / "dos.txt").write_text("short\n")
    diff = state_and_diff(repository)[1]["git.diff"]
    assert len(diff) < 2**20
    assert "left out, too long: 'a/notes.txt b/notes.txt'" in diff
    assert "+short\n" in diff
