"""Files and descriptions in MLflow: written once, written again when they are lost, and never delaying the metrics."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import free_port, wait_until
from tracked_sweep import Sweep, attempt, manifest, validated

from infra.local.parts import StackPart
from orchestration.record.manifest import Manifest, ObjectRef, dump_manifest, manifest_key
from orchestration.store.open import open_store
from orchestration.tracking import artifact_queue, sweep_run
from orchestration.tracking.artifacts import Artifacts, ArtifactsUnavailable
from orchestration.tracking.descriptions import SweepFacts
from orchestration.tracking.run_files import Fetch, RunFile
from orchestration.tracking.sync import SyncReport, sync

IMAGES = "images/predictions+step+{0}+timestamp+170000000{0}000+abc"


@pytest.fixture(scope="session")
def proxy(mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server that stores files for its clients."""
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()
    shutil.copy(mlflow_database, folder / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--artifacts-destination", str(folder / "artifacts")]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    uri = f"http://127.0.0.1:{port}"
    server = StackPart("proxy", command, log=folder / "log", check=lambda: answers(f"{uri}/health"), environment=quiet)
    try:
        server.start()
        yield uri
    finally:
        server.kill()


def blocked(sweep: Sweep) -> tuple[Fetch, threading.Event, threading.Event]:
    """A `Fetch` that sets the first event when it is called, and waits for the second."""
    called, release = threading.Event(), threading.Event()

    def fetch(ref: ObjectRef) -> bytes:
        called.set()
        release.wait(20)
        return sweep.fetch(ref)

    return fetch, called, release


@pytest.fixture
def local(mlflow_database: Path, tmp_path: Path) -> Sweep:
    """On a SQLite database of its own, with its files in `artifacts` beside it."""
    return Sweep(f"sqlite:///{shutil.copy(mlflow_database, tmp_path / 'mlflow.db')}")


@pytest.fixture(params=["sqlite", "server", "proxy"])
def sweep(request: pytest.FixtureRequest) -> Sweep:
    if request.param == "sqlite":
        return request.getfixturevalue("local")
    return Sweep(request.getfixturevalue("mlflow_server").uri if request.param == "server" else request.getfixturevalue("proxy"))


def drawn_trial(sweep: Sweep, *epochs: int, **changes: Any) -> Manifest:
    """A trial with pictures of these epochs; `count` is the number of all its epochs."""
    count = changes.pop("count", epochs[-1] if epochs else 1)
    history = tuple(validated(epoch, 0.5 + 0.01 * epoch) for epoch in range(1, count + 1))
    pictures = tuple(sweep.drawn(epoch, trial_id=changes.get("trial_id", "abc")) for epoch in epochs)
    default = {"history": history, "pictures": pictures, "attempts": (attempt(1, "finished"),)}
    return manifest(count, **{"status": "finished", **default, **changes})


def added(sweep: Sweep, *manifests: Manifest, **changes: Any) -> int:
    """How many files one run of the driver uploaded."""
    sweep.put(*manifests)
    tracker = sweep.tracker(**changes)
    tracker.start(list(sweep.store))
    assert tracker.close(timeout_s=60) == []
    return tracker._runs.artifacts.added


class TestFilesOfATrial:
    def test_all_are_uploaded_once_with_the_data_sets_and_the_tags_for_the_ui(self, sweep: Sweep) -> None:
        found = drawn_trial(sweep, 2, 4)
        sweep.track(found, code={"git.diff": b"+x\n"})
        run = sweep.run()
        assert sorted(sweep.files(run)) == sorted(
            [
                "attempts/1-environment.json",
                "attempts/1-git.diff",
                "config.yaml",
                "confusion.json",
                "confusion.png",
                *(f"{IMAGES.format(epoch)}{ending}" for epoch in (2, 4) for ending in (".png", "+compressed.webp")),
                "iou_per_class.json",
                "predictions.png",
            ]
        )
        assert sweep.body(run, f"{IMAGES.format(4)}.png") == sweep.fetch(found.pictures[1].objects["predictions.png"])
        assert json.loads(sweep.body(run, "attempts/1-environment.json"))["code"]["git_commit"] == "c0ffee"
        assert json.loads(sweep.body(run, "iou_per_class.json"))["data"][0][-1] == 54.0
        assert run.data.tags["mlflow.loggedImages"] == "True"
        tables = json.loads(run.data.tags["mlflow.loggedArtifacts"])
        assert tables == [{"path": "iou_per_class.json", "type": "table"}, {"path": "confusion.json", "type": "table"}]
        data = [(found.dataset.name, [tag.value for tag in found.tags]) for found in run.inputs.dataset_inputs]
        assert sorted(data) == [("digits 1/8", ["training"]), ("digits validation", ["validation"])]

    def test_a_replay_uploads_none(self, sweep: Sweep) -> None:
        found = drawn_trial(sweep, 2)
        assert added(sweep, found) == 8
        before = (sweep.run().to_dictionary(), sorted(sweep.files(sweep.run())))
        assert added(sweep) == 0
        assert (sweep.run().to_dictionary(), sorted(sweep.files(sweep.run()))) == before

    def test_an_epoch_with_pictures_replaces_tables_and_adds_pictures(self, sweep: Sweep) -> None:
        running = {"status": "running", "attempts": (attempt(1, None),)}
        sweep.track(drawn_trial(sweep, 2, **running))
        assert added(sweep, drawn_trial(sweep, 2, 4, **running)) == 6
        assert sweep.run().data.tags["rrn.logged_epoch"] == "4"
        assert "epoch 4" in sweep.body(sweep.run(), "confusion.json").decode()
        assert len([name for name in sweep.files(sweep.run()) if name.startswith("images/")]) == 4

    def test_an_epoch_without_pictures_uploads_none(self, local: Sweep) -> None:
        tracker = local.tracker()
        local.put(drawn_trial(local, 2, status="running", attempts=(attempt(1, None),)))
        tracker.start(["abc"])
        wait_until(lambda: any("rrn.files" in run.data.tags for run in local.runs()), deadline_s=20, what="the files")
        before = tracker._runs.artifacts.added
        local.put(drawn_trial(local, 2, count=3, status="running", attempts=(attempt(1, None),)))
        tracker.notify("abc")
        wait_until(lambda: local.run().data.tags["rrn.logged_epoch"] == "3", deadline_s=20, what="the third epoch")
        assert tracker._runs.artifacts.added == before
        tracker.abandon()

    def test_each_attempt_keeps_the_code_that_its_driver_recorded(self, local: Sweep) -> None:
        first = (attempt(1, "lost", driver=1),)
        local.track(drawn_trial(local, status="running", attempts=first), code={"git.diff": b"+old"}, commit="old")
        both = (*first, attempt(2, "finished", driver=2))
        local.track(drawn_trial(local, attempts=both, attempt=2), code={"git.diff": b"+new"}, commit="new", driver=2)
        run = local.run()
        assert [local.body(run, f"attempts/{number}-git.diff") for number in (1, 2)] == [b"+old", b"+new"]
        codes = [json.loads(local.body(run, f"attempts/{number}-environment.json"))["code"]["git_commit"] for number in (1, 2)]
        assert codes == ["old", "new"]

    def test_sync_uploads_deleted_files_again(self, local: Sweep, tmp_path: Path) -> None:
        found = drawn_trial(local, 2)
        local.track(found)
        folder = Path(local.run().info.artifact_uri.removeprefix("file://"))
        before = sorted(local.files(local.run()))
        shutil.rmtree(folder / "images")
        (folder / "iou_per_class.json").unlink()
        assert synced(local, tmp_path, found) == SyncReport(runs=2, created=0, closed=0, points=0, files=3)
        assert sorted(local.files(local.run())) == before
        assert synced(local, tmp_path, found).files == 0

    def test_the_new_run_of_a_deleted_one_gets_all_files_again(self, local: Sweep) -> None:
        found = drawn_trial(local, 2)
        local.track(found)
        before = sorted(local.files(local.run()))
        local.client.delete_run(local.run().info.run_id)
        local.track()
        assert sorted(local.files(local.run())) == before


class TestUnavailableArtifactStore:
    def test_metrics_and_statuses_are_written_nevertheless(self, local: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "artifacts").touch()  # a file where the folder should be
        local.put(drawn_trial(local, 2), drawn_trial(local, 2, trial_id="def", seed=4))
        tracker = local.tracker(overview=lambda: {"report.html": b"<p>"})
        tracker.start(["abc", "def"])
        assert sorted(tracker.close(timeout_s=20)) == ["abc", "def"]
        assert [run.info.status for run in local.runs()] == ["FINISHED"] * 2
        assert local.parent().info.status == "FINISHED"
        assert len(local.points(local.run("tags.trial_id = 'abc'"))["val/miou"]) == 2
        assert sum("files could not be uploaded" in text for text in caplog.messages) == 1
        (tmp_path / "artifacts").unlink()
        assert added(local, overview=lambda: {"report.html": b"<p>"}) == 2 * 8 + 1

    def test_sync_reports_how_many_are_missing_and_uploads_them_later(self, local: Sweep, tmp_path: Path) -> None:
        (tmp_path / "artifacts").touch()
        found = [drawn_trial(local, 2), drawn_trial(local, 2, trial_id="def", seed=4)]
        done = synced(local, tmp_path, *found)
        assert (done.files, done.missing, done.created) == (0, 16, 3)
        assert "16 files could not be stored or found" in str(done)
        (tmp_path / "artifacts").unlink()
        done = synced(local, tmp_path, *found)
        assert (done.files, done.missing, done.error) == (16, 0, "")

    def test_files_are_uploaded_when_the_store_is_back_without_a_new_notification(
        self, local: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(artifact_queue, "RETRY_S", 0.3)
        (tmp_path / "artifacts").touch()
        local.put(drawn_trial(local, 2))
        tracker = local.tracker()
        tracker.start(["abc"])
        wait_until(lambda: tracker._files.is_pending("abc"), deadline_s=20, what="the failure")
        (tmp_path / "artifacts").unlink()
        wait_until(lambda: "rrn.files" in local.run().data.tags, deadline_s=20, what="the files")
        assert tracker.close(timeout_s=20) == []
        assert len(local.files(local.run())) == 8

    def test_it_is_not_retried_for_a_while(self, local: Sweep, tmp_path: Path) -> None:
        (tmp_path / "artifacts").touch()
        tracker = local.tracker()
        tries: list[str] = []
        original = Artifacts.put

        def counted(artifacts: Artifacts, run_id: str, *rest: Any, **options: Any) -> None:
            tries.append(run_id)
            original(artifacts, run_id, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Artifacts, "put", counted)
            local.put(*(drawn_trial(local, 2, trial_id=f"t{i}", seed=i) for i in range(20)))
            tracker.start(list(local.store))
            wait_until(lambda: len(tracker._settled) == 20 and tries != [], deadline_s=20, what="all trials, and a try")
            time.sleep(0.5)
            assert len(tries) == 1
            assert len(tracker.close(timeout_s=20)) == 20
            assert len(tries) <= 3

    def test_the_metrics_of_all_trials_come_before_any_file(self, local: Sweep) -> None:
        shown: list[set[str | None]] = []

        def fetch(ref: Any) -> bytes:
            shown.append({run.data.tags.get("rrn.logged_epoch") for run in local.runs()})
            return local.fetch(ref)

        local.track(*(drawn_trial(local, 2, trial_id=f"t{i}", seed=i) for i in range(4)), fetch=fetch)
        assert shown[0] == {"2"}

    def test_statuses_are_final_even_if_an_upload_hangs_at_the_end(self, local: Sweep) -> None:
        hanging, _, release = blocked(local)
        local.put(drawn_trial(local, 2))
        tracker = local.tracker(fetch=hanging)
        tracker.start(["abc"])
        assert tracker.close(timeout_s=3) == ["abc"]
        assert (local.run().info.status, local.parent().info.status) == ("FINISHED", "FINISHED")
        release.set()
        tracker._thread.join(20)

    def test_a_run_that_is_deleted_during_its_upload_has_all_files_in_the_end(self, local: Sweep) -> None:
        slow, called, release = blocked(local)
        local.put(drawn_trial(local, 2, status="running", attempts=(attempt(1, None),)))
        tracker = local.tracker(fetch=slow)
        tracker.start(["abc"])
        assert called.wait(20)
        local.client.delete_run(local.run().info.run_id)
        local.put(drawn_trial(local, 3))
        tracker.notify("abc")
        threading.Timer(0.5, release.set).start()  # by then the tracker is being closed
        assert tracker.close(timeout_s=20) == []
        assert f"{IMAGES.format(3)}.png" in local.files(local.run())

    def test_a_lost_picture_is_the_only_file_missing(self, local: Sweep, caplog: pytest.LogCaptureFixture) -> None:
        found = drawn_trial(local, 2)
        del local.objects[found.pictures[0].objects["predictions.png"].key]
        local.put(found, drawn_trial(local, trial_id="def", seed=4))
        tracker = local.tracker()
        tracker.start(["abc", "def"])
        assert tracker.close(timeout_s=20) == ["abc"]
        assert sorted(local.files(local.run("tags.trial_id = 'abc'"))) == [
            "attempts/1-environment.json",
            "config.yaml",
            "confusion.json",
            "confusion.png",
            "iou_per_class.json",
        ]
        assert len(local.files(local.run("tags.trial_id = 'def'"))) == 3
        assert sum("pictures/0002-1/predictions.png: not in the store" in text for text in caplog.messages) == 1

    def test_a_folder_of_another_machine_is_not_created_on_this_one(self, tmp_path: Path) -> None:
        def client() -> Any:
            raise AssertionError("nothing may be written")

        artifacts = Artifacts("http://mlflow.example:5000", client, client)
        artifacts.begin("run")
        with pytest.raises(ArtifactsUnavailable, match="serve-artifacts"):
            artifacts.put("run", str(tmp_path / "x"), [RunFile("a", "1", lambda: b"a")], complete=False)
        assert not (tmp_path / "x").exists()

    def test_an_abandoned_tracker_uploads_no_file(self, local: Sweep) -> None:
        slow, called, release = blocked(local)
        local.put(drawn_trial(local, 2))
        tracker = local.tracker(fetch=slow)
        tracker.start(["abc"])
        assert called.wait(20)
        tracker.abandon(timeout_s=0.1)
        before = sorted(local.files(local.run()))
        release.set()
        tracker._thread.join(20)
        assert not tracker._thread.is_alive()
        assert sorted(local.files(local.run())) == before


class TestRunOfTheSweep:
    def test_its_files_are_made_rarely_and_at_the_end(self, local: Sweep) -> None:
        calls: list[int] = []

        def overview() -> dict[str, bytes]:
            calls.append(local.store["abc"].epochs)
            return {"report.html": f"<p>{calls[-1]}".encode(), "comparison.json": b'{"columns": ["a"], "data": [[1]]}'}

        local.put(drawn_trial(local, status="running", attempts=(attempt(1, None),)))
        tracker = local.tracker(overview=overview)
        tracker.start(["abc"])
        for epochs in range(2, 30):
            local.put(drawn_trial(local, count=epochs, status="running", attempts=(attempt(1, None),)))
            tracker.notify("abc")
            if epochs == 10:
                wait_until(lambda: calls != [], deadline_s=20, what="the first overview")
        local.put(drawn_trial(local, count=30))
        tracker.notify("abc")
        assert tracker.close(timeout_s=20) == []
        assert (len(calls), calls[-1]) == (2, 30)
        parent = local.parent()
        assert sorted(local.files(parent)) == ["comparison.json", "report.html"]
        assert local.body(parent, "report.html") == b"<p>30"
        assert json.loads(parent.data.tags["mlflow.loggedArtifacts"]) == [{"path": "comparison.json", "type": "table"}]
        assert f"/runs/{parent.info.run_id}/artifacts/report.html" in parent.data.tags["mlflow.note.content"]

    def test_unchanged_files_are_not_uploaded_again(self, local: Sweep) -> None:
        bodies = {"a.csv": b"1", "b.csv": b"1"}
        added(local, drawn_trial(local), overview=lambda: bodies)
        assert added(local, overview=lambda: bodies) == 0
        assert added(local, overview=lambda: {**bodies, "b.csv": b"2"}) == 2  # a new process does not know which one has changed

    def test_a_bug_in_the_overview_is_one_warning(
        self, local: Sweep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sweep_run, "EVERY_S", 0.0)
        calls: list[int] = []

        def overview() -> dict[str, bytes]:
            calls.append(1)
            raise ZeroDivisionError("a figure without points")

        tracker = local.tracker(overview=overview)
        tracker.start(["abc"])
        for epochs in range(1, 6):
            local.put(drawn_trial(local, count=epochs, status="running", attempts=(attempt(1, None),)))
            tracker.notify("abc")
            wait_until(lambda epochs=epochs: len(calls) >= epochs, deadline_s=20, what="a call")
        assert tracker.close(timeout_s=20) == []
        assert sum("a figure without points" in text for text in caplog.messages) == 1
        assert local.parent().info.status == "KILLED"

    def test_it_is_described_while_the_sweep_runs_and_at_the_end(self, local: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sweep_run, "EVERY_S", 0.2)

        def note() -> str:
            return local.parent().data.tags.get("mlflow.note.content", "") if local.runs("") else ""

        tracker = local.tracker(facts=SweepFacts(about="why", command="rrn-sweep a.yaml"))
        tracker.start(["abc", "def"])
        wait_until(lambda: "0 of 2 trials finished, 2 not started" in note(), deadline_s=20, what="a first description")
        local.put(drawn_trial(local))
        tracker.notify("abc")
        wait_until(lambda: "1 of 2 trials finished, 1 not started" in note(), deadline_s=20, what="a second one")
        local.put(drawn_trial(local, trial_id="def", seed=4, status="running", attempts=(attempt(1, None),)))
        tracker.notify("def")
        assert tracker.close(timeout_s=20) == []
        assert "1 of 2 trials finished, 1 interrupted" in note()
        experiment = local.client.get_experiment_by_name(local.name)
        assert experiment.tags["mlflow.note.content"] == note()
        assert json.loads(experiment.tags["mlflow.sharedViewState.rrn-partitions"])["groupBy"] == "param.average.partition"

    def test_a_deleted_one_is_created_again_at_the_end(
        self, local: Sweep, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sweep_run, "EVERY_S", 0.0)
        ids = ["t1", "t2", "t3"]
        tracker = local.tracker()
        tracker.start(ids)
        wait_until(lambda: local.runs("") and "mlflow.note.content" in local.parent().data.tags, deadline_s=20, what="a description")
        deleted = local.parent().info.run_id
        local.client.delete_run(deleted)
        for seed, trial_id in enumerate(ids):
            local.put(drawn_trial(local, trial_id=trial_id, seed=seed))
            tracker.notify(trial_id)
            wait_until(lambda seed=seed: len(local.runs()) == seed + 1, deadline_s=20, what="the next trial")
        wait_until(lambda: "description of the sweep could not be written" in caplog.text, deadline_s=20, what="the warning")
        assert tracker.close(timeout_s=20) == []
        parent = local.parent()
        assert parent.info.run_id != deleted
        assert (parent.info.status, "3 of 3 trials finished" in parent.data.tags["mlflow.note.content"]) == ("FINISHED", True)
        assert {run.data.tags["mlflow.parentRunId"] for run in local.runs()} == {parent.info.run_id}
        assert sum("description of the sweep could not be written" in text for text in caplog.messages) == 1

    def test_sync_writes_the_same(self, local: Sweep, tmp_path: Path) -> None:
        found = [drawn_trial(local), drawn_trial(local, trial_id="def", seed=4)]
        overview = {"report.html": b"<p>"}
        local.track(*found, overview=lambda: overview)
        before = local.parent().to_dictionary()
        assert synced(local, tmp_path, *found, overview=lambda: overview).files == 0
        assert local.parent().to_dictionary() == before

    def test_sync_warns_of_a_bug_in_the_overview_and_writes_the_rest(
        self, local: Sweep, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        done = synced(local, tmp_path, drawn_trial(local), overview=lambda: {}["x"])
        assert (done.created, done.files, done.missing) == (2, 3, 0)
        assert "the comparison could not be drawn: KeyError" in caplog.text


def synced(sweep: Sweep, folder: Path, *manifests: Manifest, **changes: Any) -> SyncReport:
    """The report of a sync of a real store with these manifests and their pictures."""
    store = open_store(str(folder / "store"))
    for found in manifests:
        named = found.model_copy(update={"sweep": sweep.name})
        body = dump_manifest(named).replace(b'"sweep/', f'"{sweep.name}/'.encode())  # objects lie below their trial
        store.write(manifest_key(sweep.name, named.trial_id), body)
    for key, body in sweep.objects.items():
        store.write(key.replace("sweep/", f"{sweep.name}/", 1), body)
    ids = [found.trial_id for found in manifests]
    return sync(sweep.uri, sweep.name, store, **{"trial_ids": ids, "facts": SweepFacts(about="what it is for"), **changes})


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return reply.status == 200
    except OSError:
        return False
