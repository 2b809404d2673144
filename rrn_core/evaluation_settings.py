"""The settings that an evaluation of weights reads: those of the training, with the caller's changes."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from rrn_core.config import TrainConfig
from rrn_core.errors import ConfigError, DataError
from rrn_core.methods import all_settings, method_of
from rrn_core.presets import PRESETS
from rrn_core.setting import NO_NEUTRAL_VALUE, setting_of
from rrn_core.untrusted_text import faults_of

_FIELDS = TrainConfig.model_fields
_TRAINING_INPUTS = {
    "init_weights",
    *(name for name, field in _FIELDS.items() if setting_of(field).data in ("list", "partition", "contents")),
}
"""Settings that name the images and weights of a training. An evaluation does not need these files."""


def evaluation_config(stored: Mapping[str, Any] | None, backbone: str, changes: Mapping[str, Any]) -> TrainConfig:
    """The settings that all methods have, without the images and weights of the training.

    Args:
        stored: the settings of the training, as JSON holds them; None for an imported file, which has the defaults.
        backbone: that of the weights.
        changes: settings that replace the others.

    Raises:
        ConfigError: `changes` that cannot be used.
        DataError: `stored` settings that cannot be used.
    """
    _check(changes, backbone)
    protocol = PRESETS["cityscapes"] if changes.get("dataset") == "cityscapes" else {}  # its windows have another size
    # a release that did not know a setting trained at its neutral value
    neutral = {name: value for name, field in _FIELDS.items() if (value := setting_of(field).neutral) is not NO_NEUTRAL_VALUE}
    before = protocol | {"backbone": backbone} if stored is None else neutral | dict(stored)
    kept = {name: value for name, value in before.items() if name in _FIELDS and name not in _TRAINING_INPUTS}
    try:
        config = TrainConfig.of(kept | dict(changes))
        method_of(config.method)
    except ValidationError as error:
        raise (ConfigError if _concern(error, changes) else DataError)(faults_of(error)) from None
    except ConfigError as error:
        raise DataError(str(error)) from None
    return config


def _check(changes: Mapping[str, Any], backbone: str) -> None:
    """Raise ConfigError for changes that no evaluation reads, or that contradict the file."""
    for name in changes:
        if name == "method" or name not in _FIELDS:
            fault = "only a training reads this setting" if name in all_settings() else f"unknown setting{_did_you_mean(name)}"
            raise ConfigError(f"{name}: {fault}; change settings such as dataset, crop, ensemble, ensemble_weight, eval_batch, precision")
    if changes.get("backbone", backbone) != backbone:
        raise ConfigError(f"backbone: the weights are of {backbone}, got {changes['backbone']}; leave the setting out")


def _did_you_mean(name: str) -> str:
    close = get_close_matches(name, _FIELDS, 1)
    return f", did you mean {close[0]}?" if close else ""


def _concern(error: ValidationError, changes: Mapping[str, Any]) -> bool:
    """Whether one of the changes has a fault, or contradicts other settings."""
    return bool(changes) and any(not fault["loc"] or fault["loc"][0] in changes for fault in error.errors())
