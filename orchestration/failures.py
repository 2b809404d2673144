"""Why an attempt at a trial ended: six classes, told apart by where the error came from; each has its own budget of new starts."""

from __future__ import annotations

import errno
import hashlib
import re
import traceback
from pathlib import Path
from typing import Literal, get_args

from orchestration.errors import Preempted, SweepError

Failure = Literal["lost", "memory", "diverged", "code", "data", "unavailable"]
"""
lost         its process or node died without a word, or was preempted
memory       out of memory, of the GPU or of the host
diverged     a loss or gradient is no longer finite
code         any other exception: a bug, ours or a library's
data         images, labels, lists or weights that cannot be used as they are
unavailable  the store, or room on a disk, was missing for longer than the trial's patience
"""
FAILURES: tuple[Failure, ...] = get_args(Failure)


def classify(error: BaseException) -> Failure:
    """The class of an exception that ended a training."""
    if isinstance(error, Preempted):
        return "lost"
    if isinstance(error, FloatingPointError):
        return "diverged"
    if isinstance(error, SweepError):  # of trials only the store raises these
        return "unavailable"
    if _out_of_memory(error):
        return "memory"
    if isinstance(error, OSError):
        return "unavailable" if _no_room(error) else "data"
    # by the house's rule our own ValueErrors tell users of their files; a library's tells of a bug
    return "data" if isinstance(error, ValueError) and "rrn_core" in Path(_file_of(error)).parts else "code"


def classify_death(text: str) -> Failure:
    """The class of a process's death, from what Ray says of it. Of every death it says that the kernel may have been out of memory."""
    return "memory" if re.search(r"OutOfMemoryError|running low on memory", text) else "lost"


def reason_of(error: BaseException) -> str:
    """One line: the type and the text of an exception."""
    text = str(error).strip()
    if "Original Traceback" in text:  # of a worker process of torch's loader, whose last line is type and text
        return text.splitlines()[-1]
    return f"{type(error).__name__}: {' '.join(text.split())}"


def fingerprint(text: str) -> str:
    """What two tracebacks of the same fault share: the calls and the exception's type, but not its words, which may hold numbers."""
    calls = re.findall(r'File "(?:.*[/\\])?(.*?)", line (\d+), in (\S+)', text)
    kind = (text.strip().splitlines() or [""])[-1].partition(":")[0]
    return hashlib.sha256(repr((calls, kind)).encode()).hexdigest()[:16]


def where(text: str) -> str:
    """File and line of the innermost call of a traceback."""
    calls = re.findall(r'File "(?:.*[/\\])?(.*?)", line (\d+)', text)
    return ":".join(calls[-1]) if calls else "an unknown place"


def traceback_of(error: BaseException) -> str:
    """The whole traceback, as Python would print it."""
    return "".join(traceback.format_exception(error))


def _out_of_memory(error: BaseException) -> bool:
    """torch's error is told by its name, so that nobody needs to import torch for this."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def _no_room(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _file_of(error: BaseException) -> str:
    """The file that raised; a worker process of torch's loader tells it in the text only."""
    if told := re.findall(r'File "(.*?)", line', str(error)):
        return str(told[-1])
    innermost = traceback.extract_tb(error.__traceback__)[-1:]
    return innermost[0].filename if innermost else ""
