"""How labels, values, tables, sizes and times are written."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, tzinfo

_INVISIBLE = r"\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
"""Control characters above the ASCII ones, those that change the direction of writing, and those that show nothing."""
_CONTROL = re.compile(f"[\\x00-\\x1f{_INVISIBLE}]")
_CONTROL_IN_TEXT = re.compile(f"[\\x00-\\x08\\x0b-\\x1f{_INVISIBLE}]")  # which may have tabs and line breaks

UNKNOWN_TIME = "an unknown time    "
"""As long as a time."""


def one_line(text: object) -> str:
    """A text from elsewhere, with its control characters and line breaks as escapes: `a\\nb`, `\\x1b[31m`."""
    return _CONTROL.sub(_escaped, str(text))


def printable(text: str) -> str:
    """As `one_line`, but line breaks and tabs stay."""
    return _CONTROL_IN_TEXT.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def label(settings: Mapping[str, object]) -> str:
    """`1/8 eps=0.6 seed 1`; a partition comes first and without its name, a seed last."""
    names = sorted(settings, key=lambda name: {"partition": 0, "seed": 2}.get(name, 1))
    spelt = {"partition": "{}", "seed": "seed {}"}
    return " ".join(spelt.get(name, f"{name}={{}}").format(shown(settings[name])) for name in names) or "base"


def shown(value: object) -> str:
    """A setting as a person writes it: `none`, `[1, 2]`, never as Python does."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)


def table(rows: Iterable[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart, a line for each row."""
    lines = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def counted(count: int, what: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def bytes_shown(count: float) -> str:
    """`0.5 kB`, `683 MB`, `11.8 GB`."""
    scale, unit = next(((scale, unit) for scale, unit in ((1e9, "GB"), (1e6, "MB")) if count >= scale), (1e3, "kB"))
    return f"{count / scale:.{int(count < 10 * scale or scale == 1e9)}f} {unit}"


def instant(ms: int, zone: tzinfo | None = None) -> str:
    """A stored time: `2026-11-26 04:10:33` in the local time zone, `2026-11-26 04:10:33 UTC` with a zone."""
    try:
        return datetime.fromtimestamp(ms / 1000, zone).strftime("%Y-%m-%d %H:%M:%S" + (" %Z" if zone else ""))
    except (ValueError, OverflowError, OSError):  # a node's clock may be wrong by any amount
        return UNKNOWN_TIME if zone is None else UNKNOWN_TIME.strip()


def clock(seconds: float) -> str:
    """`0:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def duration(seconds: float) -> str:
    """`1:02:03`, `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
