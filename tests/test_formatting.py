"""formatting.py: how values are written."""

from __future__ import annotations

import re
from datetime import UTC

from orchestration.formatting import UNKNOWN_TIME, instant


def test_a_time_that_no_clock_can_show_is_unknown():
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", instant(1_800_000_000_000))
    assert [instant(ms) for ms in (10**17, -(10**17), 10**30)] == [UNKNOWN_TIME] * 3
    assert instant(1_800_000_000_000, UTC) == "2027-01-15 08:00:00 UTC"
