"""Pydantic's errors as lines for a user: where, what was expected, what was found, what was meant."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from rrn_core.methods import all_settings


def suggestion(word: object, choices: Iterable[str]) -> str:
    """`; did you mean "x"?` for the closest of `choices`, or nothing."""
    names = list(choices)
    close = [name for name in names if str(word).startswith(name)] or difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def faults_of(error: ValidationError, model: type[BaseModel], *, path: str = "") -> list[str]:
    """One line a fault, its dotted place below `path`."""
    return lines(error.errors(), model, lambda loc: (path + dotted(loc)).lstrip("."))


def lines(errors: Iterable[Any], model: type[BaseModel], where: Callable[[tuple[Any, ...]], str]) -> list[str]:
    """One line an error; of several errors of a union about one value only the first."""
    lines: dict[str, str] = {}
    for error in errors:
        loc = tuple(part for part in error["loc"] if not _is_union_tag(part))
        place = where(loc)
        lines.setdefault(place, f"{place}: {_what(error, model)}" if place else _what(error, model))
    return list(lines.values())


def dotted(loc: Iterable[str | int]) -> str:
    """`.grid.eps[2]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)


def quoted(value: object) -> str:
    """A value as it stands in the file, cut where it is long."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_union_tag(part: str | int) -> bool:
    return isinstance(part, str) and bool(re.match(r"(constrained-|literal\[|int$|float$|str$|bool$)", part))


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
        return _unknown_key(error["loc"], model)
    if kind == "missing":
        return "is required"
    if kind in _BOUNDS:
        text, bound = _BOUNDS[kind]
        return f"{text.format(context[bound])}, got {quoted(got)}"
    if kind in _TYPES:
        return f"{_TYPES[kind]}, got {quoted(got)}{_quoted_number(got)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"must be one of {', '.join(choices)}, got {quoted(got)}{suggestion(got, choices)}"
    if kind == "partition":
        return f"{error['msg']}, got {quoted(got)}{suggestion(str(got).replace('_', '/'), ('1/16', '1/8', '1/4', '1/2', 'full'))}"
    if not error["loc"]:  # of several keys together: the message names them
        return f"{error['msg'][:1].lower()}{error['msg'][1:]}"
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {quoted(got)}"


def _unknown_key(loc: tuple[str | int, ...], model: type[BaseModel]) -> str:
    """Of a setting, a key of another level, or a misspelt one: what was meant."""
    name, names = str(loc[-1]), _field_names(loc, model)
    if len(loc) > 1 or "base" not in names:
        return f"unknown key{suggestion(name, names)}"
    if name in all_settings():
        return "is a setting: put it under base:"
    inner = {inner: f"{field}.{inner}" for field in names for inner in _field_names((field, ""), model) if inner not in names}
    if name in inner:
        return f'unknown key; did you mean "{inner[name]}"?'
    near = suggestion(name, names)
    return f"unknown key{near}" if near else f"unknown key{suggestion(name, all_settings())}"


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
