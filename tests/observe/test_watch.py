"""watch.py and logs.py: a sweep and a trial seen from another machine while real writers change the store."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import new_s3_server, set_environment
from places import ROOT
from servers import wait_until

from orchestration.errors import SweepError
from orchestration.observe import driver_liveness
from orchestration.observe.driver_liveness import DriverLiveness
from orchestration.observe.logs import find_trial, logs
from orchestration.observe.terminal import SharedTerminal
from orchestration.observe.trial_log import log_lines
from orchestration.observe.watch import watch
from orchestration.plan.spec import Retention
from orchestration.plan.trial_plan import make_plan
from orchestration.record.lease import Driver, Lease
from orchestration.record.manifest import EpochMetrics, Manifest, read_manifest
from orchestration.record.trial_record import TrialRecord, settle
from orchestration.sweep import Sweep, open_sweep

FILE = """
name: demo
preset: digits
base: {epochs: 4, train_images: 80, batch_size: 7}
grid: {partition: ["1/8"], eps: [0.3, 0.6]}
"""
STEPS = 40
HEADS = ("", "_branch1", "_branch2", "_ensemble")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "demo.yaml").write_text(FILE)
    return reopened(tmp_path)


def reopened(folder: Path) -> Sweep:
    return open_sweep(folder / "demo.yaml", [], data_root=None, environment={"RRN_STORE": str(folder / "store")})


def metrics(epoch: int) -> dict[str, float]:
    losses = {"train/loss": 2.0 / epoch, "train/loss_sup": 1.0 / epoch, "train/loss_dr": 0.25, "train/lr": 0.01}
    return losses | {f"val/miou{head}": epoch / 10 for head in HEADS} | {"perf/train_s": 3.0, "perf/eval_s": 0.5}


class Writer:
    """Writes to the store what the trials of a sweep would write, with a clock that the test moves."""

    def __init__(self, sweep: Sweep, driver: int = 0) -> None:
        self.sweep, self.driver, self.now_s = sweep, driver, 1000.0

    def open(self, n: int, *, at: int = 0) -> TrialRecord:
        """Another attempt at the trial, from the checkpoint after epoch `at`."""
        record = TrialRecord.open(
            self.sweep.store,
            self.sweep.plans[n],
            retention=Retention(),
            driver=self.driver,
            now_ms=lambda: 1_700_000_000_000 + round(1000 * self.now_s),
            clock=lambda: self.now_s,
        )
        record.begin_at(STEPS // 4 * at)
        return record

    def epoch(self, record: TrialRecord, epoch: int) -> None:
        """Ten seconds of work, committed."""
        self.now_s += 10.0
        step = STEPS // 4 * epoch
        entry = EpochMetrics(epoch=epoch, step=step, time_ms=1_700_000_000_000 + round(1000 * self.now_s), metrics=metrics(epoch))
        record.commit(step=step, epoch=epoch, files={"model.safetensors": b"w%d" % epoch}, entries=[entry], seconds=10.0 * epoch)

    def train(self, n: int, *, epochs: int) -> TrialRecord:
        record = self.open(n)
        for epoch in range(1, epochs + 1):
            self.epoch(record, epoch)
        return record


@contextmanager
def watched(sweep: Sweep) -> Iterator[Callable[[], str]]:
    """The log that `watch` writes in another thread, which ends with the context."""
    console, stop = SharedTerminal(file=io.StringIO(), width=200), threading.Event()
    thread = threading.Thread(target=watch, args=(sweep, console), kwargs={"every_s": 0.05, "stop": stop}, daemon=True)
    thread.start()
    try:
        yield lambda: console.file.getvalue()
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def wait_for(text: Callable[[], str], expected: str) -> None:
    try:
        wait_until(lambda: expected in text(), deadline_s=20, what=repr(expected))
    except TimeoutError:
        pytest.fail(f"{expected!r} is not in\n{text()}")


def python(code: str, **environment: str) -> str:
    """Output of a separate Python process."""
    env = {"PATH": "", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def once(sweep: Sweep, *, terminal: bool = False) -> str:
    console = SharedTerminal(file=io.StringIO(), width=140, force_terminal=terminal, color_system=None)
    watch(sweep, console, once=True)
    return console.file.getvalue()


@contextmanager
def followed(sweep: Sweep) -> Iterator[tuple[threading.Thread, list[str]]]:
    """The thread of `logs --follow` for the first trial, and the lines that it prints; it ends with the context."""
    lines: list[str] = []
    arguments = {"follow": True, "every_s": 0.02, "stop": threading.Event()}
    thread = threading.Thread(target=logs, args=(sweep, "1/8 eps=0.3", lines.append), kwargs=arguments, daemon=True)
    thread.start()
    try:
        yield thread, lines
    finally:
        arguments["stop"].set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def lease(sweep: Sweep) -> Iterator[Lease]:
    with Lease.acquire(sweep.store, "demo", every_s=0.1, say=print) as lease:
        yield lease


def foreign_driver(sweep: Sweep, *, token: int = 1, beat: int = 0, released: bool = False) -> None:
    """Write the lease of a driver on another machine, whose clock is wrong."""
    holder = {"host": "far-away", "boot": "another", "pid": 77, "started": "1"}
    record = {"token": token, "writer": "w", "holder": holder, "beat": beat, "beat_ms": 1_600_000_000_000, "every_s": 0.1}
    sweep.store.write("demo/lease.json", json.dumps(record | {"released": released}).encode())


class TestWatch:
    def test_a_log_shows_a_trial_from_start_to_end(self, sweep, lease):
        writer = Writer(sweep, lease.token)
        with watched(sweep) as text:
            wait_for(text, f"the driver with pid {lease._record.holder.pid} on ")
            wait_for(text, "is alive")
            record = writer.open(0)
            wait_for(text, "[0/2 finished] 1/8 eps=0.3: started")
            writer.epoch(record, 1)
            wait_for(text, "1/8 eps=0.3: epoch 1/4, loss 2.000, mIoU 0.100, 0:30 left")
            record.fail(failure="lost", reason="worker died")
            wait_for(text, "1/8 eps=0.3: [lost] worker died; restarting from the last checkpoint")
            record = writer.open(0, at=1)
            wait_for(text, "1/8 eps=0.3: restarted")
            writer.epoch(record, 2)
            wait_for(text, "1/8 eps=0.3: resumed at epoch 1 of 4 (step 10)")
            for epoch in (3, 4):
                writer.epoch(record, epoch)
            record.finish()
            wait_for(text, "[1/2 finished] 1/8 eps=0.3: finished, mIoU 0.400")
            other = writer.open(1)
            other.fail(failure="diverged", reason="FloatingPointError: diverged: loss", traceback="...")
            wait_for(text, "1/8 eps=0.6: failed: [diverged] FloatingPointError: diverged: loss")
            lease.release()
            wait_for(text, f"no driver: nothing runs; resume with: rrn-sweep {sweep.file}")
            assert "\x1b" not in text()
        assert "2 trials: 0 waiting, 0 running, 1 finished, 1 failed" in text()

    def test_it_ends_by_itself_when_the_last_trial_has_finished(self, sweep, lease):
        writer = Writer(sweep, lease.token)
        writer.train(0, epochs=4).finish()
        console = SharedTerminal(file=io.StringIO(), width=200)
        thread = threading.Thread(target=watch, args=(reopened(sweep.file.parent), console), kwargs={"every_s": 0.05}, daemon=True)
        thread.start()
        record = writer.train(1, epochs=4)
        assert thread.is_alive()
        record.finish()
        thread.join(20)
        assert not thread.is_alive()
        last = console.file.getvalue()[console.file.getvalue().index("2 trials:") :]
        assert "2 trials: 0 waiting, 0 running, 2 finished, 0 failed" in last
        assert "effort: useful 100.0%, repeated 0.0%, lost 0.0% of 0:01:20" in last
        assert "resume with" not in last

    def test_attempts_that_started_and_ended_between_two_polls_are_shown(self, sweep, lease):
        writer = Writer(sweep, lease.token)
        with watched(sweep) as text:
            wait_for(text, "is alive")
            writer.open(0)
            wait_for(text, "eps=0.3: started")
            for reason in ("first death", "second death"):
                settle(sweep.store, "demo", sweep.plans[0].trial_id, driver=lease.token, failure="lost", reason=reason)
                writer.open(0)
            record = writer.open(0)
            record.finish()
            wait_for(text, "eps=0.3: finished")
            lines = [line.split(": ", 1)[1] for line in text().splitlines() if "eps=0.3: " in line]
            assert lines[0] == "started"
            assert [line for line in lines if "death" in line] == [
                f"[lost] {reason}; restarting from the last checkpoint" for reason in ("first death", "second death")
            ]

    def test_a_failed_trial_that_runs_again_has_not_failed(self, sweep, lease):
        writer = Writer(sweep, lease.token)
        writer.open(0).fail(failure="data", reason="ValueError: no")
        with watched(reopened(sweep.file.parent)) as text:
            wait_for(text, "1/8 eps=0.3: attempt 1 failed: [data] ValueError: no")
            writer.open(0)
            wait_for(text, "started")
        assert "2 trials: 1 waiting, 1 running, 0 finished, 0 failed" in text()

    def test_once_shows_counts_running_trials_recent_attempts_driver_and_effort(self, sweep, lease):
        writer = Writer(sweep, lease.token)
        writer.open(1).fail(failure="code", reason="KeyError: 'eps'")
        record = writer.open(0)
        writer.epoch(record, 1)
        writer.epoch(record, 2)
        text = once(reopened(sweep.file.parent), terminal=True)
        assert "1/8 eps=0.6: attempt 1 failed: [code] KeyError: 'eps'" in text
        assert "2 trials: 0 waiting, 2 running, 0 finished, 0 failed" in text  # a code error is retried once
        (row,) = [line for line in text.splitlines() if line.startswith("1/8 eps=0.3")]
        assert [word for word in row.split() if not set(word) <= {"━", "╸", "╺"}] == ["1/8", "eps=0.3", "2/4", "1.000", "0.200", "0:20"]
        assert text.count("is alive") == 1
        assert "effort: useful 100.0%, repeated 0.0%, lost 0.0% of 0:00:20" in text
        assert "after the newest committed epoch, on the validation list" in text

    def test_wall_clocks_do_not_affect_the_view(self, sweep):
        foreign_driver(sweep)
        writer = Writer(sweep, 1)
        record = writer.open(0)
        writer.epoch(record, 1)
        for jump_s in (-(10**9), 10**9):  # the node's clock is decades off, its durations are right
            manifest = read_manifest(sweep.store, "demo", sweep.plans[0].trial_id)
            shifted = [entry.model_copy(update={"time_ms": entry.time_ms + 1000 * jump_s}) for entry in manifest.history]
            moved = manifest.model_copy(update={"history": tuple(shifted), "updated_ms": 1000 * jump_s, "created_ms": -1000 * jump_s})
            text = once(replace(sweep, manifests={manifest.trial_id: moved}))
            assert "1/4" in text
            assert "0:30" in text
            assert "sent its last heartbeat at 2020-09-13 12:26:40 UTC by its own clock; waiting for the next one" in text

    def test_a_driver_elsewhere_is_alive_after_a_heartbeat_and_lost_after_silence(self, sweep, monkeypatch):
        monkeypatch.setattr("orchestration.record.lease._PATIENCE_S", 1.0)
        foreign_driver(sweep)
        Writer(sweep, 1).open(0)
        with watched(reopened(sweep.file.parent)) as text:
            wait_for(text, "waiting for the next one")
            foreign_driver(sweep, beat=1)
            wait_for(text, "the driver with pid 77 on far-away is alive")
            wait_for(text, "sent no heartbeat for 1 s: dead or disconnected")
            wait_for(text, "1/8 eps=0.3: interrupted: its driver is gone; the next run of the sweep resumes it")
            foreign_driver(sweep, beat=2)
            wait_until(lambda: text().count("is alive") == 2, deadline_s=20, what="the return")
            wait_for(text, "1/8 eps=0.3: started")

    def test_a_killed_driver_of_this_machine_is_dead_at_once(self, sweep):
        code = "import sys; from orchestration.record.lease import Lease; from orchestration.store.open import open_store\n"
        code += f"Lease.acquire(open_store({sweep.store.uri!r}), 'demo', say=print); print('ready', flush=True); sys.stdin.read()"
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
            try:
                assert driver.stdout.readline() == "ready\n"
                assert f"the driver with pid {driver.pid} on" in once(sweep)
            finally:
                driver.kill()
                driver.wait(10)
        assert "is dead: nothing runs; resume with: rrn-sweep" in once(sweep)

    def test_a_store_that_becomes_unavailable_is_one_line_and_watch_retries(self, sweep):
        foreign_driver(sweep)
        writer = Writer(sweep, 1)
        record = writer.open(0)
        folder = sweep.file.parent
        with watched(reopened(folder)) as text:
            wait_for(text, "waiting for the next one")
            (folder / "store").rename(folder / "away")
            wait_for(text, "the unfinished trials of sweep demo disappeared; retrying")
            (folder / "store").write_bytes(b"a file, where a folder should be")
            time.sleep(0.3)
            (folder / "store").unlink()
            (folder / "away").rename(folder / "store")
            wait_for(text, "the store answers again")
            writer.epoch(record, 1)
            wait_for(text, "eps=0.3: epoch 1/4")
            assert text().count("; retrying") == 1

    def test_trials_that_a_search_proposes_while_watching_are_shown(self, tmp_path):
        search = "search: {sampler: random, trials: 2}\nspace: {eps: {low: 0.1, high: 0.9}}\n"
        (tmp_path / "demo.yaml").write_text(FILE.replace('grid: {partition: ["1/8"], eps: [0.3, 0.6]}\n', search))
        searched = reopened(tmp_path)
        foreign_driver(searched)
        assert searched.plans == []
        plans = [make_plan(searched.spec, {"eps": eps}, varied=("eps",), proposal=n) for n, eps in enumerate((0.25, 0.75))]
        writer = Writer(replace(searched, plans=plans), 1)
        console = SharedTerminal(file=io.StringIO(), width=200)
        thread = threading.Thread(target=watch, args=(searched, console), kwargs={"every_s": 0.05}, daemon=True)
        thread.start()
        for n in (0, 1):
            record = writer.open(n)
            wait_for(console.file.getvalue, f"[{n}/2 finished] eps={plans[n].config.eps}: started")
            record.finish()
        thread.join(20)
        assert not thread.is_alive()
        assert "2 trials: 0 waiting, 0 running, 2 finished, 0 failed" in console.file.getvalue()

    @pytest.mark.slow
    def test_a_killed_server_is_one_line_and_watch_retries(self, tmp_path_factory, tmp_path, monkeypatch):
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            monkeypatch.setattr("orchestration.observe.watch.STORE_TIMEOUT_S", 1.0)
            (tmp_path / "demo.yaml").write_text(FILE)
            there = open_sweep(tmp_path / "demo.yaml", [], data_root=None, environment={"RRN_STORE": "s3://rrn-test/watched"})
            foreign_driver(there)
            record = Writer(there, 1).open(0)
            with watched(there) as text:
                wait_for(text, "waiting for the next one")
                server.kill()
                wait_for(text, "; retrying")
                server.start()
                wait_until(lambda: "the store answers again" in text(), deadline_s=60, what="its return")
                Writer(there, 1).epoch(record, 1)
                wait_for(text, "eps=0.3: epoch 1/4")
                assert text().count("; retrying") == 1
        finally:
            server.kill()

    def test_a_finished_trial_is_not_read_again(self, sweep, lease):
        writer = Writer(sweep, lease.token)
        writer.train(0, epochs=4).finish()
        now = reopened(sweep.file.parent)
        (sweep.file.parent / "store" / "demo" / sweep.plans[0].trial_id / "manifest.json").write_bytes(b"damaged since")
        with watched(now) as text:
            writer.open(1)
            wait_for(text, "1/8 eps=0.6: started")
            assert "not a manifest" not in text()

    def test_neither_ray_nor_mlflow_nor_torch_is_imported(self):
        code = "import sys, orchestration.observe.watch; print([n for n in ('torch', 'ray', 'mlflow', 'boto3') if n in sys.modules])"
        assert python(code) == "[]\n"


class TestDriverLiveness:
    def test_time_while_the_store_is_unavailable_does_not_count_as_silence(self, monkeypatch):
        now_s = [0.0]
        monkeypatch.setattr(driver_liveness.time, "monotonic", lambda: now_s[0])
        liveness, driver = DriverLiveness(), Driver(token=3, name="x", heard="y", beat_ms=0, beat=1, every_s=5.0, alive=None)
        liveness.take(driver)
        now_s[0] += 29.0
        liveness.take(driver)
        assert (liveness.state, liveness.token) == ("unknown", 3)
        liveness.miss()
        now_s[0] += 1000.0
        liveness.take(driver)
        assert liveness.state == "unknown"
        now_s[0] += 1.0
        liveness.take(driver)
        assert (liveness.state, liveness.token) == ("silent", None)
        liveness.take(replace(driver, beat=2))
        assert (liveness.state, liveness.token) == ("alive", 3)
        liveness.take(None)
        assert (liveness.state, liveness.token) == ("none", None)


def troubled(sweep: Sweep) -> Manifest:
    """A trial whose worker died after its first epoch, that resumed, and that failed in its third epoch."""
    writer = Writer(sweep, 1)
    record = writer.open(0)
    writer.epoch(record, 1)
    settle(sweep.store, "demo", sweep.plans[0].trial_id, driver=1, failure="lost", reason="its node went", worked_s=12.0)
    record = writer.open(0, at=1)
    writer.epoch(record, 2)
    writer.now_s += 5.0
    record.fail(failure="code", reason="KeyError: 'x'", traceback="Traceback (most recent call last):\n  ...\nKeyError: 'x'\n")
    return record.manifest


class TestLogs:
    def test_the_history_of_a_trial_in_order(self, sweep):
        lines = list(log_lines(troubled(sweep), "s3://bucket/sweeps"))
        trial_id = sweep.plans[0].trial_id
        texts = [line[21:] for line in lines]
        assert texts[0] == f"trial {trial_id} of demo created: 1/8 eps=0.3"
        assert texts[1].startswith("attempt 1 for driver 1 on ")
        assert texts[2] == (
            "epoch 1/4, step 10; train/loss 2.0000 (sup 1, dr 0.25); "
            "val/miou 0.1000 (branch1 0.1000, branch2 0.1000, ensemble 0.1000); 3.5 s"
        )
        assert texts[3] == "attempt 1 ended: [lost] its node went; useful 0:00:10, repeated 0:00:00, lost 0:00:02"
        assert texts[4].startswith("attempt 2 for driver 1 on ")
        assert texts[5] == "resumed from the checkpoint of step 10, after epoch 1"
        assert texts[6].startswith("epoch 2/4, step 20; ")
        assert texts[7] == "attempt 2 ended: [code] KeyError: 'x'; useful 0:00:10, repeated 0:00:00, lost 0:00:05"
        assert lines[8:11] == ["    Traceback (most recent call last):", "      ...", "    KeyError: 'x'"]
        folder = f"s3://bucket/sweeps/demo/{trial_id}/checkpoints"
        assert lines[11:] == [
            f"checkpoint of step 10, after epoch 1 (val/miou 0.1000): {folder}/00000010-1",
            f"checkpoint of step 20, after epoch 2 (last, best, val/miou 0.2000): {folder}/00000020-2",
        ]

    def test_times_are_in_the_local_time_zone(self, sweep, tmp_path):
        troubled(sweep)
        code = "from pathlib import Path; from orchestration.observe.logs import logs; from orchestration.sweep import open_sweep\n"
        code += f"sweep = open_sweep(Path({str(sweep.file)!r}), [], data_root=None, environment={{'RRN_STORE': {sweep.store.uri!r}}})\n"
        code += "logs(sweep, '1/8 eps=0.3', print)"
        for zone, hour in (("UTC", "22:30:00"), ("Asia/Tokyo", "07:30:00")):
            assert python(code, TZ=zone).splitlines()[0][11:19] == hour

    def test_machine_and_stored_pictures_are_listed(self, sweep):
        manifest = troubled(sweep)
        machine = {"python": "3.12.1", "device": "NVIDIA H100"}
        attempts = tuple(attempt.model_copy(update={"machine": machine, "node": "a"}) for attempt in manifest.attempts)
        ref = {"key": f"demo/{manifest.trial_id}/pictures/00000002-2/predictions.png", "sha256": "", "size": 1}
        known = manifest.model_dump() | {"attempts": attempts, "pictures": [{"epoch": 2, "objects": {"predictions.png": ref}}]}
        lines = list(log_lines(Manifest.model_validate(known), "file:///store"))
        assert lines[1][21:] == "attempt 1 for driver 1 on a (python 3.12.1, device NVIDIA H100)"
        assert lines[-1] == f"pictures of epoch 2: file:///store/demo/{manifest.trial_id}/pictures/00000002-2"

    def test_a_trial_is_found_by_label_or_prefix_of_its_id(self, sweep):
        first, second = sweep.plans
        assert find_trial(sweep, first.trial_id[:5]) is first
        assert find_trial(sweep, "1/8 eps=0.6") is second
        for name, line in (
            ("eps=0.6", f"eps=0.6: no trial has this label or an ID that starts with it; give one of {second.trial_id} (1/8 eps=0.6)"),
            ("nothing", f"give one of {first.trial_id} (1/8 eps=0.3), {second.trial_id} (1/8 eps=0.6)"),
            ("", "give one of"),
        ):
            with pytest.raises(SweepError) as caught:
                find_trial(sweep, name)
            assert line in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_a_prefix_of_several_ids_lists_a_few_of_them(self, sweep):
        text = FILE.replace("[0.3, 0.6]", str([n / 100 for n in range(1, 60)]))
        sweep.file.write_text(text)
        many = reopened(sweep.file.parent)
        digits = [plan.trial_id[0] for plan in many.plans]
        common = max(set(digits), key=digits.count)
        with pytest.raises(SweepError, match=f"{common}: matches the IDs of several trials; give one of {common}"):
            find_trial(many, common)
        with pytest.raises(SweepError, match="and 51 more"):
            find_trial(many, "nothing")

    def test_a_trial_that_never_started_says_so(self, sweep):
        lines: list[str] = []
        logs(sweep, "1/8 eps=0.6", lines.append)
        assert lines == [f"trial {sweep.plans[1].trial_id} 1/8 eps=0.6: not started yet"]

    def test_following_prints_each_line_once_and_ends_with_the_trial(self, sweep):
        with followed(sweep) as (thread, lines):
            wait_until(lambda: bool(lines), deadline_s=10, what="the first line")
            manifest = troubled(sweep)
            wait_until(lambda: any("KeyError" in line for line in lines), deadline_s=10, what="the failure")
            assert thread.is_alive()  # a code error is retried once
            writer = Writer(sweep, 1)
            record = writer.open(0, at=2)
            for epoch in (3, 4):
                writer.epoch(record, epoch)
            record.finish()
            thread.join(20)
            assert not thread.is_alive()
        assert len(lines) == len(set(lines))
        assert [line[21:].split(",")[0] for line in lines if line[21:].startswith("epoch")] == [f"epoch {n}/4" for n in range(1, 5)]
        whole = log_lines(record.manifest, sweep.store.uri)
        assert [line for line in lines if line.startswith("checkpoint")] == [line for line in whole if line.startswith("checkpoint")]
        assert manifest.traceback.splitlines()[0] in "\n".join(lines)

    def test_following_continues_after_the_store_was_unavailable(self, sweep):
        Writer(sweep, 1).open(0)
        manifest = sweep.file.parent / "store" / "demo" / sweep.plans[0].trial_id / "manifest.json"
        with followed(reopened(sweep.file.parent)) as (_, lines):
            manifest.rename(manifest.with_name("aside"))
            manifest.write_bytes(b"{")
            wait_until(lambda: any("; retrying" in line for line in lines), deadline_s=10, what="the line")
            manifest.with_name("aside").replace(manifest)
            wait_until(lambda: "the store answers again" in lines, deadline_s=10, what="the return")
            assert sum("; retrying" in line for line in lines) == 1
