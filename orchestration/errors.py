"""The errors that a user can fix.

SweepError                 the command line prints its text and exits with code 2
├── SpecError              the sweep file has faults
├── StoreError             the store refused a request, or its configuration is wrong
│   ├── NotFound           no object under this key
│   ├── Conflict           a conditional put failed: another process wrote the key first
│   ├── Corrupt            the bytes differ from their checksum
│   └── StoreUnavailable   no usable answer within the deadline
├── Fenced                 a newer attempt owns the trial: this one must stop and write nothing
├── Preempted              the trial's process received SIGTERM
├── LeaseHeld              another driver is running this sweep
├── LeaseLost              another driver has taken over this sweep: this one must stop
├── TrackingError          MLflow refused a request, or its configuration is wrong
└── ClusterError           Ray refused a request, or its configuration is wrong
    └── ClusterLost        Ray ended while trials ran, and did not come back

`rrn_core` has classes of its own (rrn_core/errors.py), which `user_errors` turns into SweepError.
"""
# ruff: noqa: N818  (NotFound and Conflict are outcomes that callers expect, and read better without "Error")

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from orchestration.formatting import one_line
from rrn_core.errors import CheckpointError, ConfigError, DataError


class SweepError(Exception):
    """A fault that the user can fix. Each argument is one line: where, what was found, what was expected, what to do next."""

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.args))


class SpecError(SweepError):
    """All faults of a sweep file, one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.faults))


class StoreError(SweepError):
    """The store refused a request, and a retry would not help."""


class _KeyError(StoreError):
    """A StoreError about one key. Its only argument is the key, so that Ray can pickle it."""

    text = "{key}"

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return self.text.format(key=one_line(self.key))


class NotFound(_KeyError):
    """There is no object under `key`."""

    text = "{key}: not in the store"


class Conflict(_KeyError):
    """The object under `key` is not the one that a conditional put expected. Nothing was written."""

    text = "{key}: changed by another process"


class Corrupt(_KeyError):
    """The bytes under `key` differ from the checksum that was stored with them."""

    text = "{key}: damaged, its checksum differs"


class StoreUnavailable(StoreError):
    """The store gave no usable answer within the deadline."""


class Fenced(SweepError):
    """A newer attempt owns the trial. This attempt must not write anything more."""


class Preempted(SweepError):
    """The trial's process received SIGTERM, from a batch system or before a spot machine is reclaimed."""


class LeaseHeld(SweepError):
    """Another driver is running this sweep. The text says where, and what to do."""


class LeaseLost(SweepError):
    """Another driver has taken over this sweep. This driver must not change anything more."""


class TrackingError(SweepError):
    """MLflow refused a request, or its configuration is wrong."""


class ClusterError(SweepError):
    """Ray refused a request, or its configuration is wrong."""


class ClusterLost(ClusterError):
    """Ray ended while trials ran, and did not come back. The same command resumes the sweep."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors of `rrn_core` and of the file system that the user can fix into SweepError. All others, which are bugs, pass."""
    try:
        yield
    except (DataError, ConfigError, CheckpointError, OSError) as error:
        raise SweepError(str(error)) from error


def without_password(text: str) -> str:
    """The text without the credentials of the URIs in it."""
    return re.sub(r"//[^/@\s]*@", "//", text)
