"""The Region Relevance Network and related methods: `for report in train(configure("digits"), Runtime())`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rrn_core.config import Runtime, TrainConfig
from rrn_core.errors import CheckpointError, ConfigError, DataError
from rrn_core.methods import configure
from rrn_core.presets import PRESETS

if TYPE_CHECKING:
    from rrn_core.training import Report, train

__all__ = ["PRESETS", "CheckpointError", "ConfigError", "DataError", "Report", "Runtime", "TrainConfig", "configure", "train"]

_NEED_TORCH = ("Report", "train")


def __getattr__(name: str) -> Any:
    """Import torch only when training is used: planning needs the settings alone and must start quickly."""
    if name in _NEED_TORCH:
        return getattr(import_module("rrn_core.training"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
