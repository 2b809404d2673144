"""Modules that load at their first use. Planning reads the settings of a method and never needs torch."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Lazy:
    """Stands in for the module `name` and imports it when an attribute is read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)
