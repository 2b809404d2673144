"""What is known of a setting besides its type and default: said once, at its field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic.fields import FieldInfo

Group = Literal["run", "data", "networks", "objective", "optimisation", "evaluation"]
DataRole = Literal["set", "list", "partition", "scene", "view", "contents"]
"""
set        which data set
list       a file with names of images
partition  which of the training images are labelled
scene      how the scenes of `digits` are made
view       how much of an image a network sees at once
contents   what the files named by other settings hold; a sweep fills it in
"""
ActsFrom = Literal["start", "warm-up's end", "region loss", "evaluation"]
"""The first moment at which the value can change anything: `evaluation` never changes the weights."""

NO_NEUTRAL_VALUE: Final = object()


@dataclass(frozen=True)
class Setting:
    """Facts of one setting, attached to its field by `Annotated`. Every table of settings elsewhere is derived from them."""

    group: Group
    changes_cost: bool = True
    """Whether it changes the time of an iteration or of a validation image, or the memory of a trial."""
    data: DataRole | None = None
    """Its part in deciding which images are used and how."""
    acts_from: ActsFrom = "start"
    headline: bool = False
    """MLflow shows it as a parameter even at its default."""
    neutral: Any = NO_NEUTRAL_VALUE
    """The value that equals the behaviour before the setting existed: at it, the setting is left out of the identity."""


def setting_of(field: FieldInfo) -> Setting:
    """The facts of a field. Raises TypeError where it states none."""
    for fact in field.metadata:
        if isinstance(fact, Setting):
            return fact
    raise TypeError(f"a setting without facts: annotate it with Setting(...): {field!r}")
