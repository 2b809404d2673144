"""Read commit and uncommitted changes of the git checkout that holds the running code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

_TIMEOUT_S = 10.0
_LONGEST_DIFF = 2**20  # bytes
_MOST_MODULES = 100
_FORMAT = (  # what `git apply` takes, whatever the user has configured
    *("--no-ext-diff", "--no-textconv", "--no-color", "--binary", "--no-renames", "--no-relative", "--submodule=short"),
    *("--unified=3", "--src-prefix=a/", "--dst-prefix=b/"),
)
_SECRET_NAME = re.compile(
    r"\.env(\W.*|rc)?|.+\.env|id_(rsa|dsa|ecdsa|ed25519)\w*|\.?(netrc|npmrc|pypirc|pgpass|htpasswd|git-credentials|dockercfg)|kubeconfig"
    r"|.+\.(pem|key|p12|pfx|p8|jks|keystore|kdbx|ppk|gpg|asc|ovpn)|.*(secret|credential|passw|service[-_]?account|api[-_]?key).*|(.*[-_.])?tokens?([-_.].*)?",
    re.IGNORECASE,
)
_SECRET_FOLDER = re.compile(r"\.(ssh|aws|gnupg|kube|docker|azure|config)", re.IGNORECASE)
_SECRET_TEXT = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(AKIA|ASIA)[0-9A-Z]{16}\b|\b(gh[pousr]|glpat|hf|xox[abp])[-_]\w{20,}")
_SECRET_SOURCE = re.compile(r"(secret|credential|password)s?\.(py|md)", re.IGNORECASE)  # not tests/test_secrets.py


@cache
def git_state() -> Mapping[str, str]:
    """`git_commit` and `dirty` ("true" or "false") of the running code; both `unknown` outside a checkout. Read once per process."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # fails if the package only lies inside another project's checkout
        changed = _git("status", "--porcelain", "--untracked-files=normal").strip()
        state = {"git_commit": _git("rev-parse", "HEAD").decode().strip(), "dirty": str(bool(changed)).lower()}
    except (OSError, subprocess.SubprocessError):
        state = {"git_commit": "unknown", "dirty": "unknown"}
    return MappingProxyType(state)


def git_diff() -> dict[str, bytes]:
    """Uncommitted changes of the running code, and its untracked modules, as the file `git.diff`; empty if there are none.

    `git apply` takes it in a clean checkout of the commit. Its first lines name the untracked modules and what was left out: files that
    look like a secret, and files beyond _LONGEST_DIFF.
    """
    if git_state()["dirty"] != "true":
        return {}
    try:
        top = Path(os.fsdecode(_git("rev-parse", "--show-toplevel").removesuffix(b"\n")))
        changed = _names(_git("diff", "HEAD", "--name-only", "--no-renames", "--no-relative", "-z"))
        untracked = _names(_git("ls-files", "--others", "--exclude-standard", "-z", folder=top))
        hidden = [name for name in [*changed, *untracked] if _named_secret(name)]
        modules = [name for name in untracked if name.endswith(".py") and name not in hidden]
        without = [f":(top,exclude,literal){name}" for name in hidden]
        sections = re.split(rb"(?m)^(?=diff --git )", _git("diff", *_FORMAT, "HEAD", "--", ":(top)", *without))[1:]
        sections += [_added(name, top) for name in modules[:_MOST_MODULES]]
    except (OSError, subprocess.SubprocessError):
        return {}
    notes = [f"untracked module: {name!a}" for name in modules]
    notes += [f"left out, may hold a secret: {name!a}" for name in hidden]
    notes += [f"left out, only {_MOST_MODULES} are added: {name!a}" for name in modules[_MOST_MODULES:]]
    return {"git.diff": _joined(sections, notes)}


def _added(module: str, top: Path) -> bytes:
    """An untracked file as an added one."""
    return _git("diff", *_FORMAT, "--no-index", "--", os.devnull, module, folder=top, differs=1)


def _joined(sections: Iterable[bytes], notes: Iterable[str]) -> bytes:
    """The changes of all files below the notes, which `git apply` skips; without those that hold a secret or are too long."""
    lines, kept, left = list(notes), list[bytes](), _LONGEST_DIFF
    for section in sections:
        secret = _SECRET_TEXT.search(section) is not None
        if secret or len(section) > left:
            reason = "may hold a secret" if secret else "too long"
            header = section.partition(b"\n")[0].decode(errors="replace").removeprefix("diff --git ")
            lines.append(f"left out, {reason}: {header!a}")
        else:
            kept.append(section)
            left -= len(section)
    return "".join(f"# {line}\n" for line in lines).encode() + b"".join(kept)


def _named_secret(name: str) -> bool:
    path = Path(name)
    if any(_SECRET_FOLDER.fullmatch(folder) for folder in path.parts[:-1]):
        return True
    pattern = _SECRET_SOURCE if path.suffix in (".py", ".md") else _SECRET_NAME
    return pattern.fullmatch(path.name) is not None


def _names(listed: bytes) -> list[str]:
    return [os.fsdecode(name) for name in listed.split(b"\0") if name]


def _git(*arguments: str, folder: Path = Path(__file__).parent, differs: int = 0) -> bytes:
    """Standard output of a git command; `differs`: another exit code that is no error. Raises OSError, SubprocessError."""
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False, timeout=_TIMEOUT_S)
    if done.returncode not in (0, differs):
        done.check_returncode()
    return done.stdout
