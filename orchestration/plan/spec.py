"""What a sweep file may hold: its keys, their types and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from orchestration.failures import Failure
from rrn_core.presets import PRESETS

Settings = dict[str, Any]
"""Values of TrainConfig fields by name."""


class _SpecModel(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(_SpecModel):
    """What one trial asks of Ray; `gpu` may be a fraction, which shares a GPU by book-keeping only."""

    cpu: Annotated[float, Field(gt=0)] = 1
    gpu: Annotated[float, Field(ge=0)] = 0


_Count = Annotated[int, Field(ge=0)]


class FinishedRetention(_SpecModel):
    """What `rrn-sweep gc` leaves of finished trials: the newest checkpoints of each, the best by `val/miou` of trial, partition, sweep."""

    last: _Count = 1
    best_per_trial: _Count = 0
    best_per_partition: _Count = 0
    best_per_sweep: _Count = 1


class Retention(_SpecModel):
    """Which checkpoints of a trial are kept: the newest `last` ones, and the one with the best `val/miou`."""

    last: Annotated[int, Field(ge=1)] = 2
    best: bool = True
    finished: FinishedRetention | None = None


class Retries(_SpecModel):
    """New starts of a trial within one run of the sweep, by the class of what ended it; the next run of the sweep starts counting anew."""

    lost: _Count = 10
    memory: _Count = 1
    diverged: _Count = 0
    code: _Count = 1
    data: _Count = 0
    unavailable: _Count = 3

    def of(self, failure: Failure) -> int:
        """The budget of one class."""
        return int(self.model_dump()[failure])


def _retries_of(given: Any) -> Any:
    """A mere number is the budget of all that may go better the next time."""
    if isinstance(given, bool) or not isinstance(given, int):
        return given
    if given < 0:
        raise PydanticCustomError("retries", "must be >= 0")
    return dict.fromkeys(("lost", "memory", "code", "unavailable"), given)


class Search(_SpecModel):
    """Adaptive search: `trials` proposals of an Optuna sampler, told `val/miou` at the last or the best epoch."""

    sampler: Literal["random", "tpe"] = "tpe"
    trials: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    at: Literal["last", "best"] = "last"


class Dimension(_SpecModel):
    """One searched setting: a range `low`..`high` (optionally `log`), or `choices`."""

    low: float | int | None = None
    high: float | int | None = None
    log: bool = False
    choices: list[str | int | float | bool] | None = None

    @property
    def first(self) -> str | int | float | bool | None:
        """Some value of the range."""
        return self.choices[0] if self.choices else self.low

    def holds(self, value: Any) -> bool:
        """Whether `value` lies in the range."""
        if self.choices is not None:
            return value in self.choices
        return isinstance(value, int | float) and (self.low or 0) <= value <= (self.high or 0)

    def __str__(self) -> str:
        if self.choices is not None:
            return f"one of {', '.join(map(str, self.choices))}"
        return f"{self.low} to {self.high}{', log' if self.log else ''}"


class PublishedRow(_SpecModel):
    """A published number, and which trials to compare with it: those whose settings are as `when` says."""

    when: Settings
    metric: Literal["val/miou", "val/miou_branch1", "val/miou_branch2", "val/miou_ensemble"] = "val/miou"
    value: Annotated[float, Field(ge=0, le=100)] | None
    """In percent; null where nothing was published, which still shows ours."""
    name: str | None = None
    """What the source calls the row."""


class Published(_SpecModel):
    """Numbers to compare the sweep with."""

    source: Annotated[str, Field(min_length=1)]
    """Where they stand, and what is known of how they were measured."""
    rows: list[PublishedRow]


class PictureRule(_SpecModel):
    """Which validation images a trial draws with its predictions, and how often; they change no result."""

    images: _Count = 4
    """So many, evenly spread over the validation list; 0 draws none."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Epochs from one drawing to the next; unset, about five drawings a trial. The last epoch is always drawn."""


class NotificationRule(_SpecModel):
    """Whom to tell of the end of a sweep, of a trial that failed for good, and of a circuit breaker that tripped."""

    webhook_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the address of a Slack-compatible webhook, which is a secret."""
    command: Annotated[str, Field(min_length=1)] | None = None
    """Shell command; it finds the facts in RRN_EVENT, RRN_TEXT and others, and the text on its standard input."""
    on: list[Literal["end", "failed", "breaker"]] = ["end", "failed", "breaker"]


class SweepSpec(_SpecModel):
    """A sweep as the user wrote it, checked: every value in `base`, `grid`, `points` and `space` fits TrainConfig."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    description: str = ""
    """What the sweep is for, in Markdown; MLflow shows it."""
    preset: str | None = None
    base: Settings = {}
    grid: dict[str, list[Any]] = {}
    points: list[Settings] = []
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    search: Search | None = None
    space: dict[str, Dimension] = {}
    published: Published | None = None
    pictures: PictureRule = PictureRule()
    notify: NotificationRule | None = None
    resources: Resources = Resources()
    retries: Annotated[Retries, BeforeValidator(_retries_of)] = Retries()
    retention: Retention = Retention()
    store: str | None = None
    tracking: str | None = None

    @property
    def settings(self) -> Settings:
        """Preset and base merged: what every trial starts from."""
        return {**PRESETS.get(self.preset or "", {}), **self.base}
