"""upload_queue.py: checkpoints that wait for a store lie on disk, in order and within bounds, and nothing of them stays behind."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import new_s3_server, set_environment
from places import ROOT
from servers import wait_until

from orchestration.errors import Fenced, Preempted, StoreUnavailable
from orchestration.record.manifest import SCORE, EpochMetrics
from orchestration.record.upload_queue import PendingCheckpoint, UploadQueue
from orchestration.store.open import open_store

SIZE = 10_000
ROOMY = 100 * SIZE


def parcel(step: int, *, score: float | None = None, size: int = SIZE) -> PendingCheckpoint:
    """The checkpoint of `step`; with a score it closes the epoch of the same number."""
    entries = [] if score is None else [EpochMetrics(epoch=step, step=step, time_ms=0, metrics={SCORE: score})]
    files = {"model.safetensors": bytes([step % 256]) * (size - 10), "state.pt": b"%010d" % step}
    pictures = {} if score is None else {step: {"predictions.png": b"picture %d" % step}}
    return PendingCheckpoint(
        step=step, epoch=step, files=files, entries=entries, seconds=float(step), at_s=time.monotonic(), pictures=pictures
    )


class Gate:
    """A `commit` into a real store that blocks while the gate is closed."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(str(folder))
        self.committed: list[PendingCheckpoint] = []
        self.arrived, self.opened = threading.Semaphore(0), threading.Event()

    def commit(self, parcel: PendingCheckpoint) -> None:
        self.arrived.release()
        assert self.opened.wait(60)
        for name, body in parcel.files.items():
            self.store.write(f"{parcel.step}/{name}", body)
        self.committed.append(parcel)

    def arrive(self) -> None:
        """Until a commit is under way."""
        assert self.arrived.acquire(timeout=30)

    @property
    def steps(self) -> list[int]:
        return [parcel.step for parcel in self.committed]

    @property
    def epochs(self) -> list[int]:
        """Whose entries were committed, and with each its pictures."""
        for parcel in self.committed:
            assert list(parcel.pictures) == [entry.epoch for entry in parcel.entries]
        return [entry.epoch for parcel in self.committed for entry in parcel.entries]


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "store")
    yield gate
    gate.opened.set()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def nothing_stays(spool: Path) -> Iterator[None]:
    yield
    wait_until(
        lambda: "outbox" not in [thread.name for thread in threading.enumerate()], deadline_s=15, what="the end of all outbox threads"
    )
    assert not list(spool.iterdir())


def on_disk(spool: Path) -> int:
    return sum(path.stat().st_size for path in spool.rglob("*") if path.is_file())


def blocked(submit: threading.Thread) -> bool:
    submit.join(0.5)
    return submit.is_alive()


def in_thread(outbox: UploadQueue, parcel: PendingCheckpoint) -> threading.Thread:
    thread = threading.Thread(target=outbox.submit, args=(parcel,), daemon=True)
    thread.start()
    return thread


@contextmanager
def outbox_that_ends_with(outbox: UploadQueue, error: type[Exception]) -> Iterator[None]:
    """Everything within passes, and its exit raises."""
    outbox.__enter__()
    yield
    with pytest.raises(error):
        outbox.__exit__(None, None, None)


class TestOrder:
    def test_everything_is_committed_in_order_with_the_same_bytes(self, gate: Gate, spool: Path):
        gate.opened.set()
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as outbox:
            for step in range(1, 20):
                outbox.submit(parcel(step, score=float(step)))
                assert outbox.flush(timeout_s=30)
                assert outbox.waiting == 0
        assert gate.steps == list(range(1, 20))
        for committed in gate.committed:
            assert committed.files == parcel(committed.step).files

    def test_the_exit_waits_for_all_that_was_submitted(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as outbox:
            for step in (1, 2, 3):
                outbox.submit(parcel(step, score=0.5))
                gate.arrive() if step == 1 else None
            assert not outbox.flush(timeout_s=0.1)
            assert outbox.waiting == 3
            threading.Timer(0.5, gate.opened.set).start()
        assert gate.steps == [1, 2, 3]
        assert [committed.files for committed in gate.committed] == [parcel(step).files for step in (1, 2, 3)]

    def test_a_parcel_that_nobody_is_before_never_touches_the_disk(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=0, folder=spool) as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            assert not list(spool.iterdir())
            gate.opened.set()
        assert gate.steps == [1]

    def test_without_a_folder_it_is_where_temporary_files_are(self, gate: Gate, spool: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tempfile.tempdir", None)  # forget what was found before
        monkeypatch.setenv("TMPDIR", str(spool))
        with UploadQueue(gate.commit, limit_bytes=ROOMY) as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            outbox.submit(parcel(2))
            assert [folder.name.startswith("rrn-sweep-outbox-") for folder in spool.iterdir()] == [True]
            gate.opened.set()
        monkeypatch.setattr("tempfile.tempdir", None)

    def test_two_checkpoints_of_one_step_are_two(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            outbox.submit(parcel(2, size=SIZE))
            outbox.submit(parcel(2, size=2 * SIZE))
            gate.opened.set()
        assert [sum(map(len, committed.files.values())) for committed in gate.committed] == [SIZE, SIZE, 2 * SIZE]


class TestBounds:
    def test_training_pauses_at_the_bound_and_goes_on_when_there_is_room(self, gate: Gate, spool: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO)
        with UploadQueue(gate.commit, limit_bytes=SIZE, folder=spool) as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            outbox.submit(parcel(2))
            assert on_disk(spool) == SIZE
            third = in_thread(outbox, parcel(3))
            assert blocked(third)
            assert on_disk(spool) == SIZE
            gate.opened.set()
            third.join(30)
            assert not third.is_alive()
            assert outbox.flush(timeout_s=30)
            assert on_disk(spool) == 0
        assert gate.steps == [1, 2, 3]
        assert [record.message.split(":")[0].split(" after")[0] for record in caplog.records] == ["training pauses", "training goes on"]

    def test_what_is_larger_than_the_bound_waits_in_memory(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=SIZE // 2, folder=spool) as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            second = in_thread(outbox, parcel(2))
            assert blocked(second)
            assert on_disk(spool) == 0
            gate.opened.set()
            second.join(30)
        assert gate.steps == [1, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_however_fast_both_sides_are_the_bound_holds_and_no_entry_is_lost(self, gate: Gate, spool: Path, seed: int):
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                most[0] = max(most[0], sum(_size(Path(folder, name)) for folder, _, names in os.walk(spool) for name in names))

        watcher = threading.Thread(target=watch)
        watcher.start()
        gate.opened.set()
        try:
            with UploadQueue(gate.commit, limit_bytes=2 * SIZE, folder=spool) as outbox:
                for step in range(1, 60):
                    outbox.submit(parcel(step, score=float(step * 7919 * (seed + 1) % 101)))
        finally:
            stop.set()
            watcher.join()
        assert gate.steps == sorted(gate.steps)
        assert gate.steps[-1] == 59
        assert gate.epochs == list(range(1, 60))
        assert 0 < most[0] <= 2 * SIZE
        assert all(committed.files == parcel(committed.step).files for committed in gate.committed)

    def test_a_full_disk_pauses_and_loses_nothing(self, gate: Gate, small_disk: Path, caplog: pytest.LogCaptureFixture):
        with UploadQueue(gate.commit, limit_bytes=2**30, folder=small_disk) as outbox:
            outbox.submit(parcel(1, score=0.1, size=300_000))
            gate.arrive()
            outbox.submit(parcel(2, score=0.9, size=300_000))
            third = in_thread(outbox, parcel(3, score=0.2, size=300_000))
            assert blocked(third)
            assert on_disk(small_disk) == 300_000  # of the third not even a part
            assert outbox.waiting == 3
            gate.opened.set()
            third.join(30)
            assert outbox.flush(timeout_s=30)
            outbox.submit(parcel(4, score=0.3, size=300_000))
        assert gate.steps == gate.epochs == [1, 2, 3, 4]
        assert [len(committed.files["model.safetensors"]) for committed in gate.committed] == [299_990] * 4
        assert f"[Errno {errno.ENOSPC}]" in caplog.text
        assert not list(small_disk.iterdir())

    def test_a_folder_that_cannot_be_written_only_pauses(self, gate: Gate, tmp_path: Path):
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=tmp_path / "missing") as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            second = in_thread(outbox, parcel(2))
            assert blocked(second)
            gate.opened.set()
            second.join(30)
        assert gate.steps == [1, 2]


class TestCoalescing:
    @pytest.mark.parametrize(
        ("scores", "steps"),
        [
            ([0.5, 0.4, 0.3], [1, 2, 4]),  # the best and the newest of those that wait; 1 is under way
            ([0.3, 0.4, 0.5], [1, 4]),
            ([0.3, 0.9, 0.1, 0.2, 0.5], [1, 3, 6]),
            ([0.5, 0.5, 0.5], [1, 2, 4]),  # the earliest of the best, as in the manifest
            ([None, None, None, 0.2, None], [1, 5, 6]),
            ([None, None, None], [1, 4]),
            ([-0.5, -0.9, 0.0, -0.1], [1, 4, 5]),
            ([0.3, 0.2], [1, 2, 3]),  # two may wait
        ],
    )
    def test_after_an_outage_only_the_best_and_the_newest_go_up_with_all_entries(
        self, gate: Gate, spool: Path, scores: Sequence[float | None], steps: list[int]
    ):
        with UploadQueue(gate.commit, limit_bytes=2 * SIZE if len(scores) > 2 else ROOMY, folder=spool) as outbox:
            outbox.submit(parcel(1, score=0.0))
            gate.arrive()
            for step, score in enumerate(scores, start=2):
                outbox.submit(parcel(step, score=score))
                assert on_disk(spool) <= 2 * SIZE
            gate.opened.set()
        assert gate.steps == steps
        assert gate.epochs == [1, *(step for step, score in enumerate(scores, start=2) if score is not None)]
        for committed in gate.committed:
            assert committed.files == parcel(committed.step).files
            assert all(entry.step <= committed.step for entry in committed.entries)

    def test_an_hour_without_the_store_never_pauses_training(self, gate: Gate, spool: Path, caplog: pytest.LogCaptureFixture):
        with UploadQueue(gate.commit, limit_bytes=2 * SIZE, folder=spool) as outbox:
            for step in range(1, 200):
                outbox.submit(parcel(step, score=1 / step))
                gate.arrive() if step == 1 else None
            assert outbox.waiting == 3
            gate.opened.set()
        assert gate.steps == [1, 2, 199]
        assert gate.epochs == list(range(1, 200))
        assert "pauses" not in caplog.text


class TestErrors:
    def fail(self, parcel: PendingCheckpoint) -> None:
        raise Fenced(f"step {parcel.step}")

    def test_an_error_of_a_commit_is_raised_at_every_later_call_and_nothing_more_is_committed(self, gate: Gate, spool: Path):
        def once(parcel: PendingCheckpoint) -> None:
            gate.commit(parcel)
            raise Fenced("step 1")

        outbox = UploadQueue(once, limit_bytes=ROOMY, folder=spool)
        with outbox_that_ends_with(outbox, Fenced):
            outbox.submit(parcel(1))
            gate.arrive()
            outbox.submit(parcel(2))
            outbox.submit(parcel(3))
            gate.opened.set()
            with pytest.raises(Fenced, match="step 1"):
                outbox.flush(timeout_s=30)
            with pytest.raises(Fenced, match="step 1"):
                outbox.submit(parcel(4))
            assert outbox.waiting == 0
            assert on_disk(spool) == 0
        assert gate.steps == [1]

    def test_an_error_is_raised_at_the_exit_at_the_latest(self, spool: Path):
        with pytest.raises(Fenced, match="step 1"), UploadQueue(self.fail, limit_bytes=ROOMY, folder=spool) as outbox:
            outbox.submit(parcel(1))

    def test_an_error_ends_a_pause(self, gate: Gate, spool: Path):
        def late(parcel: PendingCheckpoint) -> None:
            gate.commit(parcel)
            raise StoreUnavailable("gone for good")

        outbox = UploadQueue(late, limit_bytes=SIZE, folder=spool)
        with outbox_that_ends_with(outbox, StoreUnavailable):
            outbox.submit(parcel(1))
            gate.arrive()
            outbox.submit(parcel(2))
            threading.Timer(0.5, gate.opened.set).start()
            with pytest.raises(StoreUnavailable):
                outbox.submit(parcel(3))
        assert gate.steps == [1]

    def test_while_an_exception_passes_the_commit_under_way_ends_and_the_rest_is_dropped(self, gate: Gate, spool: Path, caplog):
        def interrupted() -> None:
            with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as outbox:
                outbox.submit(parcel(1))
                gate.arrive()
                outbox.submit(parcel(2))
                outbox.submit(parcel(3))
                threading.Timer(0.5, gate.opened.set).start()
                raise FloatingPointError("diverged")

        with pytest.raises(FloatingPointError, match="diverged"):
            interrupted()
        assert gate.steps == [1]
        assert "not committed: the checkpoints of steps 2, 3" in caplog.text

    def test_an_error_of_a_commit_does_not_mask_the_one_that_passes(self, spool: Path, caplog: pytest.LogCaptureFixture):
        def diverged() -> None:
            with UploadQueue(self.fail, limit_bytes=ROOMY, folder=spool) as outbox:
                outbox.submit(parcel(1))
                wait_until(lambda: outbox.waiting == 0, deadline_s=30, what="the error")
                raise FloatingPointError("diverged")

        with pytest.raises(FloatingPointError, match="diverged"):
            diverged()
        assert "the last checkpoint was not committed: step 1" in caplog.text

    def test_a_spooled_file_that_vanished_is_an_error_and_not_a_checkpoint(self, gate: Gate, spool: Path):
        outbox = UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool)
        with outbox_that_ends_with(outbox, FileNotFoundError):
            outbox.submit(parcel(1))
            gate.arrive()
            outbox.submit(parcel(2))
            (lost,) = spool.rglob("state.pt")
            lost.unlink()
            gate.opened.set()
        assert gate.steps == [1]


class TestConclusion:
    def test_the_last_words_are_committed_after_all_that_waits(self, gate: Gate, spool: Path):
        with suppress(Preempted), UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as outbox:
            outbox.submit(parcel(1, score=0.5))
            gate.arrive()
            outbox.submit(parcel(2, score=0.4))
            threading.Timer(0.5, gate.opened.set).start()
            assert outbox.conclude(parcel(3), within_s=30)
            raise Preempted
        assert (gate.steps, gate.epochs) == ([1, 2, 3], [1, 2])

    def test_without_last_words_it_waits_for_what_was_submitted(self, gate: Gate, spool: Path):
        with suppress(Preempted), UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as outbox:
            outbox.submit(parcel(1))
            threading.Timer(0.5, gate.opened.set).start()
            assert outbox.conclude(None, within_s=30)
            raise Preempted
        assert gate.steps == [1]

    @pytest.mark.parametrize("limit_bytes", [ROOMY, SIZE // 2], ids=["room", "no room"])
    def test_a_store_that_is_away_is_waited_for_no_longer(self, gate: Gate, spool: Path, caplog, limit_bytes: int):
        since_s = time.monotonic()
        with suppress(Preempted), UploadQueue(gate.commit, limit_bytes=limit_bytes, folder=spool) as outbox:
            outbox.submit(parcel(1))
            gate.arrive()
            assert not outbox.conclude(parcel(2), within_s=0.5)
            raise Preempted
        assert time.monotonic() - since_s < 10
        assert "not committed: the checkpoints of steps 2" in caplog.text
        gate.opened.set()

    def test_what_went_wrong_with_a_commit_is_raised(self, spool: Path):
        def refuse(parcel: PendingCheckpoint) -> None:
            raise Fenced(f"step {parcel.step}")

        with pytest.raises(Fenced, match="step 7"), UploadQueue(refuse, limit_bytes=ROOMY, folder=spool) as outbox:
            outbox.conclude(parcel(7), within_s=30)


class TestLeftOvers:
    def test_the_folder_of_a_killed_process_is_swept_and_that_of_a_living_one_stays(self, gate: Gate, spool: Path):
        code = f"""
import pathlib, threading, time
from orchestration.record.upload_queue import UploadQueue, PendingCheckpoint
def parcel(step): return PendingCheckpoint(step=step, epoch=0, files={{"a": bytes(1000)}}, entries=(), seconds=0.0, at_s=0.0)
arrived = threading.Event()
def commit(parcel): arrived.set(); time.sleep(300)
with UploadQueue(commit, limit_bytes=10**6, folder=pathlib.Path({str(spool)!r})) as outbox:
    outbox.submit(parcel(1)); arrived.wait(30); outbox.submit(parcel(2)); print("ready", flush=True); time.sleep(300)
"""
        gate.opened.set()
        with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == "ready\n"
                assert on_disk(spool) == 1000
                with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool):
                    assert on_disk(spool) == 1000
            finally:
                process.kill()
        assert on_disk(spool) == 1000
        (spool / "rrn-sweep-outbox-husk").mkdir()  # killed before it could lock
        (spool / "another's").mkdir()
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool):
            assert [path.name for path in spool.iterdir()] == ["another's"]
        (spool / "another's").rmdir()


class TestStore:
    @pytest.mark.slow
    def test_a_server_that_is_killed_and_back_gets_the_best_and_the_newest(self, tmp_path_factory, monkeypatch, spool: Path):
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            store = open_store(f"s3://rrn-test/{uuid.uuid4().hex}", deadline_s=120)
            committed: list[PendingCheckpoint] = []

            def commit(parcel: PendingCheckpoint) -> None:
                store.write(f"{parcel.step}/model", parcel.files["model.safetensors"])
                committed.append(parcel)

            with UploadQueue(commit, limit_bytes=ROOMY, folder=spool) as outbox:
                outbox.submit(parcel(1, score=0.1))
                assert outbox.flush(timeout_s=60)
                server.kill()
                started = time.monotonic()
                for step, score in ((2, 0.2), (3, 0.9), (4, 0.4), (5, 0.5)):
                    outbox.submit(parcel(step, score=score))
                    time.sleep(0.2)
                assert time.monotonic() - started < 30  # none of them waited for the store
                assert not outbox.flush(timeout_s=1.0)
                server.launch()
            assert [parcel.step for parcel in committed] == [1, 2, 3, 5]
            assert [entry.epoch for parcel in committed for entry in parcel.entries] == [1, 2, 3, 4, 5]
            assert list(store.keys("")) == [f"{step}/model" for step in (1, 2, 3, 5)]
        finally:
            server.kill()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # gone between its listing and now
        return 0
