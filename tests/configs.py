"""Configurations of any method from settings that not every method has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rrn_core import TrainConfig, configure
from rrn_core.methods import settings_class


def digits(usual: Mapping[str, Any], **settings: Any) -> TrainConfig:
    """The preset `digits` with `settings`, and with those of `usual` that the method has."""
    fields = settings_class(settings.get("method", "rrn")).model_fields
    return configure("digits", **{name: value for name, value in usual.items() if name in fields} | settings)
