"""The errors that a user can fix.

SweepError                 cli.py prints its text and exits with 2; cluster.py marks the trial as failed and carries on
├── SpecError              the sweep file has faults
├── StoreError             the checkpoint store refused, or is wrongly set up
│   ├── NotFound           no such key
│   ├── Conflict           a conditional put lost: somebody else wrote the key first
│   ├── Corrupt            the bytes differ from their checksum
│   └── StoreUnavailable   no answer within the deadline
├── Fenced                 another attempt has taken the trial over: this one must stop without a trace
├── Preempted              the trial's process was told to end
├── LeaseHeld              another driver is running this sweep
├── LeaseLost              another driver has taken this sweep over: this one must stop
├── TrackingError          MLflow
└── ClusterError           Ray
"""
# ruff: noqa: N818  (NotFound and Conflict are outcomes that callers expect, and read better without "Error")

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager


class SweepError(Exception):
    """Anything that the user, rather than a programmer, can put right."""


class SpecError(SweepError):
    """All faults of a sweep file at once, one line each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(self.faults)


class StoreError(SweepError):
    """The store cannot do what was asked, and waiting won't help."""


class _KeyError(StoreError):
    """A StoreError about one key; its text is made from the key, so that it survives pickling through Ray."""

    text = "{key}"

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return self.text.format(key=self.key)


class NotFound(_KeyError):
    """There is no object under `key`."""

    text = "{key}: not in the store"


class Conflict(_KeyError):
    """The object under `key` isn't the one that a conditional put expected; nothing was written."""

    text = "{key}: changed by another process"


class Corrupt(_KeyError):
    """The bytes under `key` differ from the checksum that was stored with them."""

    text = "{key}: damaged, its checksum differs"


class StoreUnavailable(StoreError):
    """The store gave no usable answer within the deadline."""


class Fenced(SweepError):
    """A newer attempt owns the trial; whatever this attempt still holds must not be written."""


class Preempted(SweepError):
    """The trial's process was told to end, by SIGTERM: a batch system, or the notice before a spot machine goes."""


class LeaseHeld(SweepError):
    """Another driver runs this very sweep; the text says where, and what to do about it."""


class LeaseLost(SweepError):
    """Another driver has taken the sweep over; this one may change nothing any more."""


class TrackingError(SweepError):
    """MLflow refused, or is wrongly set up."""


class ClusterError(SweepError):
    """Ray refused, or is wrongly set up."""


@contextmanager
def mendable() -> Iterator[None]:
    """What `rrn_core` and the file system raise for a fault that a user can mend, as a SweepError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SweepError(str(error)) from error


def without_password(text: str) -> str:
    """A URI, or a text that holds some, without credentials."""
    return re.sub(r"//[^/@\s]*@", "//", text)
