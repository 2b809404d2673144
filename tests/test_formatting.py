"""formatting.py: how values are written."""

from __future__ import annotations

import re
from datetime import UTC

import pytest

from orchestration.formatting import UNKNOWN_TIME, instant, shown


def test_a_time_that_no_clock_can_show_is_unknown():
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", instant(1_800_000_000_000))
    assert [instant(ms) for ms in (10**17, -(10**17), 10**30)] == [UNKNOWN_TIME] * 3
    assert instant(1_800_000_000_000, UTC) == "2027-01-15 08:00:00 UTC"


@pytest.mark.parametrize(("value", "text"), [(None, "none"), ((1, 0.5, True), "[1, 0.5, true]"), ([None, "a"], "[none, a]")])
def test_no_value_is_written_as_in_python(value: object, text: str) -> None:
    assert shown(value) == text
