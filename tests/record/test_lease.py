"""lease.py: one driver per sweep, whichever driver dies, whatever the clocks show, and during an outage of the store."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import new_s3_server, set_environment
from places import ROOT
from servers import ForgetfulProxy, fresh_s3, wait_until

from orchestration.errors import LeaseHeld, LeaseLost, StoreError
from orchestration.record import lease as lease_module
from orchestration.record import process
from orchestration.record.lease import LastSeen, Lease, current_token
from orchestration.store.base import Store
from orchestration.store.directory import DirectoryStore
from orchestration.store.open import open_store

KEY = "demo/lease.json"
DAY_MS = 86_400_000


@pytest.fixture(autouse=True)
def no_lease_thread_is_left() -> Iterator[None]:
    yield
    wait_until(lambda: not lease_threads(), deadline_s=15, what="the end of all lease threads")


def lease_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "lease"]


def acquire(store: Store, **options) -> Lease:
    return Lease.acquire(store, "demo", **{"every_s": 0.1, "patience_s": 1.0, "say": print, **options})


def record_of(store: Store) -> dict:
    return json.loads(store.read(KEY)[0])


def beats(store: Store, more: int = 2) -> None:
    """Wait for more heartbeats of the present holder."""
    first = record_of(store)["beat"]
    wait_until(lambda: record_of(store)["beat"] >= first + more, deadline_s=20, what="heartbeats")


def is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except LeaseLost:
        return True
    return False


def foreign_record(store: Store, *, every_s: float = 0.1, **changes) -> None:
    """Leave the record of a driver on another host that was killed."""
    with acquire(store) as lease:
        lease.see("trial-1", 3, 12.5)
    record = {**record_of(store), "released": False, "every_s": every_s, "writer": "another", **changes}
    record["holder"] |= {"host": "far-away", "boot": "other"}
    store.write(KEY, json.dumps(record).encode())


@contextmanager
def driver_process(store: Store) -> Iterator[subprocess.Popen[str]]:
    """A driver in its own process. Holds the lease until it is killed."""
    code = f"""
import time
from orchestration.record.lease import Lease
from orchestration.store.open import open_store
lease = Lease.acquire(open_store({store.uri!r}), "demo", every_s=0.1, say=print)
lease.see("trial-1", 2, 7.5)
time.sleep(0.5)
print("ready", flush=True)
time.sleep(300)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@contextmanager
def elsewhere() -> Iterator[None]:
    """A lease acquired in this context belongs to another host: its process cannot be checked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "far-away")
        yield


@dataclass(frozen=True)
class HeldUp(DirectoryStore):
    """A store whose reads return only while the gate is open."""

    gate: threading.Event

    def read(self, key: str) -> tuple[bytes, str]:
        result = super().read(key)
        self.gate.wait(60)
        return result


class TestTokens:
    def test_a_sweep_without_a_driver_has_token_0(self, store: Store):
        assert current_token(store, "demo") == 0

    def test_tokens_grow_by_one_at_each_release_death_and_take_over(self, store: Store):
        with acquire(store) as first:
            assert (first.token, current_token(store, "demo"), first.took_over) == (1, 1, None)
        assert current_token(store, "demo") == 1
        foreign_record(store)
        assert current_token(store, "demo") == 2
        with acquire(store) as stale:
            assert stale.token == 3
            with acquire(store, take_over=True) as taken:
                assert (taken.token, current_token(store, "demo")) == (4, 4)
        assert current_token(store, "demo") == 4

    def test_after_a_deleted_record_the_token_is_above_those_of_the_manifests(self, store: Store):
        with acquire(store, above=7) as lease:
            assert lease.token == 8

    def test_an_invalid_record_is_one_clear_line_and_stays(self, store: Store):
        for garbled in (b"", b"{", b"[]", b'{"token": 3}', b"\xff"):
            store.write(KEY, garbled)
            for call in (lambda: acquire(store), lambda: acquire(store, take_over=True), lambda: current_token(store, "demo")):
                with pytest.raises(StoreError, match=f"{KEY}: not a lease .*delete the key") as caught:
                    call()
                assert "\n" not in str(caught.value)
            assert store.read(KEY)[0] == garbled


class TestHolders:
    @pytest.mark.parametrize("take_over", [False, True])
    def test_of_eight_that_acquire_at_once_exactly_one_wins(self, store: Store, take_over: bool):
        barrier = threading.Barrier(8)

        def race(_: int) -> Lease | LeaseHeld:
            barrier.wait(30)
            try:
                return acquire(store, take_over=take_over, every_s=1.0)
            except LeaseHeld as held:
                return held

        with ThreadPoolExecutor(8) as pool, ExitStack() as held:
            for token in (1, 2):  # a new record, then a released one
                results = list(pool.map(race, range(8)))
                winners = [held.enter_context(result) for result in results if isinstance(result, Lease)]
                # a driver that reads after the winner wrote asks for the winner's lease, and gets it by --take-over
                living = [lease for lease in winners if lease.token == current_token(store, "demo")]
                assert len(living) == 1
                if not take_over:
                    assert [lease.token for lease in winners] == [token]
                held.close()

    def test_with_a_living_driver_on_this_host_the_lease_is_refused_at_once_with_advice(self, store: Store):
        with acquire(store) as lease:
            started = time.monotonic()
            with pytest.raises(
                LeaseHeld, match=rf"demo: .*pid {os.getpid()} on .*last heartbeat: 20.*wait .*stop it.*--take-over"
            ) as caught:
                acquire(store, patience_s=60)
            assert time.monotonic() - started < 30
            assert "\n" not in str(caught.value)
            lease.check()

    def test_a_driver_on_another_host_is_alive_once_it_beats(self, store: Store):
        lines: list[str] = []
        with elsewhere():
            lease = acquire(store)
        with lease:
            started = time.monotonic()
            with pytest.raises(LeaseHeld, match="on far-away holds the lease"):
                acquire(store, patience_s=60, say=lines.append)
            assert time.monotonic() - started < 45
            lease.check()
        assert len(lines) == 1
        assert "waiting up to 60 s for a heartbeat" in lines[0]

    def test_the_lease_of_a_killed_driver_on_this_host_is_taken_at_once(self, store: Store):
        with driver_process(store) as driver:
            with pytest.raises(LeaseHeld, match=f"pid {driver.pid}"):
                acquire(store)
            driver.kill()  # not reaped yet: a zombie is dead too
            wait_until(lambda: process._state(driver.pid)[0] == "Z", deadline_s=10, what="its death")
            with acquire(store, patience_s=3600, say=pytest.fail) as successor:
                assert (
                    successor.took_over == f"sweep demo: the driver with pid {driver.pid} on {socket.gethostname()} is dead; took its lease"
                )
                assert successor.previous == {"trial-1": LastSeen(attempt=2, worked_s=7.5)}
                driver.wait(10)

    def test_a_pid_that_now_belongs_to_another_process_is_dead(self, store: Store):
        with acquire(store):
            pass
        record = record_of(store)
        record["holder"]["started"] = "1"
        store.write(KEY, json.dumps({**record, "released": False}).encode())
        with acquire(store, patience_s=3600, say=pytest.fail) as successor:
            assert "is dead" in successor.took_over

    def test_a_holder_without_heartbeats_is_dead_after_the_patience_if_it_cannot_be_checked(self, store: Store):
        foreign_record(store)
        lines: list[str] = []
        started = time.monotonic()
        with acquire(store, patience_s=2.0, say=lines.append) as successor:
            assert time.monotonic() - started >= 1.9
            assert "far-away sent no heartbeat for 2 s" in successor.took_over
        assert len(lines) == 1

    def test_a_holder_with_slow_heartbeats_is_given_three(self, store: Store):
        foreign_record(store, every_s=0.8)
        started = time.monotonic()
        with acquire(store, patience_s=0.1):
            assert time.monotonic() - started >= 2.3

    def test_a_lease_that_is_released_while_it_is_watched_is_taken(self, store: Store):
        with elsewhere():
            lease = acquire(store, every_s=30.0)
        threading.Timer(1.0, lease.release).start()
        with acquire(store, patience_s=60) as successor:
            assert (successor.token, successor.took_over) == (2, None)

    @pytest.mark.parametrize("jump_ms", [DAY_MS, -DAY_MS, -(10**15), 10**18])
    def test_no_wall_clock_decides(self, store: Store, jump_ms: int):
        now_ms = [10**12]
        with elsewhere():
            lease = acquire(store, now_ms=lambda: now_ms[0])
        with lease:
            now_ms[0] += jump_ms
            beats(store)
            with pytest.raises(LeaseHeld, match=r"UTC by its own clock|an unknown time"):
                acquire(store, patience_s=20)
            lease.check()
        foreign_record(store, beat_ms=10**12 + jump_ms)
        started = time.monotonic()
        with acquire(store, patience_s=1.0):
            assert time.monotonic() - started >= 0.9


class TestHeartbeats:
    def test_a_take_over_fences_the_old_holder_permanently(self, store: Store, caplog: pytest.LogCaptureFixture):
        with acquire(store) as old:
            old.check()
            with acquire(store, take_over=True) as successor:
                assert "took the lease from the driver with pid" in successor.took_over
                wait_until(lambda: is_lost(old), deadline_s=20, what="the loss")
                beats(store)
                successor.check()
            with pytest.raises(
                LeaseLost, match=r"demo: the driver with pid .* took the lease \(its token: 2, ours: 1\); this driver stops"
            ):
                old.check()
            assert record_of(store)["released"]
        assert (record_of(store)["token"], record_of(store)["released"]) == (2, True)  # the old driver released nothing
        assert [record.levelname for record in caplog.records if record.name == "orchestration.record.lease"] == ["ERROR"]

    def test_reports_reach_the_next_driver_and_the_one_after_it(self, store: Store):
        with acquire(store) as lease:
            lease.see("a", 1, 2.5)
            lease.see("a", 1, 5.0)
            lease.see("b", 2, 1.0)
            lease.see("c", 1, 9.0)
            lease.forget("c")
            lease.forget("never seen")
            wait_until(lambda: set(record_of(store)["seen"]) == {"a", "b"}, deadline_s=20, what="the heartbeat")
            with acquire(store, take_over=True) as successor:
                assert successor.previous == {"a": LastSeen(attempt=1, worked_s=5.0), "b": LastSeen(attempt=2, worked_s=1.0)}
                successor.forget("a")
        with acquire(store) as last:
            assert last.previous == {"b": LastSeen(attempt=2, worked_s=1.0)}

    def test_threads_may_see_at_once(self, store: Store):
        with acquire(store, every_s=0.01) as lease:
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda n: lease.see(f"t{n % 50}", n, float(n)), range(2000)))
            beats(store)
            lease.check()
        assert len(record_of(store)["seen"]) == 50

    def test_release_is_idempotent_and_frees_the_lease_at_once(self, store: Store):
        lease = acquire(store, every_s=3600)
        for _ in range(3):
            lease.release()
        assert not lease_threads()
        with acquire(store, say=pytest.fail) as successor:
            assert successor.took_over is None
        lease.release()
        assert record_of(store)["token"] == 2

    def test_a_deleted_record_is_written_again(self, store: Store):
        with acquire(store) as lease:
            lease.see("a", 1, 2.5)
            store.delete([KEY])
            wait_until(lambda: KEY in store.keys("demo/"), deadline_s=20, what="the record")
            lease.check()
            beats(store)
            assert record_of(store)["token"] == lease.token

    def test_after_a_deletion_a_rival_takes_the_lease(self, store: Store):
        with acquire(store, above=5, every_s=2.0) as old:
            store.delete([KEY])
            with acquire(store) as rival:
                wait_until(lambda: is_lost(old), deadline_s=20, what="the loss")
                rival.check()

    def test_a_garbled_record_does_not_lose_the_lease_and_is_logged_once(self, store: Store, caplog: pytest.LogCaptureFixture):
        with acquire(store) as lease:
            store.write(KEY, b"{")
            time.sleep(1.0)
            lease.check()
            store.delete([KEY])
            wait_until(lambda: KEY in store.keys("demo/"), deadline_s=20, what="the record")
            beats(store)
        assert len([record for record in caplog.records if "not a lease" in record.message]) == 1


class TestOutages:
    def test_a_missing_folder_does_not_lose_the_lease(self, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        store = open_store(str(tmp_path / "store"))
        with acquire(store) as lease:
            beats(store)
            (tmp_path / "store").rename(tmp_path / "away")
            (tmp_path / "store").write_bytes(b"a file, where a folder should be")
            wait_until(lambda: "heartbeat failed" in caplog.text, deadline_s=20, what="the warning")
            time.sleep(0.5)
            lease.check()
            (tmp_path / "store").unlink()
            (tmp_path / "away").rename(tmp_path / "store")
            beats(store)
            lease.check()
        assert record_of(store)["released"]
        assert caplog.text.count("heartbeat failed") == 1

    @pytest.mark.slow
    def test_a_restarted_server_does_not_lose_the_lease_unless_a_rival_took_it(self, tmp_path_factory, monkeypatch, caplog):
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            store = open_store(f"s3://rrn-test/{uuid.uuid4().hex}", deadline_s=5.0)
            patient = open_store(store.uri, deadline_s=60)
            with acquire(store) as lease:
                lease.see("a", 1, 2.5)
                beats(store)
                server.kill()
                wait_until(lambda: "heartbeat failed" in caplog.text, deadline_s=30, what="the warning")
                lease.check()
                server.start()
                beats(patient)
                lease.check()
                server.kill()
                threading.Timer(1.0, server.launch).start()
                with acquire(patient, take_over=True) as rival:
                    assert rival.previous == {"a": LastSeen(attempt=1, worked_s=2.5)}
                    wait_until(lambda: is_lost(lease), deadline_s=60, what="the loss")
                    rival.check()
        finally:
            server.kill()

    def test_time_without_the_store_does_not_count_against_the_holder(self, tmp_path: Path):
        store = open_store(str(tmp_path))
        foreign_record(store)
        gate = threading.Event()
        gate.set()
        with ThreadPoolExecutor(1) as pool:
            watch = pool.submit(lease_module._changes_within, HeldUp(tmp_path, gate), KEY, store.read(KEY)[1], patience_s=2.0)
            time.sleep(0.5)
            gate.clear()
            time.sleep(3.0)  # longer than the patience, but no heartbeat could be read
            gate.set()
            store.write(KEY, json.dumps(record_of(store) | {"beat": 99}).encode())
            assert watch.result(30)

    def test_a_heartbeat_without_a_reply_does_not_prevent_the_release(self, forgetful: ForgetfulProxy):
        store = fresh_s3()
        lease = acquire(store, beats=open_store(store.uri, deadline_s=lease_module.BEAT_WITHIN_S))
        forgetful.silent, forgetful.lose_next_reply_to = True, b"PUT"
        wait_until(lambda: forgetful.replies_lost == 1, deadline_s=10, what="a heartbeat without a reply")
        lease.release()
        assert record_of(store)["released"]

    @pytest.mark.slow
    def test_release_is_bounded_while_the_store_hangs(self, tmp_path_factory, monkeypatch, caplog):
        monkeypatch.setattr(lease_module, "_RELEASE_WITHIN_S", 1.0)
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            lease = acquire(open_store(f"s3://rrn-test/{uuid.uuid4().hex}", deadline_s=8.0))
            server.kill()
            started = time.monotonic()
            lease.release()
            lease.release()
            assert time.monotonic() - started < 6
            assert "not released" in caplog.text
            wait_until(lambda: not lease_threads(), deadline_s=30, what="the end of the thread")
        finally:
            server.kill()


@dataclass(frozen=True)
class Unconditional(DirectoryStore):
    """A store that ignores the conditions of conditional puts while `ignoring` is set."""

    ignoring: threading.Event

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        if self.ignoring.is_set():
            self.write(key, body)
            return self.read(key)[1]
        return super().replace(key, body, expected=expected)


class TestConditions:
    def test_a_store_that_ignores_conditions_is_refused_and_the_lease_left_free(self, tmp_path: Path):
        ignoring = threading.Event()
        ignoring.set()
        store = Unconditional(tmp_path, ignoring)
        with pytest.raises(StoreError, match=r"ignores the condition of a conditional put \(If-Match\), .*guarantees.md"):
            acquire(store)
        assert record_of(store)["released"]
        ignoring.clear()
        with acquire(store) as lease:
            assert lease.token == 2

    def test_a_driver_stops_once_the_store_ignores_conditions(self, tmp_path: Path):
        ignoring = threading.Event()
        with acquire(Unconditional(tmp_path, ignoring)) as lease:
            beats(DirectoryStore(tmp_path))
            ignoring.set()
            wait_until(lambda: is_lost(lease), deadline_s=20, what="the loss")
            with pytest.raises(LeaseLost, match="ignores the condition of a conditional put; this driver stops"):
                lease.check()

    @pytest.mark.parametrize("header", ["If-Match", "If-None-Match"])
    def test_a_server_that_does_not_get_the_conditions_is_refused(self, s3_environment, header: str):
        store = fresh_s3()
        events = store._client().meta.events
        events.register("before-call.s3.PutObject", lambda params, **_: params["headers"].pop(header, None) and None)
        with pytest.raises(StoreError, match=f"ignores the condition of a conditional put .{header}."):
            acquire(store)

    def test_a_driver_that_slept_confirms_its_lease_from_the_store(self, tmp_path: Path):
        store = open_store(str(tmp_path))
        with acquire(store, every_s=3600) as asleep, acquire(store, take_over=True):
            asleep.confirm()  # its last heartbeat is young, so nothing is read
            asleep._beat_s -= 3 * 3600
            with pytest.raises(LeaseLost, match="its token: 2, ours: 1"):
                asleep.confirm()
