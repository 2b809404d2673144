"""best_checkpoint.py, export_folder.py, model_card.py and onnx_model.py on the checkpoints of real trainings."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from own_data import make_folder
from PIL import Image
from places import ROOT, SHARED

from orchestration.errors import SweepError
from orchestration.export import best_checkpoint, onnx_model
from orchestration.export.best_checkpoint import BestCheckpoint
from orchestration.export.export_folder import Exported, export, folder_names, slug
from orchestration.export.model_card import ModelCardFacts, class_names, model_card
from orchestration.export.onnx_model import OnnxError, Scores, compare, write_onnx
from orchestration.inference import evaluate_checkpoint
from orchestration.plan.spec import Retention
from orchestration.plan.sweep_file import check, load
from orchestration.plan.trial_plan import TrialPlan, expand
from orchestration.record.manifest import EpochMetrics, read_manifests
from orchestration.record.trial_record import TrialRecord
from orchestration.store.directory import DirectoryStore
from orchestration.store.open import open_store
from rrn_core import Runtime, configure, train
from rrn_core.data.dataset import Pixels, open_dataset
from rrn_core.data.digits import CLASSES
from rrn_core.evaluate import predict, slide
from rrn_core.methods import build_networks
from rrn_core.weights import Model, load_model, pack, training_metadata

pytestmark = pytest.mark.slow

ONE_THREAD = Runtime(device="cpu", threads=1)
SMALL = {"train_images": 16, "val_images": 6, "batch_size": 4, "epochs": 2, "warmup_epochs": 0, "lambda1": 0.0, "lambda2": 0.0}
SPEC = check({"name": "demo", "preset": "digits", "base": SMALL, "grid": {"partition": ["1/4", "1/2"]}, "seeds": [0, 1]})
PLANS = expand(SPEC)
SMALL_SUPERVISED = {**{name: SMALL[name] for name in SMALL if not name.startswith("lambda")}, "method": "supervised"}
HEADS = ("val/miou", "val/miou_branch1", "val/miou_branch2", "val/miou_ensemble")
CAMVID = SHARED / "data" / "camvid" / "val"

needs_onnx = pytest.mark.skipif(not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="pip install 'rrn-sweep[export]'")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A store of four finished trials: two partitions, two seeds, two epochs of a few iterations."""
    store = DirectoryStore(tmp_path_factory.mktemp("trained") / "store")
    for plan in PLANS:
        finish_trained(store, plan, ONE_THREAD)
    return store.root


def finish_trained(store, plan: TrialPlan, runtime: Runtime) -> None:
    """Train the trial."""
    record = TrialRecord.open(store, plan, retention=Retention())
    for report in train(plan.config, runtime):
        entry = EpochMetrics(epoch=report.epoch, step=report.iteration, time_ms=0, metrics=report.metrics)
        files = report.state.to_files()
        record.commit(step=report.iteration, epoch=report.epoch, files=files, entries=[entry], seconds=report.state.seconds)
    record.finish()


@pytest.fixture
def store(trained, tmp_path) -> DirectoryStore:
    """A copy of that store, which a test may damage."""
    return DirectoryStore(Path(shutil.copytree(trained, tmp_path / "store")))


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> tuple[BestCheckpoint, Path]:
    """The best of the four, exported with all files."""
    (chosen,) = best(open_store(str(trained)))
    out = tmp_path_factory.mktemp("exported") / "model"
    return chosen, export_one(
        chosen, open_store(str(trained)), out, runtime=ONE_THREAD, commands={chosen.best.plan.trial_id: "rrn-sweep x.yaml"}
    ).folder


def export_one(chosen: BestCheckpoint, store, out: Path, **how: Any) -> Exported:
    (done,) = export([chosen], store, out, **how)
    return done


def best(store, plans: list[TrialPlan] = PLANS, **rule: Any) -> list[BestCheckpoint]:
    return best_checkpoint.best(plans, read_manifests(store, "demo"), **rule)


def damage(store: DirectoryStore, chosen: best_checkpoint.Candidate) -> None:
    (store.root / chosen.checkpoint.objects["model.safetensors"].key).write_bytes(b"damaged")


def finish(store, plan: TrialPlan, *scores: float, retention: Retention | None = None, done: bool = True) -> None:
    """A trial with these mIoUs (0..1), one per epoch, and checkpoints without networks."""
    record = TrialRecord.open(store, plan, retention=retention or Retention(last=9))
    for epoch, score in enumerate(scores, start=1):
        entry = EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=0, metrics=dict.fromkeys(HEADS, score) | {"val/miou_branch1": 1 - score})
        record.commit(step=10 * epoch, epoch=epoch, files={"model.safetensors": b"w"}, entries=[entry], seconds=1)
    if done:
        record.finish()


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def model_of(**settings: Any) -> Model:
    """Random networks that were never trained."""
    config = configure("digits", **settings)
    quartet = build_networks(config, 11)
    return load_model(pack(quartet.state_dict(), training_metadata(config, quartet)))


def scenes(count: int, side: int = 64) -> list[Pixels]:
    data = open_dataset(configure("digits", image_size=side, val_images=count, train_images=8), ONE_THREAD)
    return [data.val[i][0] for i in range(count)]


class TestChoice:
    @pytest.fixture
    def store(self, tmp_path) -> DirectoryStore:
        """An empty store."""
        return DirectoryStore(tmp_path / "store")

    def test_the_best_of_all_is_the_highest_epoch_of_a_finished_trial_and_ties_go_by_order(self, store):
        for plan, scores in zip(PLANS, ((0.2, 0.5), (0.5, 0.1), (0.3, 0.3), (0.9, 0.9)), strict=True):
            finish(store, plan, *scores, done=plan is not PLANS[3])
        (chosen,) = best(store)
        assert (chosen.label, chosen.best.entry.epoch, chosen.value, chosen.trials) == ("1/4 seed 1", 1, 0.5, 3)
        assert (chosen.best.checkpoint.step, chosen.notes) == (10, ())

    def test_each_partition_has_its_own_best_and_the_mean_over_its_seeds(self, store):
        for plan, scores in zip(PLANS, ((0.2, 0.5), (0.4, 0.1), (0.3, 0.2), (0.25, 0.3)), strict=True):
            finish(store, plan, *scores)
        quarter, half = best(store, per=["partition"])
        assert [quarter.group, half.group] == [{"partition": "1/4"}, {"partition": "1/2"}]
        assert (quarter.label, quarter.best.by_seed) == ("1/4 seed 0", {0: 0.5, 1: 0.4})
        assert (half.label, half.best.by_seed) == ("1/2 seed 0", {0: 0.3, 1: 0.3})
        head, first, second, _, *notes = best_checkpoint.render([quarter, half]).splitlines()
        assert head.split()[:5] == ["partition", "trial", "label", "of", "epoch"]
        assert first.split()[0] == "1/4"
        assert first.split()[4:] == ["0", "2", "2/2", "20", "50.00", "50.00", "50.00", "50.00", "2", "45.00", "+-", "7.07"]
        assert second.split()[-4:] == ["2", "30.00", "+-", "0.00"]
        assert "chosen and measured on the same images, the validation list of digits (6 images), so its number is optimistic" in notes[0]
        assert notes[1].startswith("seeds: the best of several, which is optimistic too")
        assert len(notes) == 2

    def test_at_last_only_the_last_epochs_are_compared(self, store):
        for plan, scores in zip(PLANS[:2], ((0.9, 0.2), (0.1, 0.3)), strict=True):
            finish(store, plan, *scores)
        (chosen,) = best(store, at="last")
        assert (chosen.label, chosen.best.entry.epoch, chosen.best.by_seed) == ("1/4 seed 1", 2, {0: 0.2, 1: 0.3})

    def test_after_its_last_epoch_a_single_trial_was_not_chosen_on_its_validation_images(self, store):
        finish(store, PLANS[0], 0.9, 0.2)
        (chosen,) = best(store, at="last")
        assert "which was not used to choose it" in best_checkpoint.render([chosen])
        assert "seeds:" not in best_checkpoint.render([chosen])

    def test_another_metric_can_decide(self, store):
        finish(store, PLANS[0], 0.9, 0.2)
        (chosen,) = best(store, metric="val/miou_branch1")
        assert (chosen.best.entry.epoch, chosen.value) == (2, pytest.approx(0.8))

    def test_a_best_epoch_without_a_stored_checkpoint_is_noted_and_the_best_stored_one_chosen(self, store):
        finish(store, PLANS[0], 0.8, 0.1, 0.3, 0.2, retention=Retention(last=2, best=False))
        finish(store, PLANS[1], 0.1, 0.2)
        (chosen,) = best(store)
        assert (chosen.label, chosen.best.entry.epoch) == ("1/4 seed 0", 3)
        assert chosen.notes == (
            "epoch 1 of 1/4 seed 0 was better (80.00 %), but its checkpoint is no longer stored; the best stored one is used",
        )
        assert chosen.notes[0] in best_checkpoint.render([chosen])

    def test_a_group_without_a_finished_trial_is_named(self, store):
        finish(store, PLANS[0], 0.5)
        finish(store, PLANS[2], 0.5, done=False)
        choices = best(store, per=["partition"])
        absent = best_checkpoint.missing(PLANS, choices, per=["partition"])
        assert absent == ["1/2"]
        assert best_checkpoint.render(choices, absent).splitlines()[-1] == "1/2: no finished trial with a stored checkpoint"

    def test_a_choice_that_is_impossible_is_an_error_of_one_line(self, store):
        with pytest.raises(SweepError, match=r"^no trial of this sweep is finished yet"):
            best(store)
        finish(store, PLANS[0], 0.5)
        with pytest.raises(SweepError, match=r'^--per partitoin: unknown setting; did you mean "partition"\?$'):
            best(store, per=["partitoin"])
        with pytest.raises(SweepError, match=r"^--metric train/loss: expected a metric that starts with val/miou or val/iou$"):
            best(store, metric="train/loss")

    def test_the_module_loads_without_torch(self):
        code = "import sys, orchestration.export.export_folder; print(sorted({'torch', 'onnx', 'cv2', 'boto3', 'rich'} & set(sys.modules)))"
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "[]"


class TestClasses:
    """The weights number the classes as their training did, whatever the data say now."""

    @pytest.fixture
    def own(self, tmp_path) -> tuple[Path, BestCheckpoint, Any]:
        """The data of one's own, and the best checkpoint of a trial on them."""
        root, store = make_folder(tmp_path / "data"), open_store(str(tmp_path / "store"))
        runtime = ONE_THREAD.model_copy(update={"data_root": root})
        base = SMALL_SUPERVISED | {"dataset": "folder", "partition": "1/2", "epochs": 1, "batch_size": 2}
        (plan,) = expand(check({"name": "demo", "preset": "digits", "base": base}))
        finish_trained(store, plan, runtime)
        (chosen,) = best(store, [plan])
        return root, chosen, store

    def test_the_card_names_them_in_the_order_of_the_scores(self, own, tmp_path):
        root, chosen, store = own
        for name, classes in (("same", "[background, thing]"), ("moved", "[thing, background]\nvalues: [1, 0]")):
            (root / "dataset.yaml").write_text(f"classes: {classes}\n")
            runtime = ONE_THREAD.model_copy(update={"data_root": root})
            folder = export_one(chosen, store, tmp_path / name, runtime=runtime, onnx=False).folder
            assert "Label values: 0 background, 1 thing; 255 is void." in (folder / "README.md").read_text()

    def test_data_with_other_classes_are_refused_with_both_lists(self, own, tmp_path):
        root, chosen, store = own
        (root / "dataset.yaml").write_text("classes: [background, object]\n")
        told = r"for 2 classes \(background, thing\), the data have 2 classes \(background, object\); give the data of this sweep"
        with pytest.raises(SweepError, match=told):
            export_one(chosen, store, tmp_path / "out", runtime=ONE_THREAD.model_copy(update={"data_root": root}), onnx=False)
        folder = export_one(chosen, store, tmp_path / "out", runtime=ONE_THREAD, onnx=False).folder
        assert "Label values: 0 background, 1 thing" in (folder / "README.md").read_text()


@needs_onnx
class TestFolder:
    def test_the_onnx_file_names_the_classes_in_the_order_of_its_scores(self, exported):
        import onnx

        facts = {prop.key: prop.value for prop in onnx.load(exported[1] / "model.onnx", load_external_data=False).metadata_props}
        assert json.loads(facts["classes"]) == list(CLASSES)

    def test_the_weights_are_the_stored_bytes_and_evaluate_to_the_numbers_of_the_card(self, exported, trained):
        chosen, folder = exported
        assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.yaml", "model.onnx", "model.safetensors"]
        assert not [file for file in folder.parent.iterdir() if file != folder]
        stored = trained / chosen.best.checkpoint.objects["model.safetensors"].key
        assert (folder / "model.safetensors").read_bytes() == stored.read_bytes()
        found = evaluate_checkpoint(str(folder), ONE_THREAD)
        reported = chosen.best.entry.metrics
        assert found.miou == {head: reported[f"val/miou_{head}"] for head in ("branch1", "branch2", "ensemble")} | {
            "reported": chosen.value
        }
        (result,) = front_matter(folder)["model-index"][0]["results"]
        assert result["metrics"][0] == {"type": "mean_iou", "name": "mIoU", "value": round(chosen.value, 6)}
        row = next(line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| background"))
        shown = [float(cell) for cell in row.split("|")[2:-1]]
        assert shown == [round(100 * found.iou[head]["background"], 2) for head in ("branch1", "branch2", "ensemble")]

    def test_the_card_contains_rule_data_split_seeds_limits_and_no_licence(self, exported):
        chosen, folder = exported
        text, front = (folder / "README.md").read_text(), front_matter(folder)
        assert {"library_name", "pipeline_tag", "tags", "datasets", "metrics", "model-index"} == set(front)
        assert (front["datasets"], front["metrics"]) == (["digits"], ["mean_iou"])
        labeled = {"1/4": 4, "1/2": 8}[chosen.best.plan.config.partition]
        for line in (
            f"epoch {chosen.best.entry.epoch} of 2",
            "chosen and measured on the same images",
            "mean of val/miou over seeds 0, 1 is",
            f"{labeled} labelled, {16 - labeled} unlabelled and 6 validation scenes",
            "`rrn-sweep x.yaml`",
            chosen.best.plan.trial_id,
            "one training with one seed",
            "largest difference of two scores",
            "eps: 0.6",
        ):
            assert line in text, line

    def test_the_settings_are_a_sweep_file_of_the_same_trial(self, exported):
        chosen, folder = exported
        (plan,) = expand(load(folder / "config.yaml"))
        assert (plan.sweep, plan.trial_id) == ("demo", chosen.best.plan.trial_id)

    def test_both_snippets_of_the_card_run_and_predict_the_same_classes_as_the_evaluation(self, exported, tmp_path, monkeypatch):
        _, folder = exported
        place = Path(shutil.copytree(folder, tmp_path / "copy"))
        (image,) = scenes(1)
        Image.fromarray(image).save(place / "image.png")
        monkeypatch.chdir(place)
        model = load_model(place)
        expected = predict(model.quartet, image, model.config, torch.device("cpu"))
        snippets = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
        assert len(snippets) == 2
        for snippet in snippets:
            names: dict[str, Any] = {}
            exec(snippet, names)
            assert np.array_equal(names["labels"], expected)

    def test_the_same_model_is_updated_with_the_same_bytes_and_another_refused(self, store, exported, tmp_path):
        chosen, folder = exported
        place = Path(shutil.copytree(folder, tmp_path / "model"))
        (place / "notes.txt").write_text("mine")
        export_one(chosen, store, place, runtime=ONE_THREAD)
        assert (place / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
        export_one(chosen, store, place, runtime=ONE_THREAD, onnx=False)
        assert sorted(file.name for file in place.iterdir()) == ["README.md", "config.yaml", "model.safetensors", "notes.txt"]
        assert "onnxruntime alone" not in (place / "README.md").read_text()
        other = next(candidate for candidate in chosen.ranking if candidate.checkpoint != chosen.best.checkpoint)
        with pytest.raises(SweepError, match=r"model: holds another model; give another folder, or delete it first$"):
            export_one(best_checkpoint.BestCheckpoint({}, chosen.metric, chosen.at, 1, (other,)), store, place, runtime=ONE_THREAD)
        (place / "model.safetensors").unlink()
        with pytest.raises(SweepError, match=r"model: is not empty"):
            export_one(chosen, store, place, runtime=ONE_THREAD)
        with pytest.raises(SweepError, match=r"notes.txt: is a file"):
            export_one(chosen, store, place / "notes.txt", runtime=ONE_THREAD)

    def test_an_onnx_file_of_other_weights_is_not_left_behind(self, exported, store, tmp_path, monkeypatch):
        chosen, folder = exported
        monkeypatch.setattr(onnx_model, "write_onnx", lambda model, file, facts: shutil.copy(folder / "model.onnx", file))
        other = best_checkpoint.BestCheckpoint({}, chosen.metric, chosen.at, 1, chosen.ranking[1:])
        with pytest.raises(
            SweepError, match=r"model\.onnx was not written, the other files were: its scores differ from torch: largest diff"
        ):
            export_one(other, store, tmp_path / "model", runtime=ONE_THREAD)
        assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
        assert "ONNX: not written, because its scores differ from torch" in (tmp_path / "model" / "README.md").read_text()
        assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "store"]


class TestWithoutOnnx:
    def test_without_the_packages_everything_else_is_written_and_the_error_names_the_command(self, store, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(SweepError, match=r"onnxscript.* not installed: pip install 'rrn-sweep\[export\]', or .* --no-onnx$") as caught:
            export_one(best(store)[0], store, tmp_path / "model", runtime=ONE_THREAD)
        assert "\n" not in str(caught.value)
        assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["README.md", "config.yaml", "model.safetensors"]

    @needs_onnx
    def test_an_onnx_file_that_could_not_be_compared_is_not_published(self, store, tmp_path, monkeypatch):
        def refuse(*_: Any, **__: Any) -> None:
            raise OnnxError("onnxruntime cannot load it (no)")

        monkeypatch.setattr("orchestration.export.onnx_model.compare", refuse)
        with pytest.raises(SweepError, match="cannot load it"):
            export_one(best(store)[0], store, tmp_path / "model", runtime=ONE_THREAD)
        assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
        assert "onnx" not in front_matter(tmp_path / "model")["tags"]

    def test_the_card_of_the_only_trial_s_last_epoch_claims_no_selection_and_of_supervised_training_no_unlabelled_images(self, tmp_path):
        store = open_store(str(tmp_path / "store"))
        (plan,) = expand(check({"name": "demo", "preset": "digits", "base": SMALL_SUPERVISED}))
        finish(store, plan, 0.4, 0.5)
        (chosen,) = best(store, [plan], at="last")
        facts = ModelCardFacts((), 11, ((0.5,) * 3, (0.5,) * 3), "logits", discriminators=False, files={}, onnx="not written")
        card = model_card(chosen, facts)
        assert "not used to choose it" in card
        assert "was selected on the validation images" not in card
        assert "semi-supervised" not in card
        assert "was selected on the validation images" in model_card(best(store, [plan])[0], facts)

    def test_a_damaged_checkpoint_is_replaced_by_the_next_best_with_a_note(self, store, tmp_path):
        (chosen,) = best(store)
        damage(store, chosen.best)
        done = export_one(chosen, store, tmp_path / "model", runtime=ONE_THREAD, onnx=False)
        assert done.choice.best == chosen.ranking[1]
        assert done.choice.notes[0].startswith(f"{chosen.best.where} is unusable (demo/{chosen.best.plan.trial_id}/checkpoints/")
        assert done.choice.notes[0] in str(done)
        assert done.choice.notes[0].removeprefix("e") in (tmp_path / "model" / "README.md").read_text()

    def test_a_group_without_a_readable_checkpoint_is_an_error_and_does_not_stop_the_others(self, store, tmp_path):
        quarter, half = best(store, per=["partition"])
        for candidate in quarter.ranking:
            damage(store, candidate)
        exports = export([quarter, half], store, tmp_path / "out", runtime=ONE_THREAD, onnx=False)
        done = next(exports)
        assert done.folder == tmp_path / "out" / slug(half.label)
        with pytest.raises(SweepError, match=r"is unusable .*, and no other checkpoint is left to export$"):
            next(exports)
        assert [folder.name for folder in (tmp_path / "out").iterdir()] == [slug(half.label)]

    def test_a_folder_is_named_after_the_trial_that_was_exported(self, store, tmp_path):
        quarter, half = best(store, per=["partition"])
        rest = [candidate for candidate in quarter.ranking if candidate.plan != quarter.best.plan]
        for candidate in quarter.ranking:
            if candidate.plan == quarter.best.plan:
                damage(store, candidate)
        done = list(export([quarter, half], store, tmp_path / "out", runtime=ONE_THREAD, onnx=False))
        assert [export.folder.name for export in done] == [slug(rest[0].plan.label), slug(half.label)]

    @pytest.mark.parametrize(
        ("label", "name"),
        [
            ("1/8 eps=0.6 seed 1", "1-8-eps-0.6-seed-1"),
            ("n:92 lr=1e-05", "n-92-lr-1e-05"),
            ("scales=(0.5, 1.0)", "scales-0.5-1.0"),
            ("../../etc", "etc"),
            ("labeled_list=C:\\lists\\ä\n.txt", "labeled_list-C-lists-.txt"),
            ("...", "model"),
        ],
    )
    def test_a_label_becomes_a_folder_name_that_is_valid_anywhere(self, label, name):
        assert slug(label) == name
        assert len(slug(label * 50)) <= 80

    def test_labels_that_would_share_a_name_get_the_id_appended(self, tmp_path):
        spec = check({"name": "demo", "preset": "digits", "base": SMALL, "grid": {"eps": [0.60001, 0.60002, 0.7]}})
        store = open_store(str(tmp_path / "store"))
        for plan in (plans := expand(spec)):
            finish(store, plan, 0.5)
        names = folder_names(best(store, plans, per=["eps"]))
        assert names == {
            plans[0].trial_id: f"eps-0.6-{plans[0].trial_id}",
            plans[1].trial_id: f"eps-0.6-{plans[1].trial_id}",
            plans[2].trial_id: "eps-0.7",
        }

    def test_class_names_keep_the_order_of_the_label_values_even_if_a_head_has_no_iou(self):
        metrics = {"val/iou_branch1/sky": 0.1, "val/iou_branch1/car": 0.2, "val/iou_ensemble/sky": 0.3, "val/miou": 0.5}
        assert class_names(metrics) == ("sky", "car")


class TestScores:
    @pytest.mark.parametrize("settings", [{"ensemble": "none"}, {"ensemble": "logits", "ensemble_weight": 0.3}, {"ensemble": "prob"}])
    def test_the_scores_are_those_that_the_evaluation_takes_the_argmax_of(self, settings):
        model = model_of(**settings)
        (image,) = scenes(1, side=150)
        with torch.inference_mode():
            labels = slide(image, Scores(model), crop=64, batch=model.config.eval_batch).argmax(dim=0)
        assert np.array_equal(labels.numpy(), predict(model.quartet, image, model.config, torch.device("cpu")))

    @needs_onnx
    def test_probabilities_are_exported_for_any_size_without_paths_of_this_machine(self, tmp_path):
        import onnx

        model = model_of(ensemble="prob", ensemble_weight=0.3)
        write_onnx(model, tmp_path / "m.onnx", {"label": "1/8"})
        agreement = compare(tmp_path / "m.onnx", model, scenes(5, side=100), "scenes", threads=1)
        assert agreement.holds
        assert agreement.difference < 1e-5
        assert agreement.largest <= 1
        assert agreement.equal > 0.9999
        assert (agreement.windows, agreement.shapes) == (21, ((64, 64), (64, 48)))
        graph = onnx.load(tmp_path / "m.onnx")
        assert [(prop.key, prop.value) for prop in graph.metadata_props] == [("label", "1/8")]
        axes = [
            [dim.dim_param or dim.dim_value for dim in tensor.type.tensor_type.shape.dim]
            for tensor in (*graph.graph.input, *graph.graph.output)
        ]
        assert axes == [["batch", 3, "height", "width"], ["batch", 11, "height", "width"]]
        resizes = [node for node in graph.graph.node if node.op_type == "Resize"]
        assert {attribute.s for node in resizes for attribute in node.attribute if attribute.name == "coordinate_transformation_mode"} == {
            b"align_corners"
        }
        assert b".py" not in (tmp_path / "m.onnx").read_bytes()

    @needs_onnx
    def test_one_changed_bias_is_detected(self, exported, tmp_path):
        import onnx

        _, folder = exported
        graph = onnx.load(folder / "model.onnx")
        (bias,) = [tensor for tensor in graph.graph.initializer if tensor.name == "branch2.classifier.bias"]
        values = onnx.numpy_helper.to_array(bias).copy()
        values[3] += 0.02
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        onnx.save(graph, tmp_path / "m.onnx")
        agreement = compare(tmp_path / "m.onnx", load_model(folder), scenes(1), "a scene", threads=1)
        assert agreement.difference == pytest.approx(0.01, rel=0.05)
        assert not agreement.holds

    @needs_onnx
    def test_other_weights_and_nan_scores_are_detected(self, exported):
        _, folder = exported
        (image,) = scenes(1)
        assert compare(folder / "model.onnx", load_model(folder), [image], "a scene", threads=1).holds
        assert not compare(folder / "model.onnx", model_of(seed=5), [image], "a scene", threads=1).holds
        broken = load_model(folder)
        with torch.no_grad():
            broken.quartet.branch1.classifier.bias.fill_(float("nan"))
        assert not compare(folder / "model.onnx", broken, [image], "a scene", threads=1).holds

    @needs_onnx
    def test_a_file_that_onnxruntime_cannot_load_is_an_error_of_one_line(self, tmp_path):
        (tmp_path / "m.onnx").write_bytes(b"not a model")
        with pytest.raises(OnnxError, match=r"^onnxruntime cannot load it \(") as caught:
            compare(tmp_path / "m.onnx", model_of(), scenes(1), "a scene", threads=1)
        assert "\n" not in str(caught.value)

    @needs_onnx
    @pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid")
    def test_it_agrees_on_real_photographs_in_larger_windows_than_at_export(self, exported):
        _, folder = exported
        images = [np.asarray(Image.open(file).convert("RGB")) for file in sorted(CAMVID.iterdir())[::40]]
        agreement = compare(folder / "model.onnx", load_model(folder, changes={"crop": 256}), images, "photographs", threads=1)
        print(agreement)
        assert agreement.holds
        assert agreement.equal > 0.9999
