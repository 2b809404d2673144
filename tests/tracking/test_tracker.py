"""The tracker keeps MLflow equal to the store, on a real SQLite database and a real server."""

from __future__ import annotations

import logging
import shutil
import sqlite3
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from servers import MlflowServer, free_port, wait_until
from tracked_sweep import STORE, Sweep, attempt, content, expected_points, manifest

from orchestration.errors import StoreUnavailable, TrackingError
from orchestration.record.manifest import EpochMetrics, Manifest
from orchestration.tracking.tracker import Tracker

PARAMS = {
    "partition": "1/8",
    "seed": "3",
    "method": "rrn",
    "dataset": "digits",
    "backbone": "resnet50",
    "epochs": "32",
    "eps": "0.5",
    "lambda1": "1.0",
    "lambda2": "1.0",
    "lambda3": "0.1",
}
"""Of `manifest`: settings that vary, headline settings, and those that differ from the defaults."""


@pytest.fixture(scope="session")
def sqlite_uri(mlflow_database: Path) -> str:
    return f"sqlite:///{shutil.copy(mlflow_database, mlflow_database.with_name('direct.db'))}"


@pytest.fixture(params=["sqlite", "http"])
def sweep(request: pytest.FixtureRequest) -> Sweep:
    return Sweep(request.getfixturevalue("sqlite_uri") if request.param == "sqlite" else request.getfixturevalue("mlflow_server").uri)


@pytest.fixture
def local_sweep(sqlite_uri: str) -> Sweep:
    return Sweep(sqlite_uri)


class TestViewOfTheStore:
    """On a database and on a server."""

    def test_a_growing_trial_is_one_run_with_every_point_once_and_in_order(self, sweep: Sweep) -> None:
        for epochs in (1, 3, 6):
            sweep.track(manifest(epochs))
        assert sweep.points(sweep.run()) == expected_points(6)
        assert sweep.run().info.end_time == manifest(6).updated_ms

    def test_replaying_everything_adds_nothing(self, sweep: Sweep) -> None:
        sweep.track(manifest(3), manifest(2, trial_id="def", seed=4, status="finished"))
        before = [(run.to_dictionary(), sweep.points(run)) for run in sweep.runs()]
        sweep.track()
        after = [(run.to_dictionary(), sweep.points(run)) for run in sweep.runs()]
        assert after == before
        assert len(after) == 2

    def test_a_driver_that_dies_between_points_and_their_tag_stores_no_point_twice(self, sweep: Sweep) -> None:
        sweep.track(manifest(3))
        sweep.client.set_tag(sweep.run().info.run_id, "rrn.logged_epoch", "1")
        sweep.track(manifest(4))
        assert sweep.points(sweep.run()) == expected_points(4)
        assert sweep.run().data.tags["rrn.logged_epoch"] == "4"

    def test_an_interrupted_trial_is_killed_then_runs_again_and_finishes_in_the_same_run(self, sweep: Sweep) -> None:
        sweep.track(manifest(1))
        killed = sweep.run()
        assert (killed.info.status, killed.info.end_time) == ("KILLED", manifest(1).updated_ms)
        assert sweep.parent().info.status == "KILLED"
        tracker = sweep.tracker()
        tracker.start(["abc"])
        wait_until(lambda: sweep.run().info.status == "RUNNING", deadline_s=20, what="RUNNING")
        assert sweep.parent().info.status == "RUNNING"
        sweep.put(manifest(2, status="finished", attempt=2))
        tracker.notify("abc")
        wait_until(lambda: sweep.run().info.status == "FINISHED", deadline_s=20, what="FINISHED")
        assert tracker.close(timeout_s=20) == []
        done = sweep.run()
        assert (done.info.run_id, done.info.end_time) == (killed.info.run_id, manifest(2).updated_ms)
        assert sweep.parent().info.status == "FINISHED"

    def test_a_failed_trial_has_its_reason_until_it_runs_again(self, sweep: Sweep) -> None:
        sweep.track(manifest(1, status="failed", reason="RuntimeError: out of memory\n" + "x" * 9000))
        assert sweep.run().info.status == sweep.parent().info.status == "FAILED"
        assert sweep.run().data.tags["reason"].startswith("RuntimeError: out of memory")
        sweep.track(manifest(1, attempt=2))
        assert sweep.run().info.status == "KILLED"
        assert "reason" not in sweep.run().data.tags

    def test_classes_of_failures_and_the_effort_of_every_attempt_are_shown(self, sweep: Sweep) -> None:
        lost = manifest(1, attempts=(attempt(1, "lost"),), failure="lost", reason="node lost")
        sweep.track(lost)
        tags = sweep.run().data.tags
        assert (tags["failure"], tags["reason"], tags["attempts"]) == ("lost", "node lost", "1: lost")
        again = (*lost.attempts, attempt(2, "memory", useful_s=0.0, repeated_s=4.0))
        sweep.track(manifest(1, attempt=2, attempts=again, status="failed", failure="memory", reason="too little"))
        assert (sweep.run().data.tags["failure"], sweep.run().info.status) == ("memory", "FAILED")
        sweep.track(manifest(2, attempt=3, attempts=(*again, attempt(3, "finished", lost_s=0.0)), status="finished"))
        tags = sweep.run().data.tags
        assert (tags["attempt"], tags["attempts"]) == ("3", "3: lost, memory, finished")
        assert not tags.keys() & {"failure", "reason"}
        ended = [5000 * number + 1_700_000_000_000 for number in (1, 2, 3)]
        assert {name: points for name, points in sweep.points(sweep.run()).items() if name.startswith("effort/")} == {
            "effort/useful_s": list(zip((1, 2, 3), (1.0, 1.0, 2.0), ended, strict=True)),
            "effort/repeated_s": list(zip((1, 2, 3), (0.0, 4.0, 4.0), ended, strict=True)),
            "effort/lost_s": list(zip((1, 2, 3), (1.0, 2.0, 2.0), ended, strict=True)),
        }

    def test_a_deleted_run_is_rebuilt_completely(self, sweep: Sweep) -> None:
        sweep.track(manifest(3, status="finished"))
        before = sweep.run()
        sweep.client.delete_run(before.info.run_id)
        sweep.track()
        after = sweep.run()
        assert after.info.run_id != before.info.run_id
        assert (after.data.params, after.data.tags, after.info.start_time, after.info.end_time) == (
            before.data.params,
            before.data.tags,
            before.info.start_time,
            before.info.end_time,
        )
        assert sweep.points(after) == expected_points(3)

    def test_a_run_deleted_while_its_trial_runs_is_rebuilt_at_the_next_epoch(self, sweep: Sweep) -> None:
        sweep.put(manifest(2))
        tracker = sweep.tracker()
        tracker.start(["abc"])
        wait_until(lambda: [r for r in sweep.runs() if r.data.tags.get("rrn.logged_epoch") == "2"] != [], deadline_s=20, what="2 epochs")
        sweep.client.delete_run(sweep.run().info.run_id)
        sweep.put(manifest(3))
        tracker.notify("abc")
        assert tracker.close(timeout_s=20) == []
        assert sweep.points(sweep.run()) == expected_points(3)

    def test_a_deleted_experiment_is_restored(self, sweep: Sweep) -> None:
        sweep.track(manifest(1))
        sweep.client.delete_experiment(sweep.parent().info.experiment_id)
        sweep.track(manifest(2))
        assert sweep.points(sweep.run()) == expected_points(2)

    def test_parameters_are_the_settings_that_distinguish_trials_once(self, sweep: Sweep) -> None:
        sweep.track(manifest(1))
        sweep.track(manifest(2))
        assert sweep.run().data.params == PARAMS

    def test_a_run_whose_driver_died_before_its_parameters_gets_them(self, sweep: Sweep) -> None:
        sweep.track()
        tags = {"rrn.kind": "trial", "trial_id": "abc"}
        bare = sweep.client.create_run(sweep.parent().info.experiment_id, start_time=manifest(1).created_ms, tags=tags)
        sweep.track(manifest(1))
        assert sweep.run().info.run_id == bare.info.run_id
        assert sweep.run().data.params == PARAMS

    def test_trials_nest_under_the_sweep_and_are_found_by_partition(self, sweep: Sweep) -> None:
        sweep.track(manifest(1), manifest(1, trial_id="def", seed=4))
        parent = sweep.parent()
        children = sweep.runs("tags.partition = '1/8'")
        assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
        assert sorted(run.info.run_name for run in children) == ["1/8 seed 3", "1/8 seed 4"]
        assert parent.info.run_name == sweep.name
        assert "what it is for" in parent.data.tags["mlflow.note.content"]

    def test_of_two_runs_of_a_trial_the_oldest_counts_and_the_other_is_superseded(self, sweep: Sweep) -> None:
        sweep.track(manifest(1))
        first = sweep.run()
        sweep.client.create_run(
            first.info.experiment_id, start_time=manifest(1).created_ms + 5, tags={"rrn.kind": "trial", "trial_id": "abc"}
        )
        sweep.track(manifest(2))
        assert sweep.run().info.run_id == first.info.run_id
        assert sweep.run("tags.`rrn.kind` = 'superseded'").info.status == "KILLED"

    def test_runs_that_a_dead_driver_left_running_get_their_real_status(self, sweep: Sweep) -> None:
        sweep.put(*(manifest(1, trial_id=trial_id, seed=seed) for seed, trial_id in enumerate(("abc", "def", "ghi", "gone"))))
        dead = sweep.tracker()
        dead.start(list(sweep.store))
        wait_until(lambda: len([run for run in sweep.runs() if "rrn.logged_epoch" in run.data.tags]) == 4, deadline_s=20, what="4 runs")
        dead.abandon()
        sweep.put(manifest(2, trial_id="def", seed=4, status="finished"))
        del sweep.store["gone"]
        successor = sweep.tracker()
        successor.start(["abc"])
        expected = {"abc": "RUNNING", "def": "FINISHED", "ghi": "KILLED", "gone": "KILLED"}
        wait_until(
            lambda: {run.data.tags["trial_id"]: run.info.status for run in sweep.runs()} == expected,
            deadline_s=20,
            what="their real status",
        )
        assert successor.close(timeout_s=20) == []
        assert {run.data.tags["trial_id"]: run.info.status for run in sweep.runs()} == expected | {"abc": "KILLED"}

    def test_a_backlog_larger_than_one_batch_arrives_complete(self, sweep: Sweep) -> None:
        sweep.track(manifest(230))
        assert sweep.points(sweep.run()) == expected_points(230)


class TestOutages:
    @pytest.mark.slow
    def test_a_server_killed_while_logging_gets_everything_when_it_is_back(
        self, mlflow_database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        server = MlflowServer(Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db")))
        try:
            server.start()
            sweep = Sweep(server.uri)
            tracker = sweep.tracker()
            tracker.start(["abc"])
            for epoch in range(1, 15):
                sweep.put(manifest(epoch))
                tracker.notify("abc")
                time.sleep(0.05)
            server.kill()
            sweep.put(manifest(40, status="finished"), manifest(2, trial_id="def", seed=4, status="finished"))
            tracker.notify("def")  # the only notification of this trial falls into the outage
            tracker.notify("abc")
            wait_until(lambda: "does not answer" in caplog.text, deadline_s=20, what="the warning")
            server.start()
            wait_until(lambda: [run.info.status for run in sweep.runs()] == ["FINISHED"] * 2, deadline_s=60, what="FINISHED")
            assert tracker.close(timeout_s=60) == []
            assert sweep.points(sweep.run("tags.trial_id = 'abc'")) == expected_points(40)
            assert sweep.points(sweep.run("tags.trial_id = 'def'")) == expected_points(2)
            assert sweep.parent().info.status == "FINISHED"
            away, back = [record.message for record in caplog.records if record.levelno == logging.WARNING]
            assert away.startswith(f"MLflow at {server.uri} does not answer; the sweep continues, tracking catches up later: ")
            assert back == "MLflow answers again and is up to date"
            self.killed_before_the_end(server, sweep)
        finally:
            server.kill()

    def killed_before_the_end(self, server: MlflowServer, sweep: Sweep) -> None:
        """The trial is finished and its run complete, but the sweep's own run cannot be closed: MLflow is incomplete."""
        tracker = sweep.tracker()
        tracker.start(["abc"])
        wait_until(lambda: sweep.parent().info.status == "RUNNING", deadline_s=20, what="RUNNING")
        wait_until(lambda: "abc" in tracker._settled, deadline_s=20, what="abc")
        server.kill()
        assert tracker.close(timeout_s=3) == ["abc"]

    def test_without_a_server_nothing_blocks_and_close_returns_what_is_missing(self, caplog: pytest.LogCaptureFixture) -> None:
        uri = f"http://user:secret@127.0.0.1:{free_port()}"
        tracker = tracker_of(uri)
        tracker.start(["abc"])
        began = time.monotonic()
        for i in range(2000):
            tracker.notify(f"t{i % 5}")
        assert time.monotonic() - began < 0.5
        began = time.monotonic()
        assert sorted(tracker.close(timeout_s=2)) == ["abc", "t0", "t1", "t2", "t3", "t4"]
        assert time.monotonic() - began < 3
        assert tracker.comparison_url is None
        assert "MLflow lacks something of 6 of 6 trials" in caplog.messages[-1]
        assert sum("does not answer" in text for text in caplog.messages) <= 1
        assert "secret" not in caplog.text

    def test_a_server_that_refuses_turns_tracking_off_with_one_line(self, caplog: pytest.LogCaptureFixture) -> None:
        with forbidding_server() as uri:
            tracker = tracker_of(uri)
            tracker.start(["abc"])
            assert tracker.close(timeout_s=20) == ["abc"]
        assert not tracker._thread.is_alive()
        assert "MLflow refused" in caplog.messages[0]
        assert "not for you" in caplog.messages[0]

    @pytest.mark.parametrize("fault", ["newer schema", "no database", "no folder"])
    def test_a_database_that_cannot_be_used_turns_tracking_off_with_one_line(
        self, fault: str, mlflow_database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "mlflow.db"
        if fault == "newer schema":
            shutil.copy(mlflow_database, path)
            with sqlite3.connect(path) as connection:
                connection.execute("UPDATE alembic_version SET version_num = 'f00f00f00f00'")
            connection.close()
        elif fault == "no database":
            path.write_text("MLflow was here" * 100)
        else:
            (tmp_path / "file").touch()
            path = tmp_path / "file" / "mlflow.db"
        tracker = tracker_of(f"sqlite:///{path}")
        tracker.start(["abc"])
        assert tracker.close(timeout_s=20) == ["abc"]
        assert not tracker._thread.is_alive()
        assert f"cannot use the MLflow database sqlite:///{path}" in caplog.messages[0]

    def test_a_store_that_does_not_answer_delays_only_its_trial(self, local_sweep: Sweep, caplog: pytest.LogCaptureFixture) -> None:
        def read(trial_id: str) -> Manifest | None:
            if trial_id == "bad":
                raise StoreUnavailable("no answer")
            return local_sweep.store[trial_id]

        local_sweep.put(manifest(2, status="finished"))
        tracker = local_sweep.tracker(read=read)
        tracker.start(["bad", "abc"])
        assert tracker.close(timeout_s=20) == ["bad"]
        assert local_sweep.points(local_sweep.run()) == expected_points(2)
        assert "trial bad: not updated in MLflow for now: no answer" in caplog.text

    def test_a_trial_that_mlflow_refuses_affects_no_other(self, local_sweep: Sweep, caplog: pytest.LogCaptureFixture) -> None:
        odd = EpochMetrics(epoch=1, step=1, time_ms=1, metrics={"val/miou": 1.0, "not a key ?!": 2.0})
        local_sweep.put(manifest(1, trial_id="odd", seed=4, history=(odd,)), manifest(2))
        tracker = local_sweep.tracker()
        tracker.start(["odd", "abc"])
        assert tracker.close(timeout_s=20) == ["odd"]
        assert local_sweep.points(local_sweep.run("tags.trial_id = 'abc'")) == expected_points(2)
        assert sum("trial odd: MLflow refused it" in text for text in caplog.messages) == 1


class TestTracker:
    def test_many_threads_may_notify(self, local_sweep: Sweep) -> None:
        tracker = local_sweep.tracker()
        tracker.start([])

        def trial(number: int) -> None:
            for epoch in range(1, 11):
                local_sweep.put(manifest(epoch, trial_id=f"t{number}", seed=number, status="finished" if epoch == 10 else "running"))
                tracker.notify(f"t{number}")

        threads = [threading.Thread(target=trial, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tracker.close(timeout_s=30) == []
        assert [run.info.status for run in local_sweep.runs()] == ["FINISHED"] * 6
        assert all(local_sweep.points(run) == expected_points(10) for run in local_sweep.runs())

    def test_it_is_silent_on_a_new_database_in_a_new_folder(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        sweep = tracker_of(f"sqlite:///{tmp_path}/new/mlflow.db")
        sweep.start(["abc"])
        assert sweep.close(timeout_s=100) == []
        assert capfd.readouterr() == ("", "")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["artifacts", "mlflow.db"]

    def test_it_is_silent_towards_a_server(self, mlflow_server: MlflowServer, capfd: pytest.CaptureFixture[str]) -> None:
        Sweep(mlflow_server.uri).track(manifest(1, status="finished"))
        assert capfd.readouterr() == ("", "")

    def test_on_a_server_it_has_the_address_of_the_charts(self, mlflow_server: MlflowServer, local_sweep: Sweep) -> None:
        on_server = Sweep(mlflow_server.uri)
        tracker = on_server.tracker()
        tracker.start([])
        tracker.close(timeout_s=20)
        parent = on_server.parent()
        page = f"{mlflow_server.uri}/#/experiments/{parent.info.experiment_id}/runs?workflowType=machine_learning"
        assert tracker.comparison_url == f"{page}&compareRunsMode=CHART&viewStateShareKey=rrn-partitions"
        assert local_sweep.tracker().comparison_url is None
        assert tracker.experiment_id == parent.info.experiment_id

    def test_a_trial_that_never_started_has_no_run(self, local_sweep: Sweep) -> None:
        tracker = local_sweep.tracker()
        tracker.start(["abc"])
        assert tracker.close(timeout_s=20) == []
        assert local_sweep.runs() == []
        assert local_sweep.parent().info.status == "KILLED"

    def test_a_finished_trial_keeps_its_commit_and_a_new_attempt_gets_the_new_one(self, local_sweep: Sweep) -> None:
        first = (attempt(1, "lost", driver=1),)
        done = manifest(1, trial_id="done", status="finished", attempts=(attempt(1, "finished", driver=1),))
        local_sweep.track(done, manifest(1, attempts=first), commit="old")
        local_sweep.track(manifest(2, attempt=2, attempts=(*first, attempt(2, "lost", driver=2))), commit="new", driver=2)
        assert {run.data.tags["trial_id"]: run.data.tags["git_commit"] for run in local_sweep.runs()} == {"done": "old", "abc": "new"}

    def test_a_trial_that_was_started_anew_in_the_store_gets_a_new_run(self, local_sweep: Sweep) -> None:
        local_sweep.track(manifest(3))
        local_sweep.track(manifest(1, created_ms=1_800_000_000_000))
        assert local_sweep.points(local_sweep.run()) == expected_points(1)
        assert local_sweep.points(local_sweep.run("tags.`rrn.kind` = 'superseded'")) == expected_points(3)

    def test_close_without_start_returns(self, sqlite_uri: str) -> None:
        assert tracker_of(sqlite_uri).close(timeout_s=1) == []

    @pytest.mark.parametrize("uri", ["", "mlruns", "file:///tmp/mlruns", "sqlite:///relative.db", "htp://host", "databricks", "http://"])
    def test_other_uris_are_refused_at_once(self, uri: str) -> None:
        with pytest.raises(TrackingError, match="must be sqlite"):
            tracker_of(uri)


class TestAbandon:
    def test_nothing_more_is_written(self, mlflow_database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
        sweep = Sweep(f"sqlite:///{database}")
        sweep.put(manifest(1))
        tracker = sweep.tracker()
        tracker.start(["abc"])
        wait_until(lambda: [run.info.status for run in sweep.runs()] == ["RUNNING"], deadline_s=20, what="RUNNING")
        tracker.abandon(timeout_s=20)
        assert not tracker._thread.is_alive()
        before = content(database)
        sweep.put(manifest(2, status="finished"))
        tracker.notify("abc")
        assert tracker.close(timeout_s=20) == ["abc"]
        assert content(database) == before
        assert caplog.messages == []

    def test_a_backlog_is_not_written(self, mlflow_database: Path, tmp_path: Path) -> None:
        database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
        sweep = Sweep(f"sqlite:///{database}")
        sweep.put(manifest(3000))
        tracker = sweep.tracker()
        tracker.start(["abc"])
        wait_until(lambda: 'INSERT INTO "metrics"' in "".join(content(database)), deadline_s=30, what="the first points")
        tracker.abandon(timeout_s=20)
        assert not tracker._thread.is_alive()
        assert len(sweep.points(sweep.run())["val/miou"]) < 3000
        assert "rrn.logged_epoch" not in sweep.run().data.tags

    def test_it_ends_the_wait_for_a_server_at_once(self) -> None:
        tracker = tracker_of(f"http://127.0.0.1:{free_port()}")
        tracker.start(["abc"])
        wait_until(lambda: tracker._unavailable, deadline_s=20, what="the outage")
        tracker.abandon()
        assert not tracker._thread.is_alive()


def tracker_of(uri: str) -> Tracker:
    """Of a sweep in which every trial has one epoch."""
    return Tracker(uri, sweep="sweep", store=STORE, read=lambda _: manifest(1), fetch=lambda _: b"", driver=1, tags={})


class _Forbidding(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"not for you"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


class forbidding_server:  # noqa: N801
    """A web server that answers 403 to everything."""

    def __enter__(self) -> str:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Forbidding)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
