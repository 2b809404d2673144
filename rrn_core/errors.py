"""The faults that a user can fix. A ValueError of any other class is a bug.

ValueError
├── DataError         images, labels, lists, splits, a data root or a weights file cannot be used
├── ConfigError       a setting has a value that cannot be used
└── CheckpointError   files are damaged, or are not a checkpoint of this run

The text is one line: where, what was found, what was expected, what to do next. Each class takes this one string. So an error that a
worker process of torch's DataLoader raises arrives in the training process with its class.
"""

from __future__ import annotations


class DataError(ValueError):
    """The data or the weights must be fixed: an image, a label, a list, a split, a data root or a weights file cannot be used."""


class ConfigError(ValueError):
    """A setting must be fixed: its value is unknown, or does not fit the data, the other settings or this machine."""


class CheckpointError(ValueError):
    """The files are damaged, or are not a checkpoint of this run."""
