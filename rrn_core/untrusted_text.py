"""Text from files that others have written, safe to print on one line."""

from __future__ import annotations

import json

from pydantic import ValidationError
from pydantic_core import ErrorDetails


def first_sentence(error: Exception) -> str:
    """The first sentence of a library's error, on one line of at most 160 characters; the name of its class if it has no text."""
    return printable(" ".join(str(error).split()).partition(". ")[0], longest=160) or type(error).__name__


def printable(text: str, *, longest: int = 80) -> str:
    """A text from an untrusted file, safe to print on one line: at most `longest` characters, without control characters."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text[: longest + 1])
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."


def faults_of(error: ValidationError, *, most: int = 3) -> str:
    """The first faults of settings or metadata on one line. A fault between several fields has no place."""
    faults = error.errors(include_context=False)
    texts = [": ".join(filter(None, (".".join(map(str, fault["loc"])), _message(fault)))) for fault in faults[:most]]
    return "; ".join(printable(text, longest=120) for text in texts)


def _message(fault: ErrorDetails) -> str:
    said = fault["msg"].removeprefix("Value error, ")
    if not fault["loc"] or fault["type"] == "missing":
        return said
    return f"{said}, got {json.dumps(fault['input'], default=str, ensure_ascii=False)}"
