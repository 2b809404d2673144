"""YAML -> SweepSpec: the one place where untrusted text is read."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from orchestration.errors import SpecError
from orchestration.failures import Failure
from rrn_core.config import TrainConfig
from rrn_core.presets import PRESETS

Settings = dict[str, Any]
"""Values of TrainConfig fields by name."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


class Resources(_Part):
    """What one trial asks of Ray; `gpu` may be a fraction, which shares a GPU by book-keeping only."""

    cpu: Annotated[float, Field(gt=0)] = 1
    gpu: Annotated[float, Field(ge=0)] = 0


_Count = Annotated[int, Field(ge=0)]


class FinishedRetention(_Part):
    """What `rrn-sweep gc` leaves of finished trials: the newest checkpoints of each, the best by `val/miou` of trial, partition, sweep."""

    last: _Count = 1
    best_per_trial: _Count = 0
    best_per_partition: _Count = 0
    best_per_sweep: _Count = 1


class Retention(_Part):
    """Which checkpoints of a trial are kept: the newest `last` ones, and the one with the best `val/miou`."""

    last: Annotated[int, Field(ge=1)] = 2
    best: bool = True
    finished: FinishedRetention | None = None


class Retries(_Part):
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


class Search(_Part):
    """Adaptive search: `trials` proposals of an Optuna sampler, told `val/miou` at the last or the best epoch."""

    sampler: Literal["random", "tpe"] = "tpe"
    trials: Annotated[int, Field(ge=1)]
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    at: Literal["last", "best"] = "last"


class Dimension(_Part):
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


class PublishedRow(_Part):
    """A published number, and which trials to compare with it: those whose settings are as `when` says."""

    when: Settings
    metric: Literal["val/miou", "val/miou_branch1", "val/miou_branch2", "val/miou_ensemble"] = "val/miou"
    value: Annotated[float, Field(ge=0, le=100)] | None
    """In percent; null where nothing was published, which still shows ours."""
    name: str | None = None
    """What the source calls the row."""


class Published(_Part):
    """Numbers to compare the sweep with."""

    source: Annotated[str, Field(min_length=1)]
    """Where they stand, and what is known of how they were measured."""
    rows: list[PublishedRow]


class SweepSpec(_Part):
    """A sweep as the user wrote it, checked: every value in `base`, `grid`, `points` and `space` fits TrainConfig."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
    preset: str | None = None
    base: Settings = {}
    grid: dict[str, list[Any]] = {}
    points: list[Settings] = []
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] | None = None
    search: Search | None = None
    space: dict[str, Dimension] = {}
    published: Published | None = None
    resources: Resources = Resources()
    retries: Annotated[Retries, BeforeValidator(_retries_of)] = Retries()
    retention: Retention = Retention()
    store: str | None = None
    tracking: str | None = None

    @property
    def settings(self) -> Settings:
        """Preset and base merged: what every trial starts from."""
        return {**PRESETS.get(self.preset or "", {}), **self.base}


def load(path: Path, *, overrides: Iterable[str] = ()) -> SweepSpec:
    """Read and check a sweep file.

    Args:
        overrides: `key=value` texts; a TrainConfig field sets `base.<field>`, any other dotted key that key of the file.

    Raises:
        SpecError: with every fault of the file, one line each, as `file: dotted.path: what is wrong`.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError([f"{path}: not valid YAML: {_one_line(error)}"]) from error
    if not isinstance(document, dict):
        raise SpecError([f"{path}: must be a mapping with at least `name:`, got {_shown(document)}"])
    for override in overrides:
        _override(document, override)
    try:
        return check(document)
    except SpecError as error:
        raise SpecError([f"{path}: {fault}" for fault in error.faults]) from None


def check(document: Mapping[str, Any]) -> SweepSpec:
    """Check a parsed sweep file.

    Raises:
        SpecError: with every fault, one line each, as `dotted.path: what is wrong`.
    """
    faults: list[str] = []
    try:
        spec = SweepSpec.model_validate(dict(document))
        faults += _structure_faults(spec)
    except ValidationError as error:
        faults += _faults(error, SweepSpec)
        # what is sound so far is checked further, so that all faults are told at once
        unsound = {fault["loc"][0] for fault in error.errors()}
        spec = SweepSpec.model_validate({"name": "unsound"} | {key: value for key, value in document.items() if key not in unsound})
    faults += [*_base_faults(spec), *_grid_faults(spec), *_points_faults(spec), *_space_faults(spec), *_published_faults(spec)]
    if faults:
        raise SpecError(faults)
    return spec


def build_config(settings: Settings, *, path: str = "") -> TrainConfig:
    """Validate settings into a TrainConfig.

    Raises:
        SpecError: with every fault, its dotted path below `path`.
    """
    try:
        # JSON, because strict Python input would refuse a list for a tuple
        return TrainConfig.model_validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        raise SpecError(_faults(error, TrainConfig, path=path)) from None


def settings_of(overrides: Iterable[str]) -> Settings:
    """TrainConfig fields from `field=value` texts. Raises SpecError for anything else."""
    document: dict[str, Any] = {"base": {}}
    for override in overrides:
        _override(document, override)
    if others := [key for key in document if key != "base"]:
        raise SpecError([f"--set {others[0]}: unknown setting{suggestion(others[0], TrainConfig.model_fields)}"])
    return dict(document["base"])


def suggestion(word: object, choices: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest of `choices`, or nothing."""
    names = list(choices)
    close = [name for name in names if str(word).startswith(name)] or difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def _structure_faults(spec: SweepSpec) -> list[str]:
    faults = []
    if spec.seeds == []:
        faults.append("seeds: must not be empty")
    if spec.seeds is not None and "seed" in {*spec.grid, *spec.space, *(key for point in spec.points for key in point)}:
        faults.append("seeds: seed is also varied in grid, points or space; keep one of them")
    if spec.search and (spec.grid or spec.points or spec.seeds):
        faults.append("search: cannot be combined with grid, points or seeds; put what varies under space, and a seed under base")
    if spec.tracking and not re.fullmatch(r"sqlite:///.+|https?://[^/@\s]+(/[^@\s]*)?", spec.tracking):
        faults.append("tracking: must be sqlite:///PATH or http(s)://HOST (credentials belong in the environment)")
    varied = {*spec.grid, *spec.space}
    faults += [f"base.{key}: is varied in grid or space too; keep one of them" for key in spec.base if key in varied]
    if spec.search and not spec.space:
        faults.append("space: search needs at least one setting to vary")
    if spec.space and not spec.search:
        faults.append("search: space is given, so say {sampler: tpe, trials: N}")
    return faults


def _base_faults(spec: SweepSpec) -> list[str]:
    """Faults of each field of `base` by itself: what depends on several fields is checked for whole trials."""
    faults = []
    if spec.preset is not None and spec.preset not in PRESETS:
        faults.append(f"preset: must be one of {', '.join(PRESETS)}, got {_shown(spec.preset)}{suggestion(spec.preset, PRESETS)}")
    return faults + [fault for key, value in spec.base.items() for fault in _value_faults({}, key, value, f"base.{key}")]


def _grid_faults(spec: SweepSpec) -> list[str]:
    faults = []
    for key, values in spec.grid.items():
        if not values:
            faults.append(f"grid.{key}: must not be empty")
        for i, value in enumerate(values):
            faults += _value_faults(spec.settings, key, value, f"grid.{key}[{i}]")
            if any(_same(value, earlier) for earlier in values[:i]):
                faults.append(f"grid.{key}[{i}]: {_shown(value)} stands twice")
    return faults


def _points_faults(spec: SweepSpec) -> list[str]:
    faults = []
    for i, point in enumerate(spec.points):
        if not point:
            faults.append(f"points[{i}]: must set something")
        for key, value in point.items():
            faults += _value_faults(spec.settings, key, value, f"points[{i}].{key}")
    return faults


def _space_faults(spec: SweepSpec) -> list[str]:
    faults = []
    for key, dimension in spec.space.items():
        path = f"space.{key}"
        ends = [("low", dimension.low), ("high", dimension.high)]
        if dimension.choices is not None:
            ends = [(f"choices[{i}]", choice) for i, choice in enumerate(dimension.choices)]  # type: ignore[misc]
            if not dimension.choices or dimension.low is not None or dimension.high is not None or dimension.log:
                faults.append(f"{path}: give low and high (and log), or a list of choices that is not empty")
        elif dimension.low is None or dimension.high is None:
            faults.append(f"{path}: needs low and high, or choices")
            continue
        elif dimension.low >= dimension.high:
            faults.append(f"{path}: low must be < high, got {dimension.low} and {dimension.high}")
        if dimension.log and not (dimension.low or 0) > 0:
            faults.append(f"{path}.low: must be > 0 for log, got {dimension.low}")
        for name, value in ends:
            faults += _value_faults(spec.settings, key, value, f"{path}.{name}")
    return faults


def _published_faults(spec: SweepSpec) -> list[str]:
    if spec.published is None:
        return []
    faults = [] if spec.published.rows else ["published.rows: must not be empty"]
    for i, row in enumerate(spec.published.rows):
        path = f"published.rows[{i}].when"
        if not row.when:
            faults.append(f'{path}: must name a setting, such as {{partition: "1/8"}}')
        for key, value in row.when.items():
            faults += _value_faults(spec.settings, key, value, f"{path}.{key}")
    return faults


def _value_faults(settings: Settings, key: str, value: object, path: str) -> list[str]:
    """Faults of one setting, judged by its own field alone."""
    if key not in TrainConfig.model_fields:
        return [f"{path}: unknown setting{suggestion(key, TrainConfig.model_fields)}"]
    try:
        TrainConfig.model_validate_json(json.dumps({**settings, key: value}, default=str))
    except ValidationError as error:
        own = [e for e in error.errors() if e["loc"][:1] == (key,)]
        return _lines(own, TrainConfig, lambda loc: path + _dotted(loc[1:]))
    return []


def _faults(error: ValidationError, model: type[BaseModel], *, path: str = "") -> list[str]:
    return _lines(error.errors(), model, lambda loc: (path + _dotted(loc)).lstrip("."))


def _lines(errors: Iterable[Any], model: type[BaseModel], where: Any) -> list[str]:
    """One line an error; of a union's several complaints about one value only the first."""
    lines: dict[str, str] = {}
    for error in errors:
        loc = tuple(part for part in error["loc"] if not _is_union_tag(part))
        place = where(loc)
        lines.setdefault(place, f"{place}: {_what(error, model)}" if place else _what(error, model))
    return list(lines.values())


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and bool(re.match(r"(constrained-|literal\[|int$|float$|str$|bool$)", part))


def _dotted(loc: Iterable[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


_BOUNDS = {
    "less_than": ("must be < {:g}", "lt"),
    "less_than_equal": ("must be <= {:g}", "le"),
    "greater_than": ("must be > {:g}", "gt"),
    "greater_than_equal": ("must be >= {:g}", "ge"),
}
_TYPES = {
    "float_type": "must be a number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "finite_number": "must be a finite number",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _what(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Expected, got and what next, for one pydantic error."""
    kind, got = error["type"], error["input"]
    context = error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{suggestion(error['loc'][-1], _field_names(error['loc'], model))}"
    if kind == "missing":
        return "is required"
    if kind in _BOUNDS:
        text, bound = _BOUNDS[kind]
        return f"{text.format(context[bound])}, got {_shown(got)}"
    if kind in _TYPES:
        return f"{_TYPES[kind]}, got {_shown(got)}{_quoted_number(got)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be one of {', '.join(choices)}, got {_shown(got)}{suggestion(got, choices)}"
    if kind == "partition":
        return f"{error['msg']}, got {_shown(got)}{suggestion(str(got).replace('_', '/'), ('1/16', '1/8', '1/4', '1/2', 'full'))}"
    if kind in ("region_kernel", "feature_pool"):
        return str(error["msg"])
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {_shown(got)}"


def _field_names(loc: tuple[str | int, ...], model: type[BaseModel]) -> list[str]:
    """Names allowed where the last part of `loc` stands."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = [t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if _is_model(t)] if field else []
        if inner:
            model = inner[0]
    return list(model.model_fields)


def _is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _quoted_number(got: object) -> str:
    if isinstance(got, str) and re.fullmatch(r"[-+.\deE]+", got):
        return "; remove the quotes"
    return ""


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _same(a: object, b: object) -> bool:
    """1 and 1.0 make the same trial, 1 and true do not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).replace('in "<unicode string>", ', "at ")


def _override(document: Settings, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError([f"--set {text}: must be key=value"])
    path = ["base", key] if key in TrainConfig.model_fields else key.split(".")
    place = document
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise SpecError([f"--set {text}: {part} is not a mapping in the file"])
    try:
        place[path[-1]] = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpecError([f"--set {text}: not valid YAML: {_one_line(error)}"]) from error


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, and no duplicate keys.

    PyYAML follows YAML 1.1, which reads `1_8` as 18, `1e-3` as a text, `no` as false and `1:30` as 90.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} must be a text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{key}" stands twice', key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))
