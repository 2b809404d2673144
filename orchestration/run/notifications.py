"""Send notifications about a sweep to a webhook and a shell command, in a thread that neither fails nor delays the sweep."""

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
from orchestration.record.trial_state import TrialState
from orchestration.run import notification_text
from orchestration.run.notification_text import Notification
from orchestration.sweep import Sweep

log = logging.getLogger(__name__)

TRIES = 3
"""Tries per notification if the webhook is unreachable or busy."""
TRY_TIMEOUT_S = 10.0
PAUSE_S = 2.0
"""Between two tries; multiplied by the number of tries so far."""
COMMAND_TIMEOUT_S = 60.0
QUEUE_LIMIT = 1000
"""Notifications that wait for a slow receiver; newer ones are dropped."""


class _NotDelivered(Exception):  # noqa: N818
    """A receiver did not accept a notification. The text contains no secret."""


class Notifier:
    """Sends notifications one after the other. No method raises; only `close` blocks.

    Args:
        rule: receivers and events. None: send nothing.
        finished: trials that finished in earlier runs.
        environment: contains the webhook's address, which is a secret; passed on to the command.
    """

    def __init__(self, rule: NotificationRule | None, sweep: str, *, total: int, finished: int = 0, environment: Mapping[str, str]) -> None:
        self._rule, self._sweep, self._total, self._finished = rule or NotificationRule(on=[]), sweep, total, finished
        self._environment = dict(environment)
        self._url = self._environment.get(self._rule.webhook_env or "", "").strip()
        if self._rule.webhook_env and not self._url:
            log.warning("notify: %s is not set: no webhook is called; set it to the address of the webhook", self._rule.webhook_env)
        self._channels: dict[str, Callable[[Notification], None]] = {}
        if self._url:
            self._channels["webhook"] = self._post
        if self._rule.command:
            self._channels["command"] = self._run
        self._queue: queue.SimpleQueue[Notification | None] = queue.SimpleQueue()
        self._queued = self._handled = 0
        self._abandoned, self._lock = threading.Event(), threading.Lock()  # the lock guards `_command`
        self._command: subprocess.Popen[bytes] | None = None
        self._failing: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="notify", daemon=True)
        if self._channels:
            self._thread.start()

    def __call__(self, event: Event) -> None:
        """Handle an event of a trial (`Listener` of events.py)."""
        self._finished += event.state is TrialState.FINISHED
        if event.state is TrialState.FAILED:
            self._enqueue(lambda: notification_text.failed(event.plan, event.reason or "", finished=self._finished, total=self._total))

    def breaker(self, reason: str) -> None:
        """Notify that the circuit breaker tripped."""
        self._enqueue(lambda: notification_text.tripped(self._sweep, reason, finished=self._finished, total=self._total))

    def ended(self, sweep: Sweep, *, stopped: str | None = None) -> None:
        """Notify that the sweep ended. `stopped`: why it ended before its trials did."""
        self._enqueue(lambda: notification_text.ended(sweep, stopped=stopped))

    def close(self, *, timeout_s: float) -> int:
        """Wait at most `timeout_s` for the queue, then kill a command that still runs. Returns how many notifications were not sent."""
        if self._thread.ident is None:
            return 0
        self._queue.put(None)
        self._thread.join(timeout_s)
        self._abandoned.set()
        with self._lock:
            if self._command:
                _kill(self._command)
        if left := self._queued - self._handled:
            log.warning("notify: %d notifications were not sent within %g s", left, timeout_s)
        return left

    def _enqueue(self, make: Callable[[], Notification]) -> None:
        try:
            notification = make()
            if not self._channels or notification.event not in self._rule.on:
                return
            if self._queue.qsize() >= QUEUE_LIMIT:
                self._warn("queue", f"{QUEUE_LIMIT} notifications are waiting; newer ones are dropped")
                return
            self._queued += 1
            self._queue.put(notification)
        except Exception as error:  # a bug here must not end a sweep
            log.debug("no notification: %s", error, exc_info=True)

    def _work(self) -> None:
        """Body of the thread. Catches every exception, because a thread has no caller to raise to."""
        while (notification := self._queue.get()) is not None and not self._abandoned.is_set():
            for name, send in self._channels.items():
                try:
                    send(notification)
                    self._failing.discard(name)
                except _NotDelivered as error:
                    self._warn(name, str(error))
                except Exception as error:
                    self._warn(name, type(error).__name__)  # its text may contain the address
            self._handled += 1

    def _warn(self, name: str, fault: str) -> None:
        """Log one line per outage of a channel."""
        if name not in self._failing and not self._abandoned.is_set():
            log.warning("notify: %s: %s; the sweep continues", name, fault.replace(self._url or "\0", "ADDRESS"))
        self._failing.add(name)

    def _post(self, notification: Notification) -> None:
        body = json.dumps(notification_text.message(notification)).encode()
        for number in range(1, TRIES + 1):
            fault, retryable = _posted(self._url, body)
            if fault is None:
                return
            if not retryable or number == TRIES or self._abandoned.wait(number * PAUSE_S):
                raise _NotDelivered(f"{fault} (try {number} of {TRIES})")

    def _run(self, notification: Notification) -> None:
        with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:  # a full pipe would block, a file does not
            stdin.write(f"{notification.text}\n".encode())
            stdin.seek(0)
            with self._lock:
                if self._abandoned.is_set():
                    return
                self._command = subprocess.Popen(
                    ["/bin/sh", "-c", str(self._rule.command)],
                    stdin=stdin,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    env=self._environment | notification_text.variables(notification),
                    start_new_session=True,
                )
            try:
                code = self._command.wait(COMMAND_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _kill(self._command)
                raise _NotDelivered(f"did not end within {COMMAND_TIMEOUT_S:g} s and was killed") from None
            finally:
                with self._lock:
                    self._command = None
            if code:
                stderr.seek(0)
                raise _NotDelivered(f"exit code {code}{_last_line(stderr.read())}")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: a notification goes only to the configured address."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _posted(url: str, body: bytes) -> tuple[str | None, bool]:
    """POST once. Returns the fault (None: accepted) and whether another try may succeed."""
    if urlsplit(url).scheme not in ("http", "https"):
        return "its variable does not contain an http or https address", False
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        _with_timeout(TRY_TIMEOUT_S, lambda: opener.open(request, timeout=TRY_TIMEOUT_S).close())
    except urllib.error.HTTPError as error:
        error.close()
        return f"refused with HTTP {error.code}", error.code >= 500 or error.code in (408, 429)
    except urllib.error.URLError as error:
        return f"not reached: {error.reason}", True
    except OSError as error:
        return f"not reached: {error}", True
    return None, False


def _with_timeout(seconds: float, call: Callable[[], None]) -> None:
    """Call with a limit on the whole duration: socket timeouts cover neither name lookup nor a server that sends byte by byte.

    Raises:
        TimeoutError: no result within `seconds`.
    """
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
    """Kill the command's process group; a child that left the group survives."""
    with suppress(ProcessLookupError, PermissionError):
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        command.wait(5)


def _last_line(output: bytes) -> str:
    lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
