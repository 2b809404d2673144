"""The content of a trial's MLflow run, from its manifest alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from finished import manifest_of
from tracked_sweep import STORE, attempt, checkpoint, manifest, validated

from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record.manifest import manifest_key, parse_manifest
from orchestration.tracking.dataset_inputs import UsedData
from orchestration.tracking.descriptions import summary_of
from orchestration.tracking.run_content import run_content
from rrn_core import configure
from rrn_core.config import Split, TrainConfig

EARLIER = Path(__file__).parents[1] / "record" / "release_0_1"


class TestRunContent:
    def test_tags_name_the_last_and_the_first_best_checkpoint(self) -> None:
        scored = manifest(3, checkpoints=(checkpoint(1, 0.4), checkpoint(2, 0.4), checkpoint(3)))
        tags = run_content(scored, store=f"{STORE}/", live=True).tags
        assert tags["checkpoint_best"] == f"{STORE}/sweep/abc/checkpoints/00000001-1"
        assert tags["checkpoint_last"] == f"{STORE}/sweep/abc/checkpoints/00000003-1"

    def test_tags_are_for_filters(self) -> None:
        tags = run_content(manifest(1, proposal=7), store=STORE, live=True).tags
        assert {
            name: tags[name] for name in ("sweep", "trial_id", "partition", "seed", "method", "dataset", "attempt", "proposal", "rrn.kind")
        } == {
            "sweep": "sweep",
            "trial_id": "abc",
            "partition": "1/8",
            "seed": "3",
            "method": "rrn",
            "dataset": "digits",
            "attempt": "1",
            "proposal": "7",
            "rrn.kind": "trial",
        }

    def test_long_values_are_cut_to_mlflows_limits(self) -> None:
        view = run_content(manifest(1, status="failed", reason="x" * 10_000, config={"scales": "y" * 10_000}), store=STORE, live=True)
        assert (len(view.tags["reason"]), len(view.params["scales"])) == (5000, 6000)

    @pytest.mark.parametrize(
        ("stored", "live", "shown"),
        [("running", True, "RUNNING"), ("running", False, "KILLED"), ("finished", False, "FINISHED"), ("failed", True, "FAILED")],
    )
    def test_status(self, stored: str, live: bool, shown: str) -> None:
        view = run_content(manifest(1, status=stored), store=STORE, live=live)
        assert (view.status, view.end_ms is None) == (shown, shown == "RUNNING")


class TestLiveness:
    @pytest.mark.parametrize(("outcome", "shown"), [(None, "RUNNING"), ("interrupted", "KILLED"), ("lost", "KILLED")])
    def test_a_trial_between_two_attempts_does_not_run(self, outcome: str | None, shown: str) -> None:
        assert run_content(manifest(1, attempts=(attempt(1, outcome),)), store=STORE, live=True).status == shown

    def test_an_open_attempt_has_no_effort_yet(self) -> None:
        view = run_content(manifest(1, attempts=(attempt(1, "lost"), attempt(2, None))), store=STORE, live=False)
        assert [point.step for point in view.series["rrn.logged_attempt"]] == [1]
        assert view.tags["attempts"] == "2: lost, open"


class TestParametersAndMetrics:
    @pytest.mark.parametrize(
        ("method", "read"), [("supervised", set()), ("cps", {"lambda1"}), ("rrn", {"eps", "lambda1", "lambda2", "lambda3"})]
    )
    def test_only_settings_of_the_method_are_parameters(self, method: str, read: set[str]) -> None:
        params = params_of(configure(method=method))
        assert set(params) == {"seed", "method", "dataset", "partition", "backbone", "epochs"} | read

    def test_changed_settings_are_parameters_and_contents_of_files_are_not(self) -> None:
        split = Split(labeled=1, unlabeled=1, val=1, sha256="ab" * 32)
        params = params_of(configure(method="supervised", dataset="camvid", split=split, init_sha256="cd" * 32, crop=64, hflip=0.25))
        assert {name: params.get(name) for name in ("crop", "hflip", "split", "init_sha256", "momentum")} == {
            "crop": "64",
            "hflip": "0.25",
            "split": None,
            "init_sha256": None,
            "momentum": None,
        }

    def test_settings_that_vary_come_first_if_the_method_has_them(self) -> None:
        assert list(params_of(configure(), varied=("eps", "partition")))[:2] == ["eps", "partition"]
        assert list(params_of(configure(method="supervised"), varied=("eps", "partition")))[:2] == ["partition", "method"]

    def test_iou_of_single_classes_is_not_a_metric(self) -> None:
        (point,) = run_content(manifest(1, history=(validated(1, 0.5),)), store=STORE, live=True).series["rrn.logged_epoch"]
        assert set(point.metrics) == {
            "train/loss",
            "val/miou",
            "val/miou_branch1",
            "val/miou_branch2",
            "val/miou_ensemble",
            "system/cpu_utilization_percentage",
            "perf/train_s",
            "best/miou",
            "best/miou_epoch",
        }

    def test_the_best_epoch_is_the_first_with_the_highest_score(self) -> None:
        scores = (0.3, 0.5, 0.4, 0.5, 0.6)
        history = tuple(validated(epoch, score) for epoch, score in enumerate(scores, start=1))
        points = run_content(manifest(5, history=history), store=STORE, live=True).series["rrn.logged_epoch"]
        best = [(point.metrics["best/miou"], point.metrics["best/miou_epoch"]) for point in points]
        assert best == [(0.3, 1), (0.5, 2), (0.5, 2), (0.5, 2), (0.6, 5)]

    def test_tags_group_by_each_varied_setting_and_by_all_but_the_seed(self) -> None:
        config = configure(partition="1/8", eps=0.25, drlc=False, seed=3).model_dump(mode="json")
        tags = run_content(manifest(1, config=config, varied=("eps", "partition", "drlc", "seed")), store=STORE, live=True).tags
        assert {name: tags[name] for name in ("eps", "drlc", "partition", "seed", "cell")} == {
            "eps": "0.25",
            "drlc": "false",
            "partition": "1/8",
            "seed": "3",
            "cell": "1/8 eps=0.25 drlc=false",
        }


def test_run_name_label_cell_and_tags_name_only_settings_that_the_method_has() -> None:
    found = parse_manifest((EARLIER / "0608bf133b96.json").read_bytes(), "", key=manifest_key("old", "0608bf133b96"))[0]
    assert found.label == "method=supervised eps=0.6"
    shown, summary = run_content(found, store=STORE, live=False), summary_of(found, found.status)
    assert {shown.name, shown.tags["cell"], summary.label, summary.cell} == {"method=supervised"}
    assert "eps" not in shown.tags
    plans = expand(check({"name": "s", "preset": "digits", "grid": {"method": ["supervised", "rrn"], "eps": [0.4]}, "seeds": [1, 2]}))
    shown_now = [run_content(manifest_of(plan), store=STORE, live=False) for plan in plans]
    assert [content.name for content in shown_now] == [plan.label for plan in plans]
    assert [content.tags["cell"] for content in shown_now] == ["method=supervised"] * 2 + ["method=rrn eps=0.4"] * 2


class TestData:
    def test_the_embedded_scenes_are_known_by_the_settings_that_make_them(self) -> None:
        training, validation = data_of(configure(partition="1/8"))
        assert (training.name, training.context, validation.name, validation.context) == (
            "digits 1/8",
            "training",
            "digits validation",
            "validation",
        )
        assert json.loads(training.profile) == {
            "partition": "1/8",
            "partition_by": "every_kth",
            "partition_seed": 0,
            "labelled": 64,
            "unlabelled": 448,
        }
        assert json.loads(validation.profile) == {"images": 64}
        assert json.loads(training.source) == {"dataset": "digits", "image_size": 64, "train_images": 512, "val_images": 64}
        same = data_of(configure(partition="1/8", seed=9, eps=0.1))
        other = data_of(configure(partition="1/8", image_size=128))
        assert training.digest == same[0].digest != other[0].digest
        assert len(training.digest) == 36

    def test_listed_images_are_known_by_the_hash_of_their_split(self) -> None:
        split = Split(labeled=46, unlabeled=321, val=101, sha256="ab" * 32)
        training, validation = data_of(configure(dataset="camvid", split=split, train_list="lists/train.txt"))
        assert training.digest == validation.digest == "ab" * 18
        assert json.loads(training.source) == {"dataset": "camvid", "train_list": "lists/train.txt"}
        assert json.loads(validation.profile) == {"images": 101}


def params_of(config: TrainConfig, **changes: Any) -> Mapping[str, str]:
    settings = {"varied": ("seed",), **changes}
    return run_content(manifest(1, config=config.model_dump(mode="json"), **settings), store=STORE, live=True).params


def data_of(config: TrainConfig) -> tuple[UsedData, ...]:
    return run_content(manifest(1, config=config.model_dump(mode="json")), store=STORE, live=True).data
