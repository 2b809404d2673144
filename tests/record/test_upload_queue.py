"""upload_queue.py: checkpoints that wait for the store are spooled in order, within a bound, and leave no files behind."""

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


def checkpoint(step: int, *, score: float | None = None, size: int = SIZE) -> PendingCheckpoint:
    """The checkpoint of `step`. With a score it ends the epoch of the same number."""
    entries = [] if score is None else [EpochMetrics(epoch=step, step=step, time_ms=0, metrics={SCORE: score})]
    files = {"model.safetensors": bytes([step % 256]) * (size - 10), "state.pt": b"%010d" % step}
    pictures = {} if score is None else {step: {"predictions.png": b"picture %d" % step}}
    return PendingCheckpoint(
        step=step, epoch=step, files=files, entries=entries, seconds=float(step), at_s=time.monotonic(), pictures=pictures
    )


class Gate:
    """A `commit` to a real store that blocks while the gate is closed."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(str(folder))
        self.committed: list[PendingCheckpoint] = []
        self.arrived, self.opened = threading.Semaphore(0), threading.Event()

    def commit(self, checkpoint: PendingCheckpoint) -> None:
        self.arrived.release()
        assert self.opened.wait(60)
        for name, body in checkpoint.files.items():
            self.store.write(f"{checkpoint.step}/{name}", body)
        self.committed.append(checkpoint)

    def arrive(self) -> None:
        """Wait until a commit is running."""
        assert self.arrived.acquire(timeout=30)

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.committed]

    @property
    def epochs(self) -> list[int]:
        """Epochs whose entries were committed. Asserts that their pictures were too."""
        for checkpoint in self.committed:
            assert list(checkpoint.pictures) == [entry.epoch for entry in checkpoint.entries]
        return [entry.epoch for checkpoint in self.committed for entry in checkpoint.entries]


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
def no_file_is_left(spool: Path) -> Iterator[None]:
    yield
    wait_until(
        lambda: "outbox" not in [thread.name for thread in threading.enumerate()], deadline_s=15, what="the end of all queue threads"
    )
    assert not list(spool.iterdir())


def on_disk(spool: Path) -> int:
    return sum(path.stat().st_size for path in spool.rglob("*") if path.is_file())


def blocked(submit: threading.Thread) -> bool:
    submit.join(0.5)
    return submit.is_alive()


def in_thread(queue: UploadQueue, checkpoint: PendingCheckpoint) -> threading.Thread:
    thread = threading.Thread(target=queue.submit, args=(checkpoint,), daemon=True)
    thread.start()
    return thread


@contextmanager
def queue_that_ends_with(queue: UploadQueue, error: type[Exception]) -> Iterator[None]:
    """The body succeeds, and leaving the queue raises."""
    queue.__enter__()
    yield
    with pytest.raises(error):
        queue.__exit__(None, None, None)


class TestOrder:
    def test_everything_is_committed_in_order_with_the_same_bytes(self, gate: Gate, spool: Path):
        gate.opened.set()
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as queue:
            for step in range(1, 20):
                queue.submit(checkpoint(step, score=float(step)))
                assert queue.flush(timeout_s=30)
                assert queue.waiting == 0
        assert gate.steps == list(range(1, 20))
        for committed in gate.committed:
            assert committed.files == checkpoint(committed.step).files

    def test_leaving_waits_for_everything_submitted(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as queue:
            for step in (1, 2, 3):
                queue.submit(checkpoint(step, score=0.5))
                gate.arrive() if step == 1 else None
            assert not queue.flush(timeout_s=0.1)
            assert queue.waiting == 3
            threading.Timer(0.5, gate.opened.set).start()
        assert gate.steps == [1, 2, 3]
        assert [committed.files for committed in gate.committed] == [checkpoint(step).files for step in (1, 2, 3)]

    def test_the_first_checkpoint_is_not_spooled(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=0, folder=spool) as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            assert not list(spool.iterdir())
            gate.opened.set()
        assert gate.steps == [1]

    def test_the_default_folder_is_that_of_temporary_files(self, gate: Gate, spool: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("tempfile.tempdir", None)  # drop the cached folder
        monkeypatch.setenv("TMPDIR", str(spool))
        with UploadQueue(gate.commit, limit_bytes=ROOMY) as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            queue.submit(checkpoint(2))
            assert [folder.name.startswith("rrn-sweep-outbox-") for folder in spool.iterdir()] == [True]
            gate.opened.set()
        monkeypatch.setattr("tempfile.tempdir", None)

    def test_two_checkpoints_of_one_step_are_two(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            queue.submit(checkpoint(2, size=SIZE))
            queue.submit(checkpoint(2, size=2 * SIZE))
            gate.opened.set()
        assert [sum(map(len, committed.files.values())) for committed in gate.committed] == [SIZE, SIZE, 2 * SIZE]


class TestBounds:
    def test_training_pauses_at_the_bound_and_continues_when_there_is_room(self, gate: Gate, spool: Path, caplog: pytest.LogCaptureFixture):
        caplog.set_level(logging.INFO)
        with UploadQueue(gate.commit, limit_bytes=SIZE, folder=spool) as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            queue.submit(checkpoint(2))
            assert on_disk(spool) == SIZE
            third = in_thread(queue, checkpoint(3))
            assert blocked(third)
            assert on_disk(spool) == SIZE
            gate.opened.set()
            third.join(30)
            assert not third.is_alive()
            assert queue.flush(timeout_s=30)
            assert on_disk(spool) == 0
        assert gate.steps == [1, 2, 3]
        assert [record.message.split(":")[0].split(" after")[0] for record in caplog.records] == ["training pauses", "training continues"]

    def test_a_checkpoint_larger_than_the_bound_waits_in_memory(self, gate: Gate, spool: Path):
        with UploadQueue(gate.commit, limit_bytes=SIZE // 2, folder=spool) as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            second = in_thread(queue, checkpoint(2))
            assert blocked(second)
            assert on_disk(spool) == 0
            gate.opened.set()
            second.join(30)
        assert gate.steps == [1, 2]

    @pytest.mark.parametrize("seed", range(5))
    def test_at_any_speed_the_bound_holds_and_no_entry_is_lost(self, gate: Gate, spool: Path, seed: int):
        most, stop = [0], threading.Event()

        def watch() -> None:
            while not stop.is_set():
                most[0] = max(most[0], sum(_size(Path(folder, name)) for folder, _, names in os.walk(spool) for name in names))

        watcher = threading.Thread(target=watch)
        watcher.start()
        gate.opened.set()
        try:
            with UploadQueue(gate.commit, limit_bytes=2 * SIZE, folder=spool) as queue:
                for step in range(1, 60):
                    queue.submit(checkpoint(step, score=float(step * 7919 * (seed + 1) % 101)))
        finally:
            stop.set()
            watcher.join()
        assert gate.steps == sorted(gate.steps)
        assert gate.steps[-1] == 59
        assert gate.epochs == list(range(1, 60))
        assert 0 < most[0] <= 2 * SIZE
        assert all(committed.files == checkpoint(committed.step).files for committed in gate.committed)

    def test_a_full_disk_pauses_and_loses_nothing(self, gate: Gate, small_disk: Path, caplog: pytest.LogCaptureFixture):
        with UploadQueue(gate.commit, limit_bytes=2**30, folder=small_disk) as queue:
            queue.submit(checkpoint(1, score=0.1, size=300_000))
            gate.arrive()
            queue.submit(checkpoint(2, score=0.9, size=300_000))
            third = in_thread(queue, checkpoint(3, score=0.2, size=300_000))
            assert blocked(third)
            assert on_disk(small_disk) == 300_000  # no part of the third
            assert queue.waiting == 3
            gate.opened.set()
            third.join(30)
            assert queue.flush(timeout_s=30)
            queue.submit(checkpoint(4, score=0.3, size=300_000))
        assert gate.steps == gate.epochs == [1, 2, 3, 4]
        assert [len(committed.files["model.safetensors"]) for committed in gate.committed] == [299_990] * 4
        assert f"[Errno {errno.ENOSPC}]" in caplog.text
        assert not list(small_disk.iterdir())

    def test_an_unwritable_folder_only_pauses_training(self, gate: Gate, tmp_path: Path):
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=tmp_path / "missing") as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            second = in_thread(queue, checkpoint(2))
            assert blocked(second)
            gate.opened.set()
            second.join(30)
        assert gate.steps == [1, 2]


class TestCoalescing:
    @pytest.mark.parametrize(
        ("scores", "steps"),
        [
            ([0.5, 0.4, 0.3], [1, 2, 4]),  # the best and the newest of those that wait; 1 is being committed
            ([0.3, 0.4, 0.5], [1, 4]),
            ([0.3, 0.9, 0.1, 0.2, 0.5], [1, 3, 6]),
            ([0.5, 0.5, 0.5], [1, 2, 4]),  # ties: the earliest, as in the manifest
            ([None, None, None, 0.2, None], [1, 5, 6]),
            ([None, None, None], [1, 4]),
            ([-0.5, -0.9, 0.0, -0.1], [1, 4, 5]),
            ([0.3, 0.2], [1, 2, 3]),  # two may wait
        ],
    )
    def test_after_an_outage_only_the_best_and_the_newest_are_uploaded_with_all_entries(
        self, gate: Gate, spool: Path, scores: Sequence[float | None], steps: list[int]
    ):
        with UploadQueue(gate.commit, limit_bytes=2 * SIZE if len(scores) > 2 else ROOMY, folder=spool) as queue:
            queue.submit(checkpoint(1, score=0.0))
            gate.arrive()
            for step, score in enumerate(scores, start=2):
                queue.submit(checkpoint(step, score=score))
                assert on_disk(spool) <= 2 * SIZE
            gate.opened.set()
        assert gate.steps == steps
        assert gate.epochs == [1, *(step for step, score in enumerate(scores, start=2) if score is not None)]
        for committed in gate.committed:
            assert committed.files == checkpoint(committed.step).files
            assert all(entry.step <= committed.step for entry in committed.entries)

    def test_an_hour_without_the_store_never_pauses_training(self, gate: Gate, spool: Path, caplog: pytest.LogCaptureFixture):
        with UploadQueue(gate.commit, limit_bytes=2 * SIZE, folder=spool) as queue:
            for step in range(1, 200):
                queue.submit(checkpoint(step, score=1 / step))
                gate.arrive() if step == 1 else None
            assert queue.waiting == 3
            gate.opened.set()
        assert gate.steps == [1, 2, 199]
        assert gate.epochs == list(range(1, 200))
        assert "pauses" not in caplog.text


class TestErrors:
    def fail(self, checkpoint: PendingCheckpoint) -> None:
        raise Fenced(f"step {checkpoint.step}")

    def test_an_error_of_a_commit_is_raised_by_every_later_call_and_stops_all_commits(self, gate: Gate, spool: Path):
        def once(checkpoint: PendingCheckpoint) -> None:
            gate.commit(checkpoint)
            raise Fenced("step 1")

        queue = UploadQueue(once, limit_bytes=ROOMY, folder=spool)
        with queue_that_ends_with(queue, Fenced):
            queue.submit(checkpoint(1))
            gate.arrive()
            queue.submit(checkpoint(2))
            queue.submit(checkpoint(3))
            gate.opened.set()
            with pytest.raises(Fenced, match="step 1"):
                queue.flush(timeout_s=30)
            with pytest.raises(Fenced, match="step 1"):
                queue.submit(checkpoint(4))
            assert queue.waiting == 0
            assert on_disk(spool) == 0
        assert gate.steps == [1]

    def test_an_error_is_raised_on_leaving_at_the_latest(self, spool: Path):
        with pytest.raises(Fenced, match="step 1"), UploadQueue(self.fail, limit_bytes=ROOMY, folder=spool) as queue:
            queue.submit(checkpoint(1))

    def test_an_error_ends_a_pause(self, gate: Gate, spool: Path):
        def late(checkpoint: PendingCheckpoint) -> None:
            gate.commit(checkpoint)
            raise StoreUnavailable("gone for good")

        queue = UploadQueue(late, limit_bytes=SIZE, folder=spool)
        with queue_that_ends_with(queue, StoreUnavailable):
            queue.submit(checkpoint(1))
            gate.arrive()
            queue.submit(checkpoint(2))
            threading.Timer(0.5, gate.opened.set).start()
            with pytest.raises(StoreUnavailable):
                queue.submit(checkpoint(3))
        assert gate.steps == [1]

    def test_after_an_exception_the_running_commit_ends_and_the_rest_is_dropped(self, gate: Gate, spool: Path, caplog):
        def interrupted() -> None:
            with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as queue:
                queue.submit(checkpoint(1))
                gate.arrive()
                queue.submit(checkpoint(2))
                queue.submit(checkpoint(3))
                threading.Timer(0.5, gate.opened.set).start()
                raise FloatingPointError("diverged")

        with pytest.raises(FloatingPointError, match="diverged"):
            interrupted()
        assert gate.steps == [1]
        assert "not committed: the checkpoints of steps 2, 3" in caplog.text

    def test_an_error_of_a_commit_does_not_mask_an_exception(self, spool: Path, caplog: pytest.LogCaptureFixture):
        def diverged() -> None:
            with UploadQueue(self.fail, limit_bytes=ROOMY, folder=spool) as queue:
                queue.submit(checkpoint(1))
                wait_until(lambda: queue.waiting == 0, deadline_s=30, what="the error")
                raise FloatingPointError("diverged")

        with pytest.raises(FloatingPointError, match="diverged"):
            diverged()
        assert "the last checkpoint was not committed: step 1" in caplog.text

    def test_a_missing_spooled_file_is_an_error_and_not_a_checkpoint(self, gate: Gate, spool: Path):
        queue = UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool)
        with queue_that_ends_with(queue, StoreUnavailable):
            queue.submit(checkpoint(1))
            gate.arrive()
            queue.submit(checkpoint(2))
            (lost,) = spool.rglob("state.pt")
            lost.unlink()
            gate.opened.set()
        assert gate.steps == [1]


class TestConclusion:
    def test_the_last_checkpoint_is_committed_after_all_others(self, gate: Gate, spool: Path):
        with suppress(Preempted), UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as queue:
            queue.submit(checkpoint(1, score=0.5))
            gate.arrive()
            queue.submit(checkpoint(2, score=0.4))
            threading.Timer(0.5, gate.opened.set).start()
            assert queue.conclude(checkpoint(3), within_s=30)
            raise Preempted
        assert (gate.steps, gate.epochs) == ([1, 2, 3], [1, 2])

    def test_without_a_last_checkpoint_it_waits_for_what_was_submitted(self, gate: Gate, spool: Path):
        with suppress(Preempted), UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool) as queue:
            queue.submit(checkpoint(1))
            threading.Timer(0.5, gate.opened.set).start()
            assert queue.conclude(None, within_s=30)
            raise Preempted
        assert gate.steps == [1]

    @pytest.mark.parametrize("limit_bytes", [ROOMY, SIZE // 2], ids=["room", "no room"])
    def test_an_unavailable_store_is_not_waited_for(self, gate: Gate, spool: Path, caplog, limit_bytes: int):
        since_s = time.monotonic()
        with suppress(Preempted), UploadQueue(gate.commit, limit_bytes=limit_bytes, folder=spool) as queue:
            queue.submit(checkpoint(1))
            gate.arrive()
            assert not queue.conclude(checkpoint(2), within_s=0.5)
            raise Preempted
        assert time.monotonic() - since_s < 10
        assert "not committed: the checkpoints of steps 2" in caplog.text
        gate.opened.set()

    def test_an_error_of_a_commit_is_raised(self, spool: Path):
        def refuse(checkpoint: PendingCheckpoint) -> None:
            raise Fenced(f"step {checkpoint.step}")

        with pytest.raises(Fenced, match="step 7"), UploadQueue(refuse, limit_bytes=ROOMY, folder=spool) as queue:
            queue.conclude(checkpoint(7), within_s=30)


class TestLeftovers:
    def test_the_folder_of_a_killed_process_is_deleted_and_that_of_a_living_one_kept(self, gate: Gate, spool: Path):
        code = f"""
import pathlib, threading, time
from orchestration.record.upload_queue import UploadQueue, PendingCheckpoint
def checkpoint(step): return PendingCheckpoint(step=step, epoch=0, files={{"a": bytes(1000)}}, entries=(), seconds=0.0, at_s=0.0)
arrived = threading.Event()
def commit(checkpoint): arrived.set(); time.sleep(300)
with UploadQueue(commit, limit_bytes=10**6, folder=pathlib.Path({str(spool)!r})) as queue:
    queue.submit(checkpoint(1)); arrived.wait(30); queue.submit(checkpoint(2)); print("ready", flush=True); time.sleep(300)
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
        (spool / "rrn-sweep-outbox-husk").mkdir()  # killed before it locked the folder
        (spool / "another's").mkdir()
        with UploadQueue(gate.commit, limit_bytes=ROOMY, folder=spool):
            assert [path.name for path in spool.iterdir()] == ["another's"]
        (spool / "another's").rmdir()


class TestStore:
    @pytest.mark.slow
    def test_a_restarted_server_gets_the_best_and_the_newest(self, tmp_path_factory, monkeypatch, spool: Path):
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            store = open_store(f"s3://rrn-test/{uuid.uuid4().hex}", deadline_s=120)
            committed: list[PendingCheckpoint] = []

            def commit(checkpoint: PendingCheckpoint) -> None:
                store.write(f"{checkpoint.step}/model", checkpoint.files["model.safetensors"])
                committed.append(checkpoint)

            with UploadQueue(commit, limit_bytes=ROOMY, folder=spool) as queue:
                queue.submit(checkpoint(1, score=0.1))
                assert queue.flush(timeout_s=60)
                server.kill()
                started = time.monotonic()
                for step, score in ((2, 0.2), (3, 0.9), (4, 0.4), (5, 0.5)):
                    queue.submit(checkpoint(step, score=score))
                    time.sleep(0.2)
                assert time.monotonic() - started < 30  # none of them waited for the store
                assert not queue.flush(timeout_s=1.0)
                server.launch()
            assert [checkpoint.step for checkpoint in committed] == [1, 2, 3, 5]
            assert [entry.epoch for checkpoint in committed for entry in checkpoint.entries] == [1, 2, 3, 4, 5]
            assert list(store.keys("")) == [f"{step}/model" for step in (1, 2, 3, 5)]
        finally:
            server.kill()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # deleted since it was listed
        return 0
