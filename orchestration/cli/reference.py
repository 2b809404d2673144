"""The reference of settings, sweep file and commands, from the code's own docstrings: `rrn-sweep settings`, and pages of docs/."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestration.cli.arguments import parser
from orchestration.cli.exit_codes import MEANINGS, OK
from orchestration.errors import SweepError
from orchestration.formatting import table
from orchestration.plan.spec import SweepSpec
from orchestration.plan.validation_text import suggestion
from rrn_core.methods import METHODS, all_settings, methods_with, settings_class
from rrn_core.presets import PRESETS
from rrn_core.setting import NO_NEUTRAL_VALUE, Group, setting_of

GROUPS: tuple[Group, ...] = get_args(Group)
_GENERATED = "Generated from the code by `make golden`; do not edit."


def print_settings(arguments: argparse.Namespace) -> int:
    """All settings in short, those of one method, or one setting in full."""
    name = arguments.name
    if name is None or name in METHODS:
        print(settings_text(settings_class(name).model_fields if name else all_settings()))
    elif name in all_settings():
        print("\n".join(_setting_lines(name, all_settings()[name])))
    else:
        raise SweepError(f"{name}: neither a setting nor a method{suggestion(name, [*all_settings(), *METHODS])}")
    return OK


def print_completion(arguments: argparse.Namespace) -> int:
    """A script for the shell; `eval "$(rrn-sweep completion bash)"` loads it."""
    import shtab

    print(shtab.complete(parser(), shell=arguments.shell))
    return OK


def settings_text(fields: Mapping[str, FieldInfo]) -> str:
    """A line for each setting, by group: name, default, allowed values."""
    rows = []
    for group in GROUPS:
        members = {name: field for name, field in fields.items() if setting_of(field).group == group}
        rows += [[group if i == 0 else "", name, _default(field), allowed(name)] for i, (name, field) in enumerate(members.items())]
    return table([["group", "setting", "default", "values"], *rows])


def settings_page() -> str:
    """docs/settings.md."""
    lines = ["# Settings", "", _GENERATED, "", "A setting is given under `base:`, `grid:`, `points:` or `space:` of a sweep file, or in"]
    lines += ["`--set name=value`. A method has the settings of every method, and its own.", ""]
    for group in GROUPS:
        lines += [f"## {group.capitalize()}", ""]
        for name, field in all_settings().items():
            if setting_of(field).group == group:
                lines += [f"### `{name}`", "", *_setting_lines(name, field)[2:], ""]
    lines += ["## Presets", "", *(f"- `{name}`: {_preset(settings)}" for name, settings in PRESETS.items()), ""]
    return "\n".join(lines)


def sweep_file_page() -> str:
    """docs/sweep-file.md."""
    lines = ["# Sweep file", "", _GENERATED, "", *_paragraph(inspect.getdoc(SweepSpec) or ""), ""]
    return "\n".join([*lines, *_model_lines(SweepSpec, ""), ""])


def commands_page() -> str:
    """docs/commands.md."""
    made = parser()
    lines = ["# Commands", "", _GENERATED, "", str(made.description), ""]
    for name, command, summary in _commands(made):
        operands, colon, text = summary.partition(": ")
        usage, text = (f"{name} {operands}", text) if colon else (name, summary)
        lines += [f"## `rrn-sweep {usage}`", "", f"{text[:1].upper()}{text[1:]}.", "", *_arguments(command), ""]
    codes = [f"| {code} | {meaning} |" for code, meaning in MEANINGS.items()]
    return "\n".join([*lines, "## Exit codes", "", "| code | meaning |", "|---|---|", *codes, ""])


PAGES = {"settings.md": settings_page, "sweep-file.md": sweep_file_page, "commands.md": commands_page}
"""What `make golden` writes into docs/."""


def allowed(name: str) -> str:
    """The values that a setting takes, in words."""
    if name == "method":
        return ", ".join(METHODS)
    schema = settings_class(methods_with(name)[0]).model_json_schema()
    return _values(schema["properties"][name], schema.get("$defs", {}))


def _setting_lines(name: str, field: FieldInfo) -> list[str]:
    facts, methods = setting_of(field), methods_with(name)
    whose = "every method" if methods == METHODS else f"method {', '.join(methods)}"
    lines = [f"{name}: {allowed(name)}; default {_default(field)}; {whose}"]
    lines += ["", *_paragraph(field.description or ""), ""]
    known = [f"Values: {allowed(name)}.", f"Default: {_default(field)}.", f"Read by {whose}.", f"Acts from: {facts.acts_from}."]
    known += ["Changes the cost of a trial."] if facts.changes_cost else []
    known += [f"Neutral value: {facts.neutral}."] if facts.neutral is not NO_NEUTRAL_VALUE else []
    return [*lines, *_paragraph(" ".join(known))]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else json.dumps(value, default=str).strip('"') or "empty"


_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}", "maximum": "<= {}"}
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "array": "list", "object": "mapping"}


def _values(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A JSON schema in words: `number > 0`, `plain, ohem`, `none or text`."""
    if "$ref" in schema:
        return "mapping" if "enum" not in (found := definitions[schema["$ref"].rpartition("/")[2]]) else ", ".join(found["enum"])
    if "anyOf" in schema:
        parts = [_values(part, definitions) for part in schema["anyOf"]]
        return " or ".join(dict.fromkeys(sorted(parts, key=lambda part: part == "none")))
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "null":
        return "none"
    if schema.get("type") == "array":
        inner = schema.get("items") or (schema.get("prefixItems") or [{}])[0]
        return f"list of {_values(inner, definitions)}" if inner else "list"
    kind = _TYPES.get(str(schema.get("type")), "any value")
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return f"{kind} {' and '.join(bounds)}".rstrip()


def _preset(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}: {json.dumps(value)}`" for name, value in settings.items()) or "the defaults"


def _model_lines(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A list item for each key of a part of the sweep file, those of inner parts below it."""
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        values = _values(schema["properties"][name], schema.get("$defs", {}))
        required = "required" if field.is_required() else f"default {_default(field)}" if not _inner(field) else "optional"
        description = " ".join((field.description or "").split())
        yield f"- `{prefix}{name}` ({values}; {required}): {description}".rstrip(": ")
        for inner in _inner(field):
            yield from _model_lines(inner, f"{prefix}{name}.{'SETTING.' if name == 'space' else ''}")


def _inner(field: FieldInfo) -> list[type[BaseModel]]:
    kinds = [field.annotation, *get_args(field.annotation)]
    kinds += [inner for kind in kinds for inner in get_args(kind)]
    return [kind for kind in dict.fromkeys(kinds) if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _commands(made: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser, str]]:
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for name, command in action.choices.items():
                yield name, command, helps.get(name, "")


def _arguments(command: argparse.ArgumentParser) -> Iterator[str]:
    """A table row for each argument and option."""
    rows = [(_spelling(action), " ".join((action.help or "").split())) for action in command._actions if action.dest != "help"]
    rows = [row for row in rows if row[0]]
    if rows:
        yield from ["| argument | meaning |", "|---|---|", *(f"| `{name}` | {text.replace('|', '/')} |" for name, text in rows)]


def _spelling(action: argparse.Action) -> str:
    if isinstance(action, argparse._SubParsersAction):
        return ""
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    value = "" if action.nargs == 0 else choices or action.metavar or action.dest.upper()
    return f"{', '.join(action.option_strings)} {value}".strip() if action.option_strings else str(value)


def _paragraph(text: str) -> Iterable[str]:
    return textwrap.wrap(" ".join(text.split()), width=110, break_on_hyphens=False)
