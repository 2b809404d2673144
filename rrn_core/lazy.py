"""Modules that load at their first use: planning reads the settings of a method and never needs torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands in for the module `name` until an attribute of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
