"""The exit codes of every command, each with its meaning."""

from __future__ import annotations

OK = 0
FAILED = 1
BAD_INPUT = 2
RESUME_ME = 75  # EX_TEMPFAIL
INTERRUPTED = 130

MEANINGS = {
    OK: "success; after `run`, every trial is finished",
    FAILED: "some trial is not finished",
    BAD_INPUT: "bad input or refused: each line says what to change",
    RESUME_ME: "stopped by SIGTERM or SIGHUP, or Ray was lost: give the same command again",
    INTERRUPTED: "stopped by Ctrl-C",
}
