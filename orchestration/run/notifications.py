"""Tells a webhook and a shell command of a sweep, in a thread of its own that can neither fail nor delay the sweep."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from orchestration.observe.events import Event
from orchestration.plan.spec import NotificationRule
from orchestration.run import notification_text as notices
from orchestration.run.notification_text import Notification
from orchestration.sweep import Sweep

log = logging.getLogger(__name__)

TRIES = 3
"""Of a webhook that is away or busy."""
TRY_WITHIN_S = 10.0
PAUSE_S = 2.0
COMMAND_WITHIN_S = 60.0
WAITING = 1000
"""So many notices wait for a slow listener; what comes then is dropped."""


class _NotDelivered(Exception):  # noqa: N818
    """A notice did not get through; the text holds no secret."""


class Notifier:
    """Sends notices one after the other. No method raises, and none but `close` waits.

    Args:
        rule: whom to tell of what; None: nobody.
        finished: trials that had finished before.
        environment: holds the webhook's address, which is a secret, and is the command's own.
    """

    def __init__(self, rule: NotificationRule | None, sweep: str, *, total: int, finished: int = 0, environment: Mapping[str, str]) -> None:
        self._rule, self._sweep, self._total, self._finished = rule or NotificationRule(on=[]), sweep, total, finished
        self._environment = dict(environment)
        self._url = self._environment.get(self._rule.webhook_env or "", "").strip()
        if self._rule.webhook_env and not self._url:
            log.warning("notify: %s is not set: no webhook will be told", self._rule.webhook_env)
        self._ways: dict[str, Callable[[Notification], None]] = {}
        if self._url:
            self._ways["webhook"] = self._post
        if self._rule.command:
            self._ways["command"] = self._run
        self._queue: queue.SimpleQueue[Notification | None] = queue.SimpleQueue()
        self._put = self._done = 0
        self._abandoned, self._lock = threading.Event(), threading.Lock()  # the lock guards `_command`
        self._command: subprocess.Popen[bytes] | None = None
        self._mute: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        if self._ways:
            self._thread.start()

    def __call__(self, event: Event) -> None:
        """Hear of a trial: a listener, as in events.py."""
        self._finished += event.kind == "finished"
        if event.kind == "failed":
            self._tell(lambda: notices.failed(event.plan, event.reason or "", finished=self._finished, total=self._total))

    def breaker(self, reason: str) -> None:
        """The circuit breaker has tripped."""
        self._tell(lambda: notices.tripped(self._sweep, reason, finished=self._finished, total=self._total))

    def ended(self, sweep: Sweep, *, stopped: str | None = None) -> None:
        """The sweep has ended; `stopped` says why, where that was before its trials did."""
        self._tell(lambda: notices.ended(sweep, stopped=stopped))

    def close(self, *, timeout_s: float) -> int:
        """Wait until all is told, at most `timeout_s`; how many notices were not. A command that still runs then is killed."""
        if self._thread.ident is None:
            return 0
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._abandoned.set()
        with self._lock:
            if self._command:
                _kill(self._command)
        if left := self._put - self._done:
            log.warning("notify: %d notices were not told within %g s", left, timeout_s)
        return left

    def _tell(self, make: Callable[[], Notification]) -> None:
        try:
            notice = make()
            if not self._ways or notice.event not in self._rule.on:
                return
            if self._queue.qsize() >= WAITING:
                self._warn("queue", f"{WAITING} notices are waiting, the newest are dropped")
                return
            self._put += 1
            self._queue.put(notice)
        except Exception as error:  # a bug here must not end a sweep
            log.debug("no notice: %s", error, exc_info=True)

    def _work(self) -> None:
        """The thread. It catches everything, since nobody would see what it raised."""
        while (notice := self._queue.get()) is not None and not self._abandoned.is_set():
            for name, send in self._ways.items():
                try:
                    send(notice)
                    self._mute.discard(name)
                except _NotDelivered as error:
                    self._warn(name, str(error))
                except Exception as error:
                    self._warn(name, type(error).__name__)  # its text may hold the address
            self._done += 1

    def _warn(self, name: str, why: str) -> None:
        """One line, and no more until it worked again."""
        if name not in self._mute and not self._abandoned.is_set():
            log.warning("notify: %s: %s; the sweep goes on", name, why.replace(self._url or "\0", "ADDRESS"))
        self._mute.add(name)

    def _post(self, notice: Notification) -> None:
        body = json.dumps(notices.message(notice)).encode()
        for number in range(1, TRIES + 1):
            fault, again = _posted(self._url, body)
            if fault is None:
                return
            if not again or number == TRIES or self._abandoned.wait(number * PAUSE_S):
                raise _NotDelivered(f"{fault}, {number} of {TRIES} tries")

    def _run(self, notice: Notification) -> None:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:  # unlike pipes, files make nobody wait
            given.write(f"{notice.text}\n".encode())
            given.seek(0)
            with self._lock:
                if self._abandoned.is_set():
                    return
                self._command = subprocess.Popen(
                    ["/bin/sh", "-c", str(self._rule.command)],
                    stdin=given,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=self._environment | notices.variables(notice),
                    start_new_session=True,
                )
            try:
                code = self._command.wait(COMMAND_WITHIN_S)
            except subprocess.TimeoutExpired:
                _kill(self._command)
                raise _NotDelivered(f"ran for more than {COMMAND_WITHIN_S:g} s, and was killed") from None
            finally:
                with self._lock:
                    self._command = None
            if code:
                said.seek(0)
                raise _NotDelivered(f"ended with {code}{_last_line(said.read())}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """What is posted to an address goes to no other."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _posted(url: str, body: bytes) -> tuple[str | None, bool]:
    """What is wrong, None where it was taken, and whether another try may go better."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "what its variable holds is no http address", False
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        _within(TRY_WITHIN_S, lambda: opener.open(request, timeout=TRY_WITHIN_S).close())
    except urllib.error.HTTPError as error:
        error.close()
        return f"refused with {error.code}", error.code >= 500 or error.code in (408, 429)
    except urllib.error.URLError as error:
        return f"not reached: {error.reason}", True
    except OSError as error:
        return f"not reached: {error}", True
    return None, False


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call it, at most for so long: a server that drips, or a name that is looked up, knows no timeout. Raises TimeoutError."""
    outcome: list[Exception | None] = []

    def run() -> None:
        try:
            call()
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="notify-try", daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    if outcome[0]:
        raise outcome[0]


def _kill(command: subprocess.Popen[bytes]) -> None:
    """With all that it started, but for what has left its process group."""
    with suppress(ProcessLookupError, PermissionError):
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        command.wait(5)


def _last_line(said: bytes) -> str:
    lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
