"""sync: lost runs, points and files come back, runs of a dead driver are closed, and a second sync changes nothing."""

from __future__ import annotations

import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from servers import MlflowServer, free_port, wait_until
from tracked_sweep import SHOWN, Sweep, attempt, content, entry, expected_points, manifest

from orchestration.errors import TrackingError
from orchestration.record.manifest import Manifest, dump_manifest, manifest_key
from orchestration.store.base import Store
from orchestration.store.open import open_store
from orchestration.tracking.descriptions import SweepFacts
from orchestration.tracking.sync import SyncReport, sync


class Case:
    """A sweep with a store and an MLflow database."""

    def __init__(self, uri: str, database: Path, store: Store) -> None:
        self.database, self.store, self.sweep = database, store, Sweep(uri)

    def put(self, *manifests: Manifest) -> None:
        for found in manifests:
            named = found.model_copy(update={"sweep": self.sweep.name})
            self.sweep.put(named)
            self.store.write(manifest_key(self.sweep.name, named.trial_id), dump_manifest(named))

    def sync(self, *trial_ids: str, **changes: Any) -> SyncReport:
        default = {"trial_ids": trial_ids or None, "facts": SweepFacts(about="what it is for")}
        return sync(self.sweep.uri, self.sweep.name, self.store, **{**default, **changes})

    def statuses(self) -> dict[str, str]:
        return {run.data.tags["trial_id"]: run.info.status for run in self.sweep.runs()}

    def content(self) -> list[Any]:
        """All that MLflow shows, except the IDs that it generates."""
        runs = self.sweep.runs("")

        def tags(run: Any) -> dict[str, str]:
            known = {name: value for name, value in run.data.tags.items() if name != "mlflow.parentRunId"}
            note = known.pop("mlflow.note.content", "").replace(f"/experiments/{run.info.experiment_id}/", "/experiments/ID/")
            return known | {"note": re.sub(r"compare-runs\?\S+", "compare-runs", note)}

        return sorted(
            (
                run.data.tags.get("trial_id", ""),
                run.info.status,
                run.info.start_time,
                run.info.end_time,
                run.data.params,
                tags(run),
                self.sweep.points(run),
                [(found.dataset.name, found.dataset.digest) for found in run.inputs.dataset_inputs],
                sorted(self.sweep.files(run)),
            )
            for run in runs
        )

    def execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.database, timeout=20)) as connection, connection:
            connection.execute(statement)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def fresh(mlflow_database: Path, tmp_path: Path, store: Store) -> Case:
    """With a SQLite database of its own."""
    database = Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db"))
    return Case(f"sqlite:///{database}", database, store)


@pytest.fixture(params=["sqlite", "http"])
def case(request: pytest.FixtureRequest, store: Store) -> Case:
    if request.param == "sqlite":
        return request.getfixturevalue("fresh")
    server = request.getfixturevalue("mlflow_server")
    return Case(server.uri, server.database, store)


FINISHED = manifest(3, status="finished", attempt=2, attempts=(attempt(1, "lost"), attempt(2, "finished")))
FAILED = manifest(2, trial_id="def", seed=4, status="failed", attempts=(attempt(1, "memory"),), failure="memory", reason="too little")


@pytest.mark.slow
def test_runs_of_a_dead_driver_get_their_real_status_and_a_second_sync_writes_nothing(case: Case) -> None:
    ids = ["abc", "def", "cut", "old", "gone"]
    case.put(*(manifest(1, trial_id=trial_id, seed=seed) for seed, trial_id in enumerate(ids)))
    dead = case.sweep.tracker()
    dead.start(ids)
    wait_until(lambda: list(case.statuses().values()) == ["RUNNING"] * 5, deadline_s=20, what="five runs")
    dead.abandon(timeout_s=20)
    case.put(FINISHED, FAILED, manifest(1, trial_id="cut", seed=2, attempts=(attempt(1, "lost"),), failure="lost"))
    case.store.delete([manifest_key(case.sweep.name, "gone")])
    synced = case.sync("abc", "def", "cut", "new")
    assert (synced.runs, synced.created, synced.closed) == (6, 0, 6)
    assert case.statuses() == {"abc": "FINISHED", "def": "FAILED", "cut": "KILLED", "old": "KILLED", "gone": "KILLED"}
    assert case.sweep.parent().info.status == "FAILED"
    before = content(case.database)
    assert case.sync("abc", "def", "cut", "new") == SyncReport(runs=6, created=0, closed=0, points=0)
    assert content(case.database) == before


def test_a_sweep_without_an_experiment_is_built_from_the_store(case: Case) -> None:
    case.put(FINISHED, FAILED)
    assert case.sync() == SyncReport(runs=3, created=3, closed=0, points=5 * len(SHOWN) + 3 * 3, files=3 + 2)
    parent = case.sweep.parent().info
    assert (parent.status, parent.start_time, parent.end_time) == ("FAILED", FINISHED.created_ms, FINISHED.updated_ms)
    before = content(case.database)
    assert case.sync() == SyncReport(runs=3, created=0, closed=0, points=0)
    assert content(case.database) == before


def test_sync_and_tracker_write_the_same(case: Case) -> None:
    case.put(FINISHED, FAILED)
    case.sweep.track()
    before = case.content()
    assert case.sync() == SyncReport(runs=3, created=0, closed=0, points=0)
    assert case.content() == before


def test_missing_points_come_back_even_if_the_tag_counts_them(case: Case) -> None:
    case.put(FINISHED)
    case.sync()
    run_id, before = case.sweep.run().info.run_id, case.content()
    case.execute(f"DELETE FROM metrics WHERE run_uuid = '{run_id}' AND step = 2 AND key IN ('val/miou', 'train/lr')")
    assert case.sync().points == 2
    assert case.content() == before


@pytest.mark.parametrize("deleted", ["run", "parent", "experiment"])
def test_deleted_runs_and_experiments_are_rebuilt(case: Case, deleted: str) -> None:
    case.put(FINISHED, FAILED)
    case.sync()
    before, parent = case.content(), case.sweep.parent().info
    if deleted == "experiment":
        case.sweep.client.delete_experiment(parent.experiment_id)
    else:
        case.sweep.client.delete_run(parent.run_id if deleted == "parent" else case.sweep.run("tags.trial_id = 'abc'").info.run_id)
    assert case.sync().created == (0 if deleted == "experiment" else 1)
    assert case.content() == before
    assert {run.data.tags["mlflow.parentRunId"] for run in case.sweep.runs()} == {case.sweep.parent().info.run_id}


def test_a_lost_database_is_rebuilt(fresh: Case, mlflow_database: Path, tmp_path: Path) -> None:
    fresh.put(FINISHED, FAILED)
    fresh.sync()
    before = fresh.content()
    rebuilt = Case(f"sqlite:///{tmp_path}/new.db", Path(shutil.copy(mlflow_database, tmp_path / "new.db")), fresh.store)
    rebuilt.sweep.name = fresh.sweep.name
    assert rebuilt.sync().created == 3
    assert rebuilt.content() == before


def test_a_restored_older_database_is_brought_up_to_date(fresh: Case, tmp_path: Path) -> None:
    fresh.put(manifest(1, attempts=(attempt(1, None),)))
    fresh.sync()
    older = tmp_path / "older.db"
    shutil.copy(fresh.database, older)
    fresh.put(FINISHED)
    fresh.sync()
    restored = Case(f"sqlite:///{older}", older, fresh.store)
    restored.sweep.name = fresh.sweep.name
    assert restored.sync() == SyncReport(runs=2, created=0, closed=0, points=2 * len(SHOWN) + 2 * 3)
    assert restored.content() == fresh.content()


def test_of_two_runs_of_the_sweep_the_younger_is_superseded(fresh: Case) -> None:
    fresh.put(FINISHED)
    fresh.sync()
    parent = fresh.sweep.parent().info
    fresh.sweep.client.create_run(parent.experiment_id, tags={"rrn.kind": "sweep"})
    assert fresh.sync().closed == 1
    assert fresh.sweep.parent().info.run_id == parent.run_id
    assert fresh.sweep.run("tags.`rrn.kind` = 'superseded'").info.status == "KILLED"


def test_a_trial_that_mlflow_refuses_is_named_and_the_others_are_written(fresh: Case) -> None:
    odd = entry(1).model_copy(update={"metrics": {"val/miou": 1.0, "not a key ?!": 2.0}})
    fresh.put(FINISHED, manifest(1, trial_id="a", seed=4, history=(odd,)))
    with pytest.raises(TrackingError, match="refused 1 runs: a: "):
        fresh.sync()
    points = fresh.sweep.points(fresh.sweep.run("tags.trial_id = 'abc'"))
    assert {name: points[name] for name in expected_points(3)} == expected_points(3)


def test_a_run_that_is_deleted_before_its_files_arrive_is_named(fresh: Case) -> None:
    fresh.put(FINISHED)

    def overview() -> dict[str, bytes]:
        fresh.sweep.client.delete_run(fresh.sweep.parent().info.run_id)
        return {"comparison.html": b"<p>"}

    with pytest.raises(TrackingError, match="refused 1 runs: the sweep's own run: "):
        fresh.sync(overview=overview)


@pytest.mark.slow
def test_what_an_outage_held_back_arrives_later(mlflow_database: Path, tmp_path: Path, store: Store) -> None:
    server = MlflowServer(Path(shutil.copy(mlflow_database, tmp_path / "mlflow.db")))
    try:
        server.start()
        case = Case(server.uri, server.database, store)
        case.put(manifest(1))
        tracker = case.sweep.tracker()
        tracker.start(["abc"])
        wait_until(
            lambda: any("rrn.files" in run.data.tags for run in case.sweep.runs()), deadline_s=20, what="the first epoch and its files"
        )
        server.kill()
        case.put(FINISHED)
        tracker.notify("abc")
        assert tracker.close(timeout_s=2) == ["abc"]
        with pytest.raises(TrackingError, match="does not answer"):
            case.sync()
        server.start()
        assert case.sync() == SyncReport(runs=2, created=0, closed=2, points=2 * len(SHOWN) + 2 * 3, files=2)
        assert (case.statuses(), case.sweep.parent().info.status) == ({"abc": "FINISHED"}, "FINISHED")
    finally:
        server.kill()


def test_a_refused_look_at_the_files_does_not_count_as_all_there(fresh: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh.put(FINISHED)
    assert fresh.sync().missing == 0

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("403")

    monkeypatch.setattr("mlflow.MlflowClient.list_artifacts", refuse)
    synced = fresh.sync()
    assert (synced.missing, synced.error) == (3, "PermissionError: 403")


@pytest.mark.parametrize("ms", [-(2**53), 0, 2**53])
def test_a_wrong_clock_of_a_node_refuses_no_trial(fresh: Case, ms: int) -> None:
    odd = entry(1).model_copy(update={"time_ms": ms})
    ended = attempt(1, "finished", ended_ms=ms)
    fresh.put(manifest(1, status="finished", created_ms=ms, updated_ms=ms, history=(odd,), attempts=(ended,)))
    assert fresh.sync().created == 2
    assert fresh.sync() == SyncReport(runs=2, created=0, closed=0, points=0)


def test_the_folder_of_a_database_can_be_moved(fresh: Case, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    database = tmp_path / "here" / "mlflow.db"
    shutil.move(fresh.database, database)
    before = Case(f"sqlite:///{database}", database, fresh.store)
    before.put(FINISHED)
    before.sync()
    (tmp_path / "here").rename(tmp_path / "a there#é")
    moved = Case(f"sqlite:///{tmp_path}/a there#é/mlflow.db", tmp_path / "a there#é" / "mlflow.db", fresh.store)
    moved.sweep.name = before.sweep.name
    assert moved.sync() == SyncReport(runs=2, created=0, closed=0, points=0)
    run = moved.sweep.run()
    assert moved.sweep.files(run) == ["attempts/1-environment.json", "attempts/2-environment.json", "config.yaml"]
    assert moved.sweep.body(run, "config.yaml").startswith(b"#")
    assert not (tmp_path / "here").exists()


@pytest.mark.slow
def test_a_database_that_is_locked_at_the_start_is_waited_for(fresh: Case, caplog: pytest.LogCaptureFixture) -> None:
    fresh.sweep.put(FINISHED)
    tracker = fresh.sweep.tracker()
    with closing(sqlite3.connect(fresh.database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        tracker.start(["abc"])
        wait_until(lambda: "database is locked" in caplog.text, deadline_s=60, what="the warning")
        other.rollback()
    assert tracker.close(timeout_s=60) == []
    assert fresh.statuses() == {"abc": "FINISHED"}
    assert "tracking is off" not in caplog.text


def test_the_error_for_a_server_that_does_not_answer_holds_no_password(store: Store) -> None:
    with pytest.raises(TrackingError, match="sync again when it is back") as caught:
        sync(f"http://user:secret@127.0.0.1:{free_port()}", "sweep", store)
    assert "secret" not in str(caught.value)


def test_the_report_as_text() -> None:
    text = "MLflow: 3 runs compared, 1 created, 2 closed, 40 points and 5 files added"
    assert str(SyncReport(3, 1, 2, 40, 5)) == text
    assert str(SyncReport(3, 1, 2, 40, 5, 7, "no room")) == f"{text}; 7 files could not be stored or found, sync again later: no room"
