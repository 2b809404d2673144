"""The methods of training: a method is a file of this folder, and its name is the file's."""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rrn_core.config import TrainConfig
from rrn_core.presets import PRESETS
from rrn_core.setting import Setting, setting_of

if TYPE_CHECKING:
    from rrn_core.methods.base import Method
    from rrn_core.networks.quartet import Quartet

METHODS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))
DEFAULT = "rrn"


@cache
def method_of(name: str) -> Method:
    """The method of that name. Raises ValueError where there is none."""
    if name not in METHODS:
        raise ValueError(f'method: must be one of {", ".join(METHODS)}, got "{name}"')
    return cast("Method", import_module(f"{__name__}.{name}"))


def settings_class(method: str) -> type[TrainConfig]:
    """The settings that the method reads. Raises ValueError for an unknown name."""
    return method_of(method).Settings


def configure(preset: str | None = None, /, **settings: Any) -> TrainConfig:
    """One run: `configure("digits", method="cps", epochs=2)`.

    Args:
        preset: one of `PRESETS`; what it says of settings that the method does not have is left out.
        settings: values of the method's settings by name; all others have their defaults.

    Raises:
        ValueError: an unknown preset or method, or pydantic's ValidationError with every fault of the settings.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f'preset: must be one of {", ".join(PRESETS)}, got "{preset}"')
    named = {**PRESETS.get(preset or "", {}), **settings}
    kind = settings_class(named.get("method", DEFAULT))
    read = {name: value for name, value in named.items() if name in kind.model_fields or name in settings}
    return kind.model_validate_json(json.dumps(read, default=_plain))  # JSON, because strict Python input refuses a list for a tuple


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else str(value)


@cache
def all_settings() -> Mapping[str, FieldInfo]:
    """Every setting of every method by name, those that all methods have first."""
    fields = dict(TrainConfig.model_fields)
    for name in METHODS:
        fields |= {field: info for field, info in settings_class(name).model_fields.items() if field not in fields}
    return fields


def methods_with(setting: str) -> tuple[str, ...]:
    """The methods that read a setting."""
    return tuple(name for name in METHODS if setting in settings_class(name).model_fields)


def settings_where(holds: Callable[[Setting], bool]) -> frozenset[str]:
    """Names of the settings whose facts are such."""
    return frozenset(name for name, field in all_settings().items() if holds(setting_of(field)))


def build_networks(config: TrainConfig, num_classes: int) -> Quartet:
    """The networks of a run as at iteration 0, drawn from `config.seed` alone; the global random state is left as it was."""
    return method_of(config.method).build_networks(config, num_classes)
