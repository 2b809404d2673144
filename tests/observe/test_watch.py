"""follow.py, changes.py, story.py: a sweep and a trial as another machine sees them, while real writers change the store."""

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
from rich.console import Console
from servers import wait_until

from orchestration.errors import SweepError
from orchestration.observe import state_changes as changes_module
from orchestration.observe.logs import find_trial, logs
from orchestration.observe.state_changes import DriverLiveness
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


class Play:
    """What trials of a sweep do to the store, with a clock that a test moves."""

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
    """A log that `watch` writes in a thread of its own; it is over when the context ends."""
    console, stop = Console(file=io.StringIO(), width=200), threading.Event()
    thread = threading.Thread(target=watch, args=(sweep, console), kwargs={"every_s": 0.05, "stop": stop}, daemon=True)
    thread.start()
    try:
        yield lambda: console.file.getvalue()
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def says(text: Callable[[], str], words: str) -> None:
    try:
        wait_until(lambda: words in text(), deadline_s=20, what=repr(words))
    except TimeoutError:
        pytest.fail(f"{words!r} is not in\n{text()}")


def python(code: str, **environment: str) -> str:
    """What a Python of its own prints."""
    env = {"PATH": "", **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60).stdout


def once(sweep: Sweep, *, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=terminal, color_system=None)
    watch(sweep, console, once=True)
    return console.file.getvalue()


@contextmanager
def followed(sweep: Sweep) -> Iterator[tuple[threading.Thread, list[str]]]:
    """What `logs --follow` says of the first trial, and the thread in which it does; it is over when the context ends."""
    said: list[str] = []
    arguments = {"follow": True, "every_s": 0.02, "stop": threading.Event()}
    thread = threading.Thread(target=logs, args=(sweep, "1/8 eps=0.3", said.append), kwargs=arguments, daemon=True)
    thread.start()
    try:
        yield thread, said
    finally:
        arguments["stop"].set()
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def lease(sweep: Sweep) -> Iterator[Lease]:
    with Lease.acquire(sweep.store, "demo", every_s=0.1, say=print) as lease:
        yield lease


def foreign_driver(sweep: Sweep, *, token: int = 1, beat: int = 0, released: bool = False) -> None:
    """The lease of a driver that cannot be looked up from here, and whose clock is a day late."""
    holder = {"host": "far-away", "boot": "another", "pid": 77, "started": "1"}
    record = {"token": token, "writer": "w", "holder": holder, "beat": beat, "beat_ms": 1_600_000_000_000, "every_s": 0.1}
    sweep.store.write("demo/lease.json", json.dumps(record | {"released": released}).encode())


class TestWatch:
    def test_a_log_tells_what_happens_to_a_trial_from_start_to_end(self, sweep, lease):
        play = Play(sweep, lease.token)
        with watched(sweep) as text:
            says(text, f"the driver with pid {lease._record.holder.pid} on ")
            says(text, "is alive")
            record = play.open(0)
            says(text, "[0/2 done] 1/8 eps=0.3: started")
            play.epoch(record, 1)
            says(text, "1/8 eps=0.3: epoch 1/4, loss 2.000, mIoU 0.100, 0:30 left")
            record.fail(failure="lost", reason="its process ended without a word")
            says(text, "1/8 eps=0.3: [lost] its process ended without a word; starting again from the last checkpoint")
            record = play.open(0, at=1)
            says(text, "1/8 eps=0.3: started again")
            play.epoch(record, 2)
            says(text, "1/8 eps=0.3: resumed at epoch 1 of 4 (step 10)")
            for epoch in (3, 4):
                play.epoch(record, epoch)
            record.finish()
            says(text, "[1/2 done] 1/8 eps=0.3: finished, mIoU 0.400")
            other = play.open(1)
            other.fail(failure="diverged", reason="FloatingPointError: diverged: loss", traceback="...")
            says(text, "1/8 eps=0.6: failed: [diverged] FloatingPointError: diverged: loss")
            lease.release()
            says(text, f"no driver: nothing runs; rrn-sweep {sweep.file} goes on with what is left")
            assert "\x1b" not in text()
        assert "2 trials: 0 waiting, 0 running, 1 done, 1 failed" in text()

    def test_it_ends_by_itself_when_the_last_trial_has_finished(self, sweep, lease):
        play = Play(sweep, lease.token)
        play.train(0, epochs=4).finish()
        console = Console(file=io.StringIO(), width=200)
        thread = threading.Thread(target=watch, args=(reopened(sweep.file.parent), console), kwargs={"every_s": 0.05}, daemon=True)
        thread.start()
        record = play.train(1, epochs=4)
        assert thread.is_alive()
        record.finish()
        thread.join(20)
        assert not thread.is_alive()
        last = console.file.getvalue()[console.file.getvalue().index("2 trials:") :]
        assert "2 trials: 0 waiting, 0 running, 2 done, 0 failed" in last
        assert "effort: useful 100.0%, repeated 0.0%, lost 0.0% of 0:01:20" in last
        assert "goes on with what is left" not in last

    def test_attempts_that_came_and_went_between_two_looks_are_told(self, sweep, lease):
        play = Play(sweep, lease.token)
        with watched(sweep) as text:
            says(text, "is alive")
            play.open(0)
            says(text, "eps=0.3: started")
            for reason in ("first death", "second death"):
                settle(sweep.store, "demo", sweep.plans[0].trial_id, driver=lease.token, failure="lost", reason=reason)
                play.open(0)
            record = play.open(0)
            record.finish()
            says(text, "finished")
            told = [line.split(": ", 1)[1] for line in text().splitlines() if "eps=0.3: " in line]
            assert told[0] == "started"
            assert [line for line in told if "death" in line] == [
                f"[lost] {reason}; starting again from the last checkpoint" for reason in ("first death", "second death")
            ]

    def test_a_failed_trial_that_runs_again_has_not_failed(self, sweep, lease):
        play = Play(sweep, lease.token)
        play.open(0).fail(failure="data", reason="ValueError: no")
        with watched(reopened(sweep.file.parent)) as text:
            says(text, "1/8 eps=0.3: attempt 1 failed: [data] ValueError: no")
            play.open(0)
            says(text, "started")
        assert "2 trials: 1 waiting, 1 running, 0 done, 0 failed" in text()

    def test_one_look_shows_counts_running_trials_news_driver_and_effort(self, sweep, lease):
        play = Play(sweep, lease.token)
        play.open(1).fail(failure="code", reason="KeyError: 'eps'")
        record = play.open(0)
        play.epoch(record, 1)
        play.epoch(record, 2)
        text = once(reopened(sweep.file.parent), terminal=True)
        assert "1/8 eps=0.6: attempt 1 failed: [code] KeyError: 'eps'" in text
        assert "2 trials: 0 waiting, 2 running, 0 done, 0 failed" in text  # a code error has one new start
        (row,) = [line for line in text.splitlines() if line.startswith("1/8 eps=0.3")]
        assert [word for word in row.split() if not set(word) <= {"━", "╸", "╺"}] == ["1/8", "eps=0.3", "2/4", "1.000", "0.200", "0:20"]
        assert text.count("is alive") == 1
        assert "effort: useful 100.0%, repeated 0.0%, lost 0.0% of 0:00:20" in text
        assert "after the newest committed epoch, on the validation list" in text

    def test_no_wall_clock_decides_what_is_shown(self, sweep):
        foreign_driver(sweep)
        play = Play(sweep, 1)
        record = play.open(0)
        play.epoch(record, 1)
        for jump_s in (-(10**9), 10**9):  # the node's clock is decades off, and its seconds are not
            manifest = read_manifest(sweep.store, "demo", sweep.plans[0].trial_id)
            shifted = [entry.model_copy(update={"time_ms": entry.time_ms + 1000 * jump_s}) for entry in manifest.history]
            moved = manifest.model_copy(update={"history": tuple(shifted), "updated_ms": 1000 * jump_s, "created_ms": -1000 * jump_s})
            text = once(replace(sweep, manifests={manifest.trial_id: moved}))
            assert "1/4" in text
            assert "0:30" in text
            assert "was last heard of at 2020-09-13 12:26:40 UTC by its own clock; waiting for a sign of life" in text

    def test_a_driver_elsewhere_is_alive_once_it_beats_and_lost_once_it_is_silent(self, sweep, monkeypatch):
        monkeypatch.setattr("orchestration.record.lease._PATIENCE_S", 1.0)
        foreign_driver(sweep)
        Play(sweep, 1).open(0)
        with watched(reopened(sweep.file.parent)) as text:
            says(text, "waiting for a sign of life")
            foreign_driver(sweep, beat=1)
            says(text, "the driver with pid 77 on far-away is alive")
            says(text, "gave no sign of life for 1 s: it is dead, or cut off")
            says(text, "1/8 eps=0.3: stopped: its driver is gone; the sweep goes on with it when it runs again")
            foreign_driver(sweep, beat=2)
            wait_until(lambda: text().count("is alive") == 2, deadline_s=20, what="the return")
            says(text, "1/8 eps=0.3: started")

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
        assert "is dead: nothing runs; rrn-sweep" in once(sweep)

    def test_a_store_that_goes_away_is_one_line_and_is_waited_for(self, sweep):
        foreign_driver(sweep)
        play = Play(sweep, 1)
        record = play.open(0)
        folder = sweep.file.parent
        with watched(reopened(folder)) as text:
            says(text, "waiting for a sign of life")
            (folder / "store").rename(folder / "away")
            says(text, "what was there of sweep demo is not there any more; watching on")
            (folder / "store").write_bytes(b"a file, where a folder should be")
            time.sleep(0.3)
            (folder / "store").unlink()
            (folder / "away").rename(folder / "store")
            says(text, "the store answers again")
            play.epoch(record, 1)
            says(text, "eps=0.3: epoch 1/4")
            assert text().count("watching on") == 1

    def test_what_a_search_proposes_meanwhile_is_watched_too(self, tmp_path):
        search = "search: {sampler: random, trials: 2}\nspace: {eps: {low: 0.1, high: 0.9}}\n"
        (tmp_path / "demo.yaml").write_text(FILE.replace('grid: {partition: ["1/8"], eps: [0.3, 0.6]}\n', search))
        searched = reopened(tmp_path)
        foreign_driver(searched)
        assert searched.plans == []
        plans = [make_plan(searched.spec, {"eps": eps}, varied=("eps",), proposal=n) for n, eps in enumerate((0.25, 0.75))]
        play = Play(replace(searched, plans=plans), 1)
        console = Console(file=io.StringIO(), width=200)
        thread = threading.Thread(target=watch, args=(searched, console), kwargs={"every_s": 0.05}, daemon=True)
        thread.start()
        for n in (0, 1):
            record = play.open(n)
            says(console.file.getvalue, f"[{n}/2 done] eps={plans[n].config.eps}: started")
            record.finish()
        thread.join(20)
        assert not thread.is_alive()
        assert "2 trials: 0 waiting, 0 running, 2 done, 0 failed" in console.file.getvalue()

    @pytest.mark.slow
    def test_a_server_that_is_killed_is_one_line_and_is_waited_for(self, tmp_path_factory, tmp_path, monkeypatch):
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            monkeypatch.setattr("orchestration.observe.watch.LOOK_WITHIN_S", 1.0)
            (tmp_path / "demo.yaml").write_text(FILE)
            there = open_sweep(tmp_path / "demo.yaml", [], data_root=None, environment={"RRN_STORE": "s3://rrn-test/watched"})
            foreign_driver(there)
            record = Play(there, 1).open(0)
            with watched(there) as text:
                says(text, "waiting for a sign of life")
                server.kill()
                says(text, "; watching on")
                server.start()
                wait_until(lambda: "the store answers again" in text(), deadline_s=60, what="its return")
                Play(there, 1).epoch(record, 1)
                says(text, "eps=0.3: epoch 1/4")
                assert text().count("watching on") == 1
        finally:
            server.kill()

    def test_a_finished_trial_is_not_read_again(self, sweep, lease):
        play = Play(sweep, lease.token)
        play.train(0, epochs=4).finish()
        now = reopened(sweep.file.parent)
        (sweep.file.parent / "store" / "demo" / sweep.plans[0].trial_id / "manifest.json").write_bytes(b"damaged since")
        with watched(now) as text:
            play.open(1)
            says(text, "1/8 eps=0.6: started")
            assert "not a manifest" not in text()

    def test_neither_ray_nor_mlflow_nor_torch_is_imported(self):
        code = "import sys, orchestration.observe.watch; print([n for n in ('torch', 'ray', 'mlflow', 'boto3') if n in sys.modules])"
        assert python(code) == "[]\n"


class TestPulse:
    def test_time_in_which_the_store_was_away_makes_no_driver_silent(self, monkeypatch):
        now_s = [0.0]
        monkeypatch.setattr(changes_module.time, "monotonic", lambda: now_s[0])
        pulse, driver = DriverLiveness(), Driver(token=3, name="x", heard="y", beat=1, every_s=5.0, alive=None)
        pulse.take(driver)
        now_s[0] += 29.0
        pulse.take(driver)
        assert (pulse.state, pulse.token) == ("unknown", 3)
        pulse.miss()
        now_s[0] += 1000.0
        pulse.take(driver)
        assert pulse.state == "unknown"
        now_s[0] += 1.0
        pulse.take(driver)
        assert (pulse.state, pulse.token) == ("silent", None)
        pulse.take(replace(driver, beat=2))
        assert (pulse.state, pulse.token) == ("alive", 3)
        pulse.take(None)
        assert (pulse.state, pulse.token) == ("none", None)


def troubled(sweep: Sweep) -> Manifest:
    """A trial that died once after its first epoch, went on, and failed in its third."""
    play = Play(sweep, 1)
    record = play.open(0)
    play.epoch(record, 1)
    settle(sweep.store, "demo", sweep.plans[0].trial_id, driver=1, failure="lost", reason="its node went", worked_s=12.0)
    record = play.open(0, at=1)
    play.epoch(record, 2)
    play.now_s += 5.0
    record.fail(failure="code", reason="KeyError: 'x'", traceback="Traceback (most recent call last):\n  ...\nKeyError: 'x'\n")
    return record.manifest


class TestLogs:
    def test_the_story_of_a_trial_in_order(self, sweep):
        lines = list(log_lines(troubled(sweep), "s3://bucket/sweeps"))
        trial_id = sweep.plans[0].trial_id
        told = [line[21:] for line in lines]
        assert told[0] == f"trial {trial_id} of demo created: 1/8 eps=0.3"
        assert told[1].startswith("attempt 1 for driver 1 on ")
        assert told[2] == (
            "epoch 1/4, step 10; train/loss 2.0000 (sup 1, dr 0.25); "
            "val/miou 0.1000 (branch1 0.1000, branch2 0.1000, ensemble 0.1000); 3.5 s"
        )
        assert told[3] == "attempt 1 ended: [lost] its node went; useful 0:00:10, repeated 0:00:00, lost 0:00:02"
        assert told[4].startswith("attempt 2 for driver 1 on ")
        assert told[5] == "went on from the checkpoint of step 10, after epoch 1"
        assert told[6].startswith("epoch 2/4, step 20; ")
        assert told[7] == "attempt 2 ended: [code] KeyError: 'x'; useful 0:00:10, repeated 0:00:00, lost 0:00:05"
        assert lines[8:11] == ["    Traceback (most recent call last):", "      ...", "    KeyError: 'x'"]
        folder = f"s3://bucket/sweeps/demo/{trial_id}/checkpoints"
        assert lines[11:] == [
            f"checkpoint of step 10, after epoch 1 (val/miou 0.1000): {folder}/00000010-1",
            f"checkpoint of step 20, after epoch 2 (last, best, val/miou 0.2000): {folder}/00000020-2",
        ]

    def test_instants_are_those_of_the_local_time_zone(self, sweep, tmp_path):
        troubled(sweep)
        code = "from pathlib import Path; from orchestration.observe.logs import logs; from orchestration.sweep import open_sweep\n"
        code += f"sweep = open_sweep(Path({str(sweep.file)!r}), [], data_root=None, environment={{'RRN_STORE': {sweep.store.uri!r}}})\n"
        code += "logs(sweep, '1/8 eps=0.3', print)"
        for zone, hour in (("UTC", "22:30:00"), ("Asia/Tokyo", "07:30:00")):
            assert python(code, TZ=zone).splitlines()[0][11:19] == hour

    def test_what_it_ran_on_and_what_is_kept_of_pictures_is_told(self, sweep):
        manifest = troubled(sweep)
        machine = {"python": "3.12.1", "device": "NVIDIA H100"}
        attempts = tuple(attempt.model_copy(update={"machine": machine, "node": "a"}) for attempt in manifest.attempts)
        ref = {"key": "demo/x/pictures/00000002-2/predictions.png", "sha256": "", "size": 1}
        known = manifest.model_dump() | {"attempts": attempts, "pictures": [{"epoch": 2, "objects": {"predictions.png": ref}}]}
        lines = list(log_lines(Manifest.model_validate(known), "file:///store"))
        assert lines[1][21:] == "attempt 1 for driver 1 on a (python 3.12.1, device NVIDIA H100)"
        assert lines[-1] == "pictures of epoch 2: file:///store/demo/x/pictures/00000002-2"

    def test_a_trial_is_named_by_label_or_the_beginning_of_its_identity(self, sweep):
        first, second = sweep.plans
        assert find_trial(sweep, first.trial_id[:5]) is first
        assert find_trial(sweep, "1/8 eps=0.6") is second
        for word, line in (
            ("eps=0.6", f"eps=0.6: no trial has such a label, or an identity that begins so; give one of {second.trial_id} (1/8 eps=0.6)"),
            ("nothing", f"give one of {first.trial_id} (1/8 eps=0.3), {second.trial_id} (1/8 eps=0.6)"),
            ("", "give one of"),
        ):
            with pytest.raises(SweepError) as caught:
                find_trial(sweep, word)
            assert line in str(caught.value)
            assert "\n" not in str(caught.value)

    def test_a_beginning_of_several_identities_names_a_few_of_them(self, sweep):
        text = FILE.replace("[0.3, 0.6]", str([n / 100 for n in range(1, 60)]))
        sweep.file.write_text(text)
        many = reopened(sweep.file.parent)
        digits = [plan.trial_id[0] for plan in many.plans]
        common = max(set(digits), key=digits.count)
        with pytest.raises(SweepError, match=f"{common}: begins several identities; give one of {common}"):
            find_trial(many, common)
        with pytest.raises(SweepError, match="and 51 more"):
            find_trial(many, "nothing")

    def test_a_trial_that_never_started_says_so(self, sweep):
        said: list[str] = []
        logs(sweep, "1/8 eps=0.6", said.append)
        assert said == [f"trial {sweep.plans[1].trial_id} 1/8 eps=0.6: not started yet"]

    def test_following_tells_each_thing_once_and_ends_with_the_trial(self, sweep):
        with followed(sweep) as (thread, said):
            wait_until(lambda: bool(said), deadline_s=10, what="the first line")
            manifest = troubled(sweep)
            wait_until(lambda: any("KeyError" in line for line in said), deadline_s=10, what="the failure")
            assert thread.is_alive()  # a code error has one new start
            play = Play(sweep, 1)
            record = play.open(0, at=2)
            for epoch in (3, 4):
                play.epoch(record, epoch)
            record.finish()
            thread.join(20)
            assert not thread.is_alive()
        assert len(said) == len(set(said))
        assert [line[21:].split(",")[0] for line in said if line[21:].startswith("epoch")] == [f"epoch {n}/4" for n in range(1, 5)]
        whole = log_lines(record.manifest, sweep.store.uri)
        assert [line for line in said if line.startswith("checkpoint")] == [line for line in whole if line.startswith("checkpoint")]
        assert manifest.traceback.splitlines()[0] in "\n".join(said)

    def test_following_outlives_a_store_that_is_away(self, sweep):
        Play(sweep, 1).open(0)
        manifest = sweep.file.parent / "store" / "demo" / sweep.plans[0].trial_id / "manifest.json"
        with followed(reopened(sweep.file.parent)) as (_, said):
            manifest.rename(manifest.with_name("aside"))
            manifest.write_bytes(b"{")
            wait_until(lambda: any("following on" in line for line in said), deadline_s=10, what="the line")
            manifest.with_name("aside").replace(manifest)
            wait_until(lambda: "the store answers again" in said, deadline_s=10, what="the return")
            assert sum("following on" in line for line in said) == 1
