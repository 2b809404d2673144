"""The methods of training. Each file of this folder, except `base`, is a method of the same name."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from pydantic.fields import FieldInfo

from rrn_core.config import TrainConfig
from rrn_core.errors import ConfigError
from rrn_core.presets import PRESETS
from rrn_core.setting import Setting, setting_of

if TYPE_CHECKING:
    from rrn_core.methods.base import Method
    from rrn_core.networks.quartet import Quartet

METHODS = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"))
DEFAULT = "rrn"


@cache
def method_of(name: str) -> Method:
    """The method of that name. Raises ConfigError if there is none."""
    if name not in METHODS:
        raise ConfigError(f'method: must be one of {", ".join(METHODS)}, got "{name}"')
    return cast("Method", import_module(f"{__name__}.{name}"))


def settings_class(method: str) -> type[TrainConfig]:
    """The class of the settings that the method reads. Raises ConfigError for an unknown name."""
    return method_of(method).Settings


def configure(preset: str | None = None, /, **settings: Any) -> TrainConfig:
    """The configuration of one run: `configure("digits", method="cps", epochs=2)`.

    Args:
        preset: one of `PRESETS`. Settings that the method does not have are left out.
        settings: values of the method's settings by name. All others have their defaults.

    Raises:
        ConfigError: an unknown preset or method.
        pydantic.ValidationError: settings that cannot be used; it holds every fault.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f'preset: must be one of {", ".join(PRESETS)}, got "{preset}"')
    named = {**PRESETS.get(preset or "", {}), **settings}
    kind = settings_class(named.get("method", DEFAULT))
    read = {name: value for name, value in named.items() if name in kind.model_fields or name in settings}
    return kind.of(read)


@cache
def all_settings() -> Mapping[str, FieldInfo]:
    """Every setting of every method by name. Settings that all methods have come first."""
    fields = dict(TrainConfig.model_fields)
    for name in METHODS:
        fields |= {field: info for field, info in settings_class(name).model_fields.items() if field not in fields}
    return fields


def methods_with(setting: str) -> tuple[str, ...]:
    """The methods that read a setting."""
    return tuple(name for name in METHODS if setting in settings_class(name).model_fields)


def settings_where(condition: Callable[[Setting], bool]) -> frozenset[str]:
    """Names of the settings whose properties fulfil the condition."""
    return frozenset(name for name, field in all_settings().items() if condition(setting_of(field)))


def build_networks(config: TrainConfig, num_classes: int) -> Quartet:
    """The networks of a run at iteration 0, drawn from `config.seed` alone. The global random state does not change."""
    return method_of(config.method).build_networks(config, num_classes)
