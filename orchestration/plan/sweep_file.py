"""YAML -> SweepSpec: the one place where untrusted text is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from orchestration.errors import SpecError
from orchestration.plan.spec import Settings, SweepSpec
from orchestration.plan.tracking_address import path_fault
from orchestration.plan.validation_text import dotted, faults_of, lines, quoted, suggestion
from rrn_core.config import TrainConfig
from rrn_core.methods import DEFAULT, METHODS, all_settings, methods_with, settings_class
from rrn_core.presets import PRESETS
from rrn_core.yaml12 import YamlError, parse

MOST_TRIALS = 10_000
"""Trials of a sweep."""


def load(path: Path, *, overrides: Iterable[str] = ()) -> SweepSpec:
    """Read and check a sweep file.

    Args:
        overrides: `key=value` texts; a setting sets `base.<setting>`, any other dotted key that key of the file.

    Raises:
        SpecError: with every fault of the file, one line each, as `file: dotted.path: what is wrong`.
    """
    try:
        document = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise SpecError([f"{path}: not valid YAML: {error}"]) from error
    except YamlError as error:
        raise SpecError([f"{path}: {error}"]) from error
    if not isinstance(document, dict):
        raise SpecError([f"{path}: must be a mapping with at least `name:`, got {quoted(document)}"])
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
        faults += faults_of(error, SweepSpec)
        # the keys without a fault are checked further, so that all faults are reported at once
        faulty = {fault["loc"][0] for fault in error.errors()}
        spec = SweepSpec.model_validate({"name": "faulty"} | {key: value for key, value in document.items() if key not in faulty})
        faults += [fault for fault in _structure_faults(spec) if re.split(r"[.:]", fault)[0] not in faulty]
    if too_many := _too_many(spec):
        raise SpecError([*faults, too_many])  # before anything is done for each of them
    faults += [*_base_faults(spec), *_grid_faults(spec), *_points_faults(spec), *_space_faults(spec), *_published_faults(spec)]
    faults += _unread_faults(spec)
    if faults:
        raise SpecError(faults)
    return spec


def build_config(settings: Settings, *, path: str = "") -> TrainConfig:
    """Validate settings into the configuration of their method; settings that only other methods have are left out.

    Raises:
        SpecError: with every fault, its dotted path below `path`.
    """
    method = settings.get("method", DEFAULT)
    faults = [f"{path}.{name}".lstrip(".") + f": {_unknown(name)}" for name in settings if name not in all_settings()]
    faults += _value_faults("method", method, f"{path}.method".lstrip("."))
    if faults:
        raise SpecError(faults)
    kind = settings_class(method)
    read = {name: value for name, value in settings.items() if name in kind.model_fields}
    try:
        return kind.of(read)
    except ValidationError as error:
        raise SpecError(faults_of(error, kind, path=path)) from None


def settings_of(overrides: Iterable[str]) -> Settings:
    """Settings from `name=value` texts. Raises SpecError for anything else."""
    document: dict[str, Any] = {"base": {}}
    for override in overrides:
        _override(document, override)
    if others := [key for key in document if key != "base"]:
        raise SpecError([f"--set {others[0]}: {_unknown(others[0])}"])
    return dict(document["base"])


def _too_many(spec: SweepSpec) -> str | None:
    """The fault of a sweep with more trials than can be planned."""
    grid = math.prod(map(len, spec.grid.values())) if spec.grid or not spec.points else 0
    count, proposed = (grid + len(spec.points)) * max(1, len(spec.seeds or [])), spec.search.trials if spec.search else 0
    if count > MOST_TRIALS:
        return f"grid, points and seeds: must make <= {MOST_TRIALS:,} trials, got {count:,}"
    if proposed > MOST_TRIALS:
        return f"search.trials: must be <= {MOST_TRIALS:,}, got {proposed:,}"
    choices = sum(len(dimension.choices or []) for dimension in spec.space.values())
    return f"space: must have <= {MOST_TRIALS:,} choices, got {choices:,}" if choices > MOST_TRIALS else None


def _structure_faults(spec: SweepSpec) -> list[str]:
    faults = []
    if spec.seeds == []:
        faults.append("seeds: must not be empty")
    if spec.seeds is not None and "seed" in {*spec.grid, *spec.space, *(key for point in spec.points for key in point)}:
        faults.append("seeds: seed is also varied in grid, points or space; keep one of them")
    if spec.seeds is not None and "seed" in spec.base:
        faults.append("seeds: seed is also set in base; keep one of them")
    if spec.search and (spec.grid or spec.points or spec.seeds):
        faults.append("search: cannot be combined with grid, points or seeds; put what varies under space, and a seed under base")
    if spec.tracking and not re.fullmatch(r"sqlite:///.+|https?://[^/@\s]+(/[^@\s]*)?", spec.tracking):
        faults.append("tracking: must be sqlite:///PATH or http(s)://HOST (credentials belong in the environment)")
    elif spec.tracking and (fault := path_fault(spec.tracking)):
        faults.append(f"tracking: {fault}")
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
        faults.append(f"preset: must be one of {', '.join(PRESETS)}, got {quoted(spec.preset)}{suggestion(spec.preset, PRESETS)}")
    return faults + [fault for key, value in spec.base.items() for fault in _value_faults(key, value, f"base.{key}")]


def _grid_faults(spec: SweepSpec) -> list[str]:
    faults = []
    for key, values in spec.grid.items():
        if not values:
            faults.append(f"grid.{key}: must not be empty")
        for i, value in enumerate(values):
            faults += _value_faults(key, value, f"grid.{key}[{i}]")
            if any(_same(value, earlier) for earlier in values[:i]):
                faults.append(f"grid.{key}[{i}]: {quoted(value)} is given twice")
    return faults


def _points_faults(spec: SweepSpec) -> list[str]:
    faults = []
    for i, point in enumerate(spec.points):
        if not point:
            faults.append(f"points[{i}]: must set something")
        for key, value in point.items():
            faults += _value_faults(key, value, f"points[{i}].{key}")
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
            faults += _value_faults(key, value, f"{path}.{name}")
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
            faults += _value_faults(key, value, f"{path}.{key}")
    return faults


def _unread_faults(spec: SweepSpec) -> list[str]:
    """Settings that no method of the sweep has. One that only some of them have makes fewer trials of the others (`expand`)."""
    methods = _methods_of(spec)
    named = [("base", spec.base), ("grid", spec.grid), ("space", spec.space), *((f"points[{i}]", p) for i, p in enumerate(spec.points))]
    faults = [fault for place, settings in named for fault in _unread(place, settings, methods)]
    for i, row in enumerate(spec.published.rows if spec.published else []):
        own = {row.when["method"]} & {*METHODS} if isinstance(row.when.get("method"), str) else methods
        faults += _unread(f"published.rows[{i}].when", row.when, own)
    return faults


def _unread(place: str, settings: Iterable[str], methods: set[str]) -> list[str]:
    """The settings that none of the methods has, each a fault."""
    read = {name for method in methods for name in settings_class(method).model_fields}
    return [
        f"{place}.{key}: method {', '.join(sorted(methods))} has no such setting; {', '.join(methods_with(key))} {_have(methods_with(key))}"
        for key in settings
        if methods and key in all_settings() and key not in read
    ]


def _have(methods: Sequence[str]) -> str:
    return "has it" if len(methods) == 1 else "have it"


def _methods_of(spec: SweepSpec) -> set[str]:
    """The methods that the sweep's trials have, as far as they are valid."""
    fixed = spec.settings.get("method", DEFAULT)
    varied = [*spec.grid.get("method", []), *((spec.space["method"].choices or []) if "method" in spec.space else [])]
    if not varied and (spec.grid or not spec.points):
        varied = [fixed]
    varied += [point.get("method", fixed) for point in spec.points]
    return {method for method in varied if method in METHODS}


def _value_faults(key: str, value: object, path: str) -> list[str]:
    """Faults of one setting, judged by its own field alone."""
    if key not in all_settings():
        return [f"{path}: {_unknown(key)}"]
    if key == "method":
        choices = f"must be one of {', '.join(METHODS)}, got {quoted(value)}{suggestion(value, METHODS)}"
        return [] if value in METHODS else [f"{path}: {choices}"]
    kind = next((settings_class(method) for method in methods_with(key)), TrainConfig)
    try:
        kind.of({key: value})
    except ValidationError as error:
        own = [e for e in error.errors() if e["loc"][:1] == (key,)]
        return lines(own, kind, lambda loc: path + dotted(loc[1:]))
    return []


def _unknown(name: str) -> str:
    return f"unknown setting{suggestion(name, all_settings())}"


def _same(a: object, b: object) -> bool:
    """1 and 1.0 make the same trial, 1 and true do not."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _override(document: Settings, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SpecError([f"--set {text}: must be key=value"])
    path = ["base", key] if key in all_settings() else key.split(".")
    place = document
    for part in path[:-1]:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise SpecError([f"--set {text}: {part} is not a mapping in the file"])
    try:
        place[path[-1]] = parse(value)
    except YamlError as error:
        raise SpecError([f"--set {text}: {error}"]) from error
