"""What is read from the store: types with bounds, because a stored object may be damaged, or of a later release."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, le=2**53)]
"""A whole number that JSON and databases can hold."""
Token = Annotated[int, Field(ge=0)]
"""A driver's token. It has no bound, because the next one is always higher."""
Milliseconds = Annotated[int, Field(ge=-(2**53), le=2**53)]
"""A time since 1970, by the clock of some machine, which may be wrong by any amount."""
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Value = Annotated[float, Field(ge=-1e100, le=1e100)]
"""A metric. Sums and squares of such values are finite."""


class StoredModel(BaseModel):
    """What is read from the store: it may be damaged, or hold fields of a later release."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)
