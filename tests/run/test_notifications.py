"""notifications.py with a real HTTP server and real commands: what they receive, and that their faults do not affect the sweep."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from finished import manifest_of
from servers import free_port, wait_until

from orchestration.observe.events import Event
from orchestration.plan.spec import NotificationRule
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import EpochMetrics, Manifest
from orchestration.record.trial_state import TrialState
from orchestration.run import notification_text, notifications
from orchestration.run.notifications import Notifier
from orchestration.sweep import Sweep, open_sweep

SECRET = "T000/B000/XXXXXXXX"
FILE = {"name": "demo", "preset": "digits", "grid": {"partition": ["1/8"], "eps": [0.3, 0.6]}}
PLANS = expand(check(FILE))
FAILED = Event(PLANS[0], TrialState.FAILED, reason="[code] KeyError: 'eps' & <more>")


class Webhook:
    """A server that records requests. Its answers: an HTTP status per request, or `hang` or `drip`."""

    def __init__(self, *answers: int | str) -> None:
        self.bodies: list[dict] = []
        self._answers, self._ended = list(answers), threading.Event()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                hook.answer(self)

            do_GET = do_POST  # noqa: N815

            def log_message(self, *arguments: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/services/{SECRET}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        kind = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if kind == "hang":
            self._ended.wait(60)
        elif kind == "drip":
            with suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 1000:
                    request.wfile.write(bytes([byte]))
                    if self._ended.wait(0.1):
                        return
        else:
            request.send_response(kind)
            request.send_header("Location", self.url)
            request.send_header("Content-Length", "0")
            request.end_headers()

    def close(self) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def webhook(*answers: int | str) -> Iterator[Webhook]:
    hook = Webhook(*answers)
    try:
        yield hook
    finally:
        hook.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notifications, "TRY_TIMEOUT_S", 1.0)
    monkeypatch.setattr(notifications, "PAUSE_S", 0.05)
    monkeypatch.setattr(notifications, "COMMAND_TIMEOUT_S", 2.0)


def notifier(*, url: str = "", command: str | None = None, **rule) -> Notifier:
    named = {"webhook_env": "HOOK"} if url else {}
    environment = {"PATH": os.environ["PATH"], "HOOK": url}
    return Notifier(NotificationRule(command=command, **named, **rule), "demo", total=2, environment=environment)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def finished(tmp_path: Path) -> Sweep:
    """A sweep of two trials, of which the second has the better epoch."""
    (tmp_path / "demo.yaml").write_text(json.dumps(FILE))
    sweep = open_sweep(tmp_path / "demo.yaml", [], data_root=None, environment={"RRN_STORE": str(tmp_path / "store")})
    manifests = {plan.trial_id: manifest(plan, mious) for plan, mious in zip(sweep.plans, ([0.1, 0.3], [0.4, 0.2]), strict=True)}
    return Sweep(**{**vars(sweep), "manifests": manifests})


def manifest(plan, mious=(), **changes) -> Manifest:
    history = tuple(EpochMetrics(epoch=n, step=n, time_ms=n, metrics={"val/miou": miou}) for n, miou in enumerate(mious, start=1))
    return manifest_of(plan, **{"status": "finished", "history": history, **changes})


class TestTexts:
    def test_the_end_states_how_many_finished_and_the_best_with_its_rule(self, finished):
        notification = notification_text.ended(finished)
        assert notification.text.splitlines() == [
            "Sweep demo finished; 2 of 2 finished",
            f"best val/miou 0.400: 1/8 eps=0.6 after epoch 1 of {PLANS[1].config.epochs}, both chosen on the validation list",
        ]
        assert (notification.event, notification.finished, notification.total, notification.reason) == ("end", 2, 2, "finished")

    def test_the_end_names_what_failed_and_why_it_stopped(self, finished):
        failed = manifest(PLANS[0], status="failed", failure="memory", reason="no room")
        sweep = Sweep(**{**vars(finished), "manifests": {PLANS[0].trial_id: failed}})
        assert notification_text.ended(sweep).text.splitlines() == [
            "Sweep demo ended, 1 failed; 0 of 2 finished",
            f"FAILED {PLANS[0].trial_id} 1/8 eps=0.3: [memory] no room",
        ]
        assert notification_text.ended(sweep, stopped="stopped by SIGTERM").reason == "stopped: stopped by SIGTERM"

    def test_a_hundred_failures_are_counted_and_a_long_text_is_cut(self, finished):
        many = expand(check(FILE | {"grid": {"eps": [n / 200 for n in range(1, 101)]}}))
        manifests = {plan.trial_id: manifest(plan, status="failed", failure="code", reason="x" * 999) for plan in many}
        sweep = Sweep(**{**vars(finished), "plans": many, "manifests": manifests})
        assert len(notification_text.ended(sweep).text) == notification_text.LONGEST_TEXT
        short = {trial_id: known.model_copy(update={"reason": "x"}) for trial_id, known in manifests.items()}
        assert notification_text.ended(Sweep(**{**vars(sweep), "manifests": short})).text.splitlines()[-1] == "and 95 more failed"

    def test_a_message_is_slacks_and_turns_nothing_into_markup(self):
        notification = notification_text.failed(PLANS[0], "no <b> & :tada: at https://user:pw@host/", finished=0, total=2)
        message = notification_text.message(notification)
        assert "no &lt;b&gt; &amp; :tada:" in message["text"]
        (block,) = message["blocks"]
        assert block["text"] == {"type": "plain_text", "text": notification.text, "emoji": False}
        assert "pw" not in json.dumps(message)

    def test_characters_that_no_environment_variable_can_hold_are_removed(self):
        variables = notification_text.variables(notification_text.failed(PLANS[0], "a\0b\udcff", finished=0, total=2))
        assert variables["RRN_REASON"] == "ab?"


class TestWebhook:
    def test_it_receives_failures_the_breaker_and_the_end(self, finished, caplog):
        with webhook(200) as hook:
            notify = notifier(url=hook.url)
            notify(Event(PLANS[1], TrialState.FINISHED))
            notify(FAILED)
            notify.breaker("circuit breaker: the first 3 trials failed alike")
            notify.ended(finished, stopped="circuit breaker")
            assert notify.close(timeout_s=10) == 0
            texts = [body["text"] for body in hook.bodies]
        assert texts[0].startswith(f"Sweep demo: trial 1/8 eps=0.3 ({PLANS[0].trial_id}) failed, no retries left: [code] KeyError")
        assert texts[0].endswith("1 of 2 finished")
        assert texts[1].startswith("Sweep demo: circuit breaker: the first 3 trials failed alike")
        assert texts[2].startswith("Sweep demo stopped: circuit breaker; 2 of 2 finished")
        assert len(texts) == 3
        assert warnings(caplog) == []

    def test_only_the_chosen_events_are_sent(self, finished):
        with webhook(200) as hook:
            notify = notifier(url=hook.url, on=["breaker"])
            notify(FAILED)
            notify.ended(finished)
            notify.breaker("why")
            assert notify.close(timeout_s=10) == 0
            assert len(hook.bodies) == 1

    def test_a_temporary_fault_is_retried(self, caplog):
        with webhook(500, 429, 200) as hook:
            notify = notifier(url=hook.url)
            notify(FAILED)
            assert notify.close(timeout_s=10) == 0
            assert len(hook.bodies) == 3
        assert warnings(caplog) == []

    @pytest.mark.parametrize(
        ("answer", "requests", "fault"),
        [
            (500, 3, "refused with HTTP 500 (try 3 of 3)"),
            (404, 1, "refused with HTTP 404 (try 1 of 3)"),
            (307, 1, "refused with HTTP 307 (try 1 of 3)"),
            (302, 1, "refused with HTTP 302 (try 1 of 3)"),
            ("hang", 3, "not reached: "),
            ("drip", 3, "not reached: no answer within 1 s"),
        ],
    )
    def test_one_that_fails_is_one_warning_without_its_address(self, answer, requests, fault, caplog):
        with webhook(answer) as hook:
            notify = notifier(url=hook.url)
            notify(FAILED)
            assert notify.close(timeout_s=20) == 0
            assert len(hook.bodies) == requests
        (line,) = warnings(caplog)
        assert line.startswith(f"notify: webhook: {fault}")
        assert SECRET not in caplog.text
        assert "127.0.0.1" not in caplog.text

    def test_one_that_stays_unreachable_is_one_warning(self, caplog):
        notify = notifier(url=f"http://127.0.0.1:{free_port()}/{SECRET}")
        for _ in range(3):
            notify(FAILED)
        assert notify.close(timeout_s=20) == 0
        assert len(warnings(caplog)) == 1
        assert SECRET not in caplog.text

    @pytest.mark.parametrize(
        "address", [f"file:///{SECRET}", SECRET, f"http://host:{SECRET}/", f"http://a b/{SECRET}", f"http://[{SECRET}"]
    )
    def test_an_invalid_address_is_one_warning_without_it(self, address, caplog):
        notify = notifier(url=address)
        notify(FAILED)
        assert notify.close(timeout_s=20) == 0
        assert len(warnings(caplog)) == 1
        assert SECRET not in caplog.text

    def test_an_unset_variable_is_an_immediate_warning(self, caplog):
        notify = Notifier(NotificationRule(webhook_env="SLACK_WEBHOOK"), "demo", total=1, environment={})
        notify(FAILED)
        assert notify.close(timeout_s=1) == 0
        assert warnings(caplog) == ["notify: SLACK_WEBHOOK is not set: no webhook is called; set it to the address of the webhook"]


class TestNeverInTheWay:
    def test_a_sweep_does_not_wait_for_one_that_hangs_and_its_end_waits_at_most_the_timeout(self, finished, caplog):
        with webhook("hang") as hook:
            notify = notifier(url=hook.url)
            started = time.monotonic()
            for _ in range(50):
                notify(FAILED)
            notify.ended(finished)
            assert time.monotonic() - started < 0.5
            assert notify.close(timeout_s=1.5) == 51
            assert time.monotonic() - started < 4
        assert warnings(caplog)[-1] == "notify: 51 notifications were not sent within 1.5 s"
        wait_until(lambda: not any(thread.name == "notify" for thread in threading.enumerate()), deadline_s=10, what="its end")

    def test_the_queue_is_bounded(self, monkeypatch, caplog):
        monkeypatch.setattr(notifications, "QUEUE_LIMIT", 3)
        with webhook("hang") as hook:
            notify = notifier(url=hook.url)
            for _ in range(100):
                notify(FAILED)
            assert notify.close(timeout_s=0.1) <= 4
        assert "notify: queue: 3 notifications are waiting; newer ones are dropped; the sweep continues" in warnings(caplog)

    def test_a_bug_in_a_text_does_not_reach_the_sweep(self):
        with webhook(200) as hook:
            notify = notifier(url=hook.url)
            notify.ended(SimpleNamespace())
            notify(FAILED)
            assert notify.close(timeout_s=10) == 0
            assert len(hook.bodies) == 1

    def test_without_a_rule_nothing_is_sent_and_no_thread_starts(self, finished):
        before = threading.active_count()
        notify = Notifier(None, "demo", total=2, environment={})
        notify(FAILED)
        notify.breaker("why")
        notify.ended(finished)
        assert notify.close(timeout_s=0) == 0
        assert threading.active_count() == before


class TestCommand:
    def test_it_gets_the_facts_in_its_environment_and_the_text_on_stdin(self, tmp_path, caplog):
        notify = notifier(command=f"env > {tmp_path}/env; cat > {tmp_path}/text; echo to nobody")
        notify(FAILED)
        assert notify.close(timeout_s=10) == 0
        facts = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if line.startswith("RRN_"))
        text = (tmp_path / "text").read_text()
        assert facts == {
            "RRN_EVENT": "failed",
            "RRN_SWEEP": "demo",
            "RRN_TRIAL": PLANS[0].trial_id,
            "RRN_LABEL": "1/8 eps=0.3",
            "RRN_REASON": "[code] KeyError: 'eps' & <more>",
            "RRN_FINISHED": "0",
            "RRN_TOTAL": "2",
            "RRN_TEXT": text.splitlines()[0],  # its second line has no name before it
        }
        assert warnings(caplog) == []

    def test_unread_input_and_large_output_do_not_block(self, tmp_path, caplog):
        notify = notifier(command="head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2")
        notify(FAILED)
        assert notify.close(timeout_s=10) == 0
        assert warnings(caplog) == []

    def test_one_that_fails_is_one_warning_with_its_last_line(self, caplog):
        with webhook(200) as hook:
            notify = notifier(url=hook.url, command='echo first >&2; echo "cannot post to $HOOK" >&2; exit 3')
            notify(FAILED)
            notify(FAILED)
            assert notify.close(timeout_s=10) == 0
            assert len(hook.bodies) == 2  # the webhook still receives both
        assert warnings(caplog) == ["notify: command: exit code 3: cannot post to ADDRESS; the sweep continues"]

    def test_one_that_ignores_sigterm_and_forks_is_killed_with_its_children(self, tmp_path, caplog):
        notify = notifier(command=f"trap '' TERM HUP; (sleep 300; true) & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/pid; wait")
        notify(FAILED)
        assert notify.close(timeout_s=10) == 0
        assert warnings(caplog) == ["notify: command: did not end within 2 s and was killed; the sweep continues"]
        for name in ("child", "pid"):
            wait_until(lambda name=name: not lives(int((tmp_path / name).read_text())), deadline_s=5, what=f"the end of {name}")

    def test_one_that_still_runs_when_time_is_up_is_killed(self, tmp_path):
        notify = notifier(command=f"echo $$ > {tmp_path}/pid; trap '' TERM; sleep 300; touch {tmp_path}/done")
        notify(FAILED)
        notify(FAILED)
        wait_until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()), deadline_s=5, what="its start")
        started = time.monotonic()
        assert notify.close(timeout_s=0.2) == 2
        assert time.monotonic() - started < 3
        pid = int((tmp_path / "pid").read_text())
        wait_until(lambda: not lives(pid), deadline_s=5, what="its end")
        wait_until(lambda: not any(thread.name == "notify" for thread in threading.enumerate()), deadline_s=5, what="its end")
        assert int((tmp_path / "pid").read_text()) == pid  # the second was not started


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
