"""The files of a trial's run, from its manifest and the store."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tracked_sweep import CLASSES, CONFUSION, attempt, manifest, png, validated

from orchestration.errors import Corrupt, NotFound
from orchestration.plan.sweep_file import load
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import EpochPictures, Manifest, ObjectRef, manifest_key, parse_manifest, sha256_of
from orchestration.record.stored_trials import restored_plan
from orchestration.store.base import Store
from orchestration.store.open import open_store
from orchestration.tracking.mlflow_private import table
from orchestration.tracking.run_files import CodeOrigin, RunFile, digest_of, overview_files, stored, trial_files
from rrn_core import configure
from rrn_core.config import Split, TrainConfig

EARLIER = Path(__file__).parents[1] / "record" / "release_0_1"
OURS = CodeOrigin(driver=1, facts={"ray": "2.60", "git_commit": "c0ffee"}, code={"git.diff": b"+x\n"})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def files(store: Store, found: Manifest, *, live: bool = False, origin: CodeOrigin | None = None) -> dict[str, RunFile]:
    return {file.name: file for file in trial_files(found, stored(store), live=live, origin=origin)}


def drawn(store: Store, epoch: int, *, shade: int = 100) -> EpochPictures:
    refs = {}
    for name, body in (("predictions.png", png(shade)), ("confusion.json", CONFUSION)):
        key = f"sweep/abc/pictures/{epoch:04d}-1/{name}"
        store.write(key, body)
        refs[name] = ObjectRef(key=key, sha256=sha256_of(body), size=len(body))
    return EpochPictures(epoch=epoch, objects=refs)


def validated_trial(*scores: float, **changes: Any) -> Manifest:
    return manifest(len(scores), history=tuple(validated(i, score) for i, score in enumerate(scores, start=1)), **changes)


class TestSettings:
    @pytest.mark.parametrize(
        "config",
        [
            configure(partition="1/8", eps=0.3, scales=(0.5, 1e-05), lr=1e-05, drlc=False, feature_pool="global", crop=256),
            configure(
                dataset="camvid",
                partition="n:92",
                partition_by="list",
                labeled_list="lists/{k} #1: a.txt",
                split=Split(labeled=92, unlabeled=275, val=101, sha256="ab" * 32),
                init_weights="store:weights/x",
                init_sha256="cd" * 32,
            ),
        ],
    )
    def test_they_are_a_sweep_file_of_this_trial(self, store: Store, tmp_path: Path, config: TrainConfig) -> None:
        trial_id = config.digest[:12]
        found = manifest(1, trial_id=trial_id, config=config.model_dump(mode="json"), sweep="s" * 100, varied=("eps", "seed"))
        (tmp_path / "config.yaml").write_bytes(files(store, found)["config.yaml"].make())
        spec = load(tmp_path / "config.yaml")
        (plan,) = expand(spec)
        assert (plan.config, plan.trial_id) == (config, trial_id)
        assert spec.name != found.sweep
        assert spec.name.endswith(trial_id)

    @pytest.mark.parametrize("stored_trial", sorted(EARLIER.glob("*.json")), ids=lambda file: file.stem)
    def test_those_of_an_earlier_release_are_a_sweep_file_of_this_one(self, store: Store, tmp_path: Path, stored_trial: Path) -> None:
        found = parse_manifest(stored_trial.read_bytes(), "", key=manifest_key("old", stored_trial.stem))[0]
        (tmp_path / "config.yaml").write_bytes(files(store, found)["config.yaml"].make())
        (plan,) = expand(load(tmp_path / "config.yaml"))
        assert plan.trial_id == restored_plan(found).config.digest[: len(plan.trial_id)]

    def test_settings_that_vary_come_first(self, store: Store) -> None:
        text = files(store, manifest(1, varied=("eps", "seed")))["config.yaml"].make().decode()
        assert text.splitlines()[2:5] == ["base:", "  eps: 0.5", "  seed: 3"]


class TestEnvironment:
    def test_each_attempt_has_its_own(self, store: Store) -> None:
        machine = {"torch": "2.9", "device": "CPU"}
        found = manifest(1, attempts=(attempt(1, "lost", driver=7), attempt(2, None, machine=machine)))
        shown = files(store, found, origin=OURS)
        assert json.loads(shown["attempts/1-environment.json"].make()) == {"attempt": 1, "driver": 7, "node": "a", "machine": {}}
        assert json.loads(shown["attempts/2-environment.json"].make()) == {
            "attempt": 2,
            "driver": 1,
            "node": "a",
            "machine": machine,
            "code": {"ray": "2.60", "git_commit": "c0ffee"},
        }
        assert shown["attempts/2-git.diff"].make() == b"+x\n"
        assert "attempts/1-git.diff" not in shown

    def test_files_that_only_the_driver_knows_do_not_change_the_digest(self, store: Store) -> None:
        found = manifest(1, attempts=(attempt(1, None),))
        assert digest_of(files(store, found, origin=OURS).values()) == digest_of(files(store, found).values())


class TestTables:
    def test_every_class_has_its_iou_at_the_last_and_at_the_best_epoch(self, store: Store) -> None:
        found = validated_trial(0.5, 0.6, 0.4, status="finished")
        shown = files(store, found)["iou_per_class.json"]
        assert shown.table
        assert json.loads(shown.make()) == {
            "columns": ["IoU in percent, epoch", "branch1, last (3)", "branch2, last (3)", "ensemble, last (3)", "ensemble, best (2)"],
            "data": [["mean", 38.0, 39.0, 40.0, 60.0], ["sky", 40.0, 40.0, 40.0, 60.0], ["car", 20.0, 20.0, 20.0, 30.0]],
        }

    def test_while_a_trial_trains_its_table_is_of_the_newest_epoch_with_pictures(self, store: Store) -> None:
        found = validated_trial(0.5, 0.6, 0.4)
        assert "iou_per_class.json" not in files(store, found, live=True)
        found = found.model_copy(update={"pictures": (drawn(store, 2),)})
        shown = files(store, found, live=True)["iou_per_class.json"]
        assert json.loads(shown.make())["columns"][1] == "branch1, newest (2)"
        assert json.loads(files(store, found)["iou_per_class.json"].make())["columns"][1] == "branch1, newest (3)"

    def test_the_confusion_matrix_is_in_percent_of_the_true_class(self, store: Store) -> None:
        shown = files(store, validated_trial(0.5, 0.6, pictures=(drawn(store, 1), drawn(store, 2))))["confusion.json"]
        assert shown.table
        assert json.loads(shown.make()) == {
            "columns": ["truth, and percent of its pixels (ensemble, epoch 2)", "pixels", *CLASSES],
            "data": [["sky", 100, 90.0, 10.0, 0.0], ["car", 50, 10.0, 90.0, 0.0], ["tree", 0, None, None, None]],
        }

    @pytest.mark.parametrize("classes", [3, 40])
    def test_the_confusion_matrix_is_also_a_picture(self, store: Store, classes: int) -> None:
        names = [f"class {i}" for i in range(classes)]
        body = json.dumps({"classes": names, "head": "branch1", "counts": [[int(i == j) for j in range(classes)] for i in range(classes)]})
        store.write("sweep/abc/pictures/0001-1/confusion.json", body.encode())
        ref = ObjectRef(key="sweep/abc/pictures/0001-1/confusion.json", sha256=sha256_of(body.encode()), size=len(body))
        found = validated_trial(0.5, pictures=(EpochPictures(epoch=1, objects={"confusion.json": ref}),))
        with Image.open(io.BytesIO(files(store, found)["confusion.png"].make())) as picture:
            assert min(picture.size) > 300

    def test_tables_of_the_overview_are_recognised(self) -> None:
        shown = overview_files({"a.json": table(["x"], [[1]]), "b.json": b'{"x": 1}', "c.json": b"{", "d.html": b"<p>"})
        assert [(file.name, file.table, file.make()[:1]) for file in shown] == [
            ("a.json", True, b"{"),
            ("b.json", False, b"{"),
            ("c.json", False, b"{"),
            ("d.html", False, b"<"),
        ]


class TestPictures:
    def test_names_contain_epoch_and_time_and_nothing_random(self, store: Store) -> None:
        found = validated_trial(0.5, 0.6, pictures=(drawn(store, 2),))
        once, again = (sorted(files(store, found)) for _ in range(2))
        base = "images/predictions+step+2+timestamp+1700000002000+abc"
        assert [name for name in once if name.startswith("images/")] == [f"{base}+compressed.webp", f"{base}.png"]
        assert once == again

    def test_the_newest_predictions_are_also_beside_the_other_files(self, store: Store) -> None:
        found = validated_trial(0.5, 0.6, pictures=(drawn(store, 1, shade=1), drawn(store, 2, shade=2)))
        assert files(store, found)["predictions.png"].make() == png(2)

    def test_the_preview_keeps_its_aspect_ratio(self, store: Store) -> None:
        shown = files(store, validated_trial(0.5, pictures=(drawn(store, 1),)))
        (small,) = (file for name, file in shown.items() if name.endswith(".webp"))
        with Image.open(io.BytesIO(small.make())) as picture:
            assert (picture.format, picture.size) == ("WEBP", (1024, 256))

    def test_a_damaged_or_lost_picture_is_an_error(self, store: Store) -> None:
        found = validated_trial(0.5, pictures=(drawn(store, 1),))
        key = found.pictures[0].objects["predictions.png"].key
        store.write(key, b"something else")
        with pytest.raises(Corrupt):
            files(store, found)["predictions.png"].make()
        store.delete([key])
        with pytest.raises(NotFound):
            files(store, found)["predictions.png"].make()


def test_the_digest_changes_with_an_epoch_with_pictures_and_with_an_attempt(store: Store) -> None:
    first = validated_trial(0.5, attempts=(attempt(1, None),))
    second = validated_trial(0.5, 0.6, attempts=(attempt(1, None),))
    seen = [
        digest_of(files(store, found, live=True).values())
        for found in (
            first,
            second,
            second.model_copy(update={"pictures": (drawn(store, 2),)}),
            first.model_copy(update={"attempts": (attempt(1, "lost"), attempt(2, None))}),
        )
    ]
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3
