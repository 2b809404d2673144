"""The keys of a sweep file, their types and defaults."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from orchestration.failures import Failure
from rrn_core.presets import PRESETS

Settings = dict[str, Any]
"""Values of settings by name."""


class _SpecModel(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


def _one_gpu(gpu: float) -> float:
    if gpu > 1:
        raise PydanticCustomError("gpu", "must be <= 1 (a trial uses one GPU or a share of it; more GPUs train more trials at once)")
    return gpu


def _memory_of(given: Any) -> Any:
    number = isinstance(given, int | float) and not isinstance(given, bool)
    if given not in (None, "auto") and not (number and 0 < given < 2**20):
        raise PydanticCustomError("memory", "must be auto, or GiB of main memory > 0")
    return given


class Resources(_SpecModel):
    """What one trial asks of Ray."""

    cpu: Annotated[float, Field(gt=0)] = 1
    """CPU cores; also the number of threads of a trial."""
    gpu: Annotated[float, Field(ge=0), AfterValidator(_one_gpu)] = 0
    """GPUs, at most 1. A fraction lets several trials share one GPU; memory is not divided."""
    memory: Annotated[Literal["auto"] | float | None, BeforeValidator(_memory_of)] = None
    """Main memory in GiB. Ray reserves it, so that no more trials start than fit. `auto`: the measured peak of a trial and a tenth. Unset,
    nothing is reserved, and Ray may kill trials when memory runs out."""


_Count = Annotated[int, Field(ge=0)]


class FinishedRetention(_SpecModel):
    """What `rrn-sweep gc` keeps of finished trials. The best are those with the highest `val/miou`."""

    last: _Count = 1
    """Newest checkpoints of each trial."""
    best_per_trial: _Count = 0
    """Best checkpoints of each trial."""
    best_per_partition: _Count = 0
    """Best checkpoints of each partition."""
    best_per_sweep: _Count = 1
    """Best checkpoints of the whole sweep."""


class Retention(_SpecModel):
    """Which checkpoints a trial keeps."""

    last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints."""
    best: bool = True
    """Also the one with the highest `val/miou`."""
    finished: FinishedRetention | None = None
    """What `rrn-sweep gc` keeps of finished trials; unset, it removes none of their checkpoints."""


class Retries(_SpecModel):
    """Restarts of a trial within one run of the sweep, by the class of failure. The next run counts from 0."""

    lost: _Count = 10
    """The worker or its node died, or was stopped by SIGTERM."""
    memory: _Count = 1
    """Out of memory, on the GPU or the host."""
    diverged: _Count = 0
    """A loss is no longer finite."""
    code: _Count = 1
    """Any other exception."""
    data: _Count = 0
    """Images, labels, lists, weights or settings cannot be used."""
    unavailable: _Count = 3
    """The store did not answer, or its disk was full or failing, for longer than an hour; or it refused a request."""

    def of(self, failure: Failure) -> int:
        """The budget of one class."""
        return int(self.model_dump()[failure])


def _retries_of(given: Any) -> Any:
    """A plain number is the budget of every class that another attempt may cure."""
    if isinstance(given, bool) or not isinstance(given, int):
        return given
    if given < 0:
        raise PydanticCustomError("retries", "must be >= 0")
    return dict.fromkeys(("lost", "memory", "code", "unavailable"), given)


class Search(_SpecModel):
    """An adaptive search by an Optuna sampler, instead of `grid`, `points` and `seeds`."""

    sampler: Literal["random", "tpe"] = "tpe"
    """How trials are proposed."""
    trials: Annotated[int, Field(ge=1)]
    """Number of trials."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of the sampler."""
    at: Literal["last", "best"] = "last"
    """The epoch whose `val/miou` is maximised."""


class Dimension(_SpecModel):
    """One searched setting: a range, or choices."""

    low: float | int | None = None
    """Lower end of the range."""
    high: float | int | None = None
    """Upper end of the range."""
    log: bool = False
    """Sample the range on a logarithmic scale."""
    choices: list[str | int | float | bool] | None = None
    """Values to choose from, instead of a range."""

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
    """A published number, and the trials to compare with it."""

    when: Settings
    """Settings that these trials have."""
    metric: Literal["val/miou", "val/miou_branch1", "val/miou_branch2", "val/miou_ensemble"] = "val/miou"
    """Our metric to compare."""
    value: Annotated[float, Field(ge=0, le=100)] | None
    """The published number in percent; null where none was published, which still shows ours."""
    name: str | None = None
    """The source's name of the row."""


class Published(_SpecModel):
    """Published numbers, shown beside ours."""

    source: Annotated[str, Field(min_length=1)]
    """Where the numbers stand, and how they were measured as far as known."""
    rows: list[PublishedRow]
    """The numbers."""


class PictureRule(_SpecModel):
    """Pictures of predictions on validation images; they change no result."""

    images: _Count = 4
    """Number of images, evenly spread over the validation list; 0 draws none."""
    every: Annotated[int, Field(ge=1)] | None = None
    """Epochs from one picture to the next; unset, about five pictures a trial. The last epoch is always drawn."""


class NotificationRule(_SpecModel):
    """Who is notified, and of what."""

    webhook_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] | None = None
    """Environment variable that holds the address of a Slack-compatible webhook. The address is a secret."""
    command: Annotated[str, Field(min_length=1)] | None = None
    """Shell command. It gets the facts in RRN_EVENT, RRN_TEXT and others, and the text on standard input."""
    on: list[Literal["end", "failed", "breaker"]] = ["end", "failed", "breaker"]
    """The sweep ended, a trial failed, the circuit breaker stopped the sweep."""


class SweepSpec(_SpecModel):
    """A sweep file is a YAML 1.2 mapping with these keys. `grid`, `points` and `seeds` list the trials; `search` and `space` propose
    them instead. Every key can be changed on the command line: `--set retries.lost=3`, and a setting by its name: `--set epochs=2`.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    """Name of the sweep, of its MLflow experiment and of its folder in the store."""
    description: str = ""
    """What the sweep is for, in Markdown; MLflow shows it."""
    preset: str | None = None
    """Named settings that every trial starts from."""
    base: Settings = {}
    """Settings of every trial, over those of the preset."""
    grid: dict[str, list[Any]] = {}
    """Lists of values by setting; every combination is a trial."""
    points: list[Settings] = []
    """Single combinations, beside those of the grid."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    """Seeds; every combination is trained with each."""
    search: Search | None = None
    """Adaptive search."""
    space: dict[str, Dimension] = {}
    """Searched settings."""
    published: Published | None = None
    """Published numbers to compare with."""
    pictures: PictureRule = PictureRule()
    """Pictures of predictions."""
    notify: NotificationRule | None = None
    """Notifications."""
    resources: Resources = Resources()
    """What one trial asks of Ray."""
    retries: Annotated[Retries, BeforeValidator(_retries_of)] = Retries()
    """Restarts of a trial by class of failure; a plain number is the budget of lost, memory, code and unavailable."""
    retention: Retention = Retention()
    """Which checkpoints are kept."""
    store: str | None = None
    """`s3://bucket/prefix` or a folder (default: RRN_STORE, else runs/store)."""
    tracking: str | None = None
    """MLflow: `sqlite:///PATH` or `http(s)://HOST` (default: MLFLOW_TRACKING_URI, else sqlite:///runs/mlflow.db)."""

    @property
    def settings(self) -> Settings:
        """Preset and base merged: what every trial starts from."""
        return {**PRESETS.get(self.preset or "", {}), **self.base}
