"""The Region Relevance Network: `for report in train(TrainConfig(...), Runtime(...))`."""

from typing import TYPE_CHECKING, Any

from rrn_core.config import Runtime, TrainConfig
from rrn_core.presets import PRESETS

if TYPE_CHECKING:
    from rrn_core.training import Report, train

__all__ = ["PRESETS", "Report", "Runtime", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    """Import torch only when training is asked for: planning uses `rrn_core.config` and must start instantly."""
    if name in ("Report", "train"):
        from rrn_core import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
