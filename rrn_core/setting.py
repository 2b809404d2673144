"""What the program knows of a setting besides its type and default. Each field states it once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic.fields import FieldInfo

Group = Literal["run", "data", "networks", "objective", "optimisation", "evaluation"]
DataRole = Literal["set", "list", "partition", "scene", "view", "contents"]
"""
set        selects the data set
list       names a file with names of images
partition  selects the training images that are labelled
scene      says how the scenes of `digits` are made
view       says how much of an image a network sees at once
contents   says what the files hold that other settings name; a sweep fills it in
"""
ActsFrom = Literal["start", "warm-up's end", "region loss", "evaluation"]
"""The first moment at which the value can change anything. `evaluation` never changes the weights."""

NO_NEUTRAL_VALUE: Final = object()
"""Marks a setting that is part of every identity."""


@dataclass(frozen=True)
class Setting:
    """Properties of one setting, attached to its field by `Annotated`. Every table of settings elsewhere is derived from them."""

    group: Group
    """The group that the setting is listed in."""
    changes_cost: bool = True
    """Whether it changes the time of an iteration or of a validation image, or the memory of a trial."""
    data: DataRole | None = None
    """Its role in deciding which images are used and how; None if it has none."""
    acts_from: ActsFrom = "start"
    """The first moment at which the value can change anything."""
    headline: bool = False
    """Whether MLflow shows it as a parameter even at its default."""
    neutral: Any = NO_NEUTRAL_VALUE
    """The value that equals the behaviour before the setting existed. At this value the setting is left out of the identity."""


def setting_of(field: FieldInfo) -> Setting:
    """The `Setting` of a field. Raises TypeError if the field has none."""
    for item in field.metadata:
        if isinstance(item, Setting):
            return item
    raise TypeError(f"a setting without properties: annotate it with Setting(...): {field!r}")
