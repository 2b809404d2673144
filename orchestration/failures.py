"""Why an attempt at a trial ended: six classes of failure, decided by the exception's type. Each class has its own budget of restarts."""

from __future__ import annotations

import errno
import hashlib
import re
import traceback
from typing import Literal, get_args

from orchestration.errors import Preempted, SweepError
from rrn_core.errors import CheckpointError, ConfigError, DataError

Failure = Literal["lost", "memory", "diverged", "code", "data", "unavailable"]
"""
lost         the worker died without reporting an error, its node was lost, or it was preempted
memory       out of memory, of the GPU or of the host
diverged     a loss or gradient is no longer finite
code         any other exception: a bug of this program or of a library
data         images, labels, lists, weights or settings that cannot be used
unavailable  the store did not answer, or its disk was full, failing or read-only, for longer than the trial waits; or it refused
"""
FAILURES: tuple[Failure, ...] = get_args(Failure)


def classify(error: BaseException) -> Failure:
    """The class of an exception that ended a training.

    Only the type decides. An exception from a worker process of torch's DataLoader has its original type, and the worker's traceback as
    its text.
    """
    if isinstance(error, Preempted):
        return "lost"
    if isinstance(error, FloatingPointError):
        return "diverged"
    if _no_memory(error):
        return "memory"
    if isinstance(error, SweepError):  # in a trial only the store raises these
        return "unavailable"
    if isinstance(error, DataError | ConfigError | CheckpointError):
        return "data"
    if _out_of_memory(error):
        return "memory"
    if isinstance(error, OSError):
        return "unavailable" if _disk_full(error) else "data"
    return "code"


def classify_death(text: str) -> Failure:
    """The class of a worker's death, from Ray's description. Ray mentions the kernel's memory as a possible reason of every death."""
    return "memory" if re.search(r"OutOfMemoryError|running low on memory", text) else "lost"


def reason_of(error: BaseException) -> str:
    """Type and text of an exception, on one line."""
    kind, text = type(error).__name__, str(error).strip()
    if "Original Traceback" in text:  # from a worker process of torch's DataLoader: the last line is `module.Type: text`
        last = text.splitlines()[-1]
        text = last.partition(f"{kind}: ")[2] or last
    return f"{kind}: {' '.join(text.split())}"


def fingerprint(text: str) -> str:
    """A hash that is equal for tracebacks of the same fault: of the calls and the exception's type, but not of its text.

    The text may hold numbers that differ.
    """
    calls = re.findall(r'File "(?:.*[/\\])?(.*?)", line (\d+), in (\S+)', text)
    kind = (text.strip().splitlines() or [""])[-1].partition(":")[0]
    return hashlib.sha256(repr((calls, kind)).encode()).hexdigest()[:16]


def where(text: str) -> str:
    """File and line of the innermost call of a traceback."""
    calls = re.findall(r'File "(?:.*[/\\])?(.*?)", line (\d+)', text)
    return ":".join(calls[-1]) if calls else "an unknown place"


def traceback_of(error: BaseException) -> str:
    """The whole traceback, as Python prints it."""
    return "".join(traceback.format_exception(error))


def _out_of_memory(error: BaseException) -> bool:
    """torch's error is recognised by its name, so that this module does not import torch."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def _no_memory(error: BaseException) -> bool:
    """The kernel refused memory, to this process or to the store that it writes to."""
    return errno.ENOMEM in (getattr(error, "errno", None), getattr(error.__cause__, "errno", None))


def _disk_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
