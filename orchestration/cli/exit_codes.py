"""What the exit code of a command means."""

OK = 0
"""Done; after `run`: every trial is finished."""
FAILED = 1
"""Some trial is not finished."""
BAD_INPUT = 2
"""Refused: something that the user can fix, printed in one line each."""
RESUME_ME = 75
"""Stopped by SIGTERM: give the same command again (EX_TEMPFAIL)."""
INTERRUPTED = 130
"""Stopped by Ctrl-C."""
