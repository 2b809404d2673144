"""The Region Relevance Network and its neighbours: `for report in train(configure("digits"), Runtime())`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rrn_core.config import Runtime, TrainConfig
from rrn_core.methods import configure
from rrn_core.presets import PRESETS

if TYPE_CHECKING:
    from rrn_core.state import CheckpointError
    from rrn_core.training import Report, train

__all__ = ["PRESETS", "CheckpointError", "Report", "Runtime", "TrainConfig", "configure", "train"]

_HOMES = {"CheckpointError": "state", "Report": "training", "train": "training"}


def __getattr__(name: str) -> Any:
    """Import torch only when training is asked for: planning uses `rrn_core.config` and must start instantly."""
    if name in _HOMES:
        return getattr(import_module(f"rrn_core.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
