"""Importing, starting from and loading weights: what is accepted, what is refused, and that nothing pickled runs."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from places import ROOT
from safetensors.torch import save_file
from torch import Tensor

from rrn_core import ConfigError, DataError, configure
from rrn_core.class_names import order_of
from rrn_core.config import TrainConfig
from rrn_core.foreign_weights import read_released
from rrn_core.methods import build_networks
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.discriminators import Discriminator
from rrn_core.optimisation import Optimisers
from rrn_core.setting import Setting, setting_of
from rrn_core.state import TrainState
from rrn_core.weights import initialise, load_model, pack, recognise, training_metadata, unpack

CLASSES = 7


def config(**settings: Any) -> TrainConfig:
    return configure("digits", **{"scales": (1.0,), **settings})


def branches(backbone: str = "tiny", *, seed: int = 1, prefix: str = "") -> dict[str, Tensor]:
    """A state dict of two branches as RRN and CPS name it, every value drawn."""
    generator = torch.Generator().manual_seed(seed)
    made = {f"branch{i}.{key}": tensor for i in (1, 2) for key, tensor in Branch(backbone, CLASSES).state_dict().items()}
    return {prefix + key: torch.randn(t.shape, generator=generator) if t.is_floating_point() else t + 5 for key, t in made.items()}


def judge(kind: str = "patch", seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return Discriminator(CLASSES, kind=kind, width=8, region_kernel=1).state_dict()


def backbone(name: str = "resnet18") -> dict[str, Tensor]:
    """A ResNet v1c as ImageNet weights name it."""
    return {**Branch(name, 2).backbone.state_dict(), "fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}


def optimiser() -> dict[str, Any]:
    return {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def saved(tmp_path: Path, value: Any, name: str = "weights.pth") -> Path:
    torch.save(value, tmp_path / name)
    return tmp_path / name


def imported(tmp_path: Path, value: Any) -> bytes:
    return read_released(saved(tmp_path, value)).to_bytes()


# import


def test_a_checkpoint_of_rrn_becomes_ours_without_its_optimisers(tmp_path):
    judges = [judge(seed=i) | {"fc.weight": torch.zeros(1, 64), "fc.bias": torch.zeros(1)} for i in (1, 2)]
    file = saved(
        tmp_path,
        {
            "model": branches(prefix="module."),
            **{f"optimizer_{side}": optimiser() for side in ("l", "r", "D1", "D2")},
            **{f"model_D{i + 1}": {f"module.{key}": tensor for key, tensor in found.items()} for i, found in enumerate(judges)},
            "epoch": 33,
            "iteration": 55,
        },
    )
    found = read_released(file)
    tensors, metadata = unpack(found.to_bytes())
    assert (metadata.kind, metadata.backbone, metadata.num_classes, metadata.discriminator) == ("branches", "tiny", CLASSES, "patch")
    assert str(found).startswith("weights.pth: ")
    expected = branches() | {f"D{i + 1}.{k}": v for i, found in enumerate(judges) for k, v in found.items() if not k.startswith("fc.")}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert set(found.unexpected) == {
        *(f"optimizer_{side}.state.0.momentum_buffer" for side in ("l", "r", "D1", "D2")),
        *(f"model_D{i}.module.fc.{part}" for i in (1, 2) for part in ("weight", "bias")),
    }
    assert not found.missing
    assert "both branches, 7 classes, tiny; D1 and D2: patch" in str(found)
    assert "left out" in str(found)


@pytest.mark.parametrize("nest", [lambda x: x, lambda x: {"state_dict": x}, lambda x: {"a": {"model": x}, "epoch": 3}])
def test_a_checkpoint_of_cps_is_found_however_it_is_nested(tmp_path, nest):
    weights = {key: tensor for key, tensor in branches().items() if not key.endswith("num_batches_tracked")}
    found = read_released(saved(tmp_path, nest(weights)))
    assert (found.metadata.backbone, found.metadata.discriminator) == ("tiny", None)
    assert set(found.matched) == set(weights)
    assert found.missing
    assert all(name.endswith("num_batches_tracked") and found.tensors[name] == 0 for name in found.missing)
    assert "set to 0" in str(found)


def test_a_v1c_backbone_is_imported_without_its_classifier(tmp_path):
    found = read_released(saved(tmp_path, backbone(), "resnet18_v1c.pth"))
    assert (found.metadata.kind, found.metadata.backbone, found.metadata.num_classes) == ("backbone", "resnet18", None)
    assert set(found.tensors) == {f"backbone.{key}" for key in backbone() if not key.startswith("fc.")}
    assert set(found.unexpected) == {"fc.weight", "fc.bias"}


def test_safetensors_are_imported_too_and_half_precision_is_widened(tmp_path):
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in branches().items()}
    save_file(half, tmp_path / "weights.safetensors")
    found = read_released(tmp_path / "weights.safetensors")
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32, torch.int64}
    assert torch.equal(found.tensors["branch2.classifier.bias"], half["branch2.classifier.bias"].float())


def test_the_released_resnet50_is_recognised_by_its_names_and_shapes():
    shapes = {name: tuple(shape) for name, shape in golden.load_json("keys")["network"].items()}
    metadata, missing = recognise(shapes)
    assert (metadata.kind, metadata.backbone, metadata.num_classes, missing) == ("branches", "resnet50", 21, ())


@pytest.mark.parametrize("kind", ["image", "patch", "pixel"])
def test_the_kind_of_discriminators_follows_from_their_last_layer(tmp_path, kind):
    file = saved(tmp_path, {"model": branches(), "discriminator1": judge(kind), "discriminator2": judge(kind)})
    assert read_released(file).metadata.discriminator == kind


def test_equal_tensors_give_equal_bytes_whatever_their_file_is_called(tmp_path):
    weights = backbone()
    first, second = (read_released(saved(tmp_path, weights, name)).to_bytes() for name in ("a.pth", "b.pth"))
    assert first == second


def test_a_score_saved_as_a_numpy_number_is_no_obstacle(tmp_path):
    found = read_released(saved(tmp_path, {"model": branches(), "best": np.float64(0.7), "epoch": np.int64(3)}))
    assert found.metadata.kind == "branches"


def test_discriminators_that_are_incomplete_or_for_other_classes_are_left_out(tmp_path):
    torch.manual_seed(0)
    other = Discriminator(CLASSES + 1, kind="patch", width=8, region_kernel=1).state_dict()
    headless = {key: tensor for key, tensor in judge().items() if not key.startswith("classifier")}
    for judges in ((judge(), headless), (other, other)):
        found = read_released(saved(tmp_path, {"model": branches(), "D1": judges[0], "D2": judges[1]}))
        assert found.metadata.discriminator is None
        assert any(key.startswith("D1.conv1") for key in found.unexpected)


@pytest.mark.slow
def test_equal_weights_and_metadata_give_equal_bytes_in_every_process(tmp_path):
    """The writer of safetensors orders several entries of metadata anew in every process."""
    file = saved(tmp_path, backbone("tiny"))
    code = "import sys, hashlib, pathlib; from rrn_core.foreign_weights import read_released as r; "
    code += "print(hashlib.sha256(r(pathlib.Path(sys.argv[1])).to_bytes()).hexdigest())"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", code, file], env=environment, capture_output=True, text=True, check=True).stdout.strip()
    assert other == hashlib.sha256(read_released(file).to_bytes()).hexdigest()


# refusal


class Payload:
    """Writes a file when it is unpickled the careless way."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    planted = tmp_path / "planted"
    zipped = saved(tmp_path, {"model": branches(), "x": Payload(planted)}, "zipped.pth")
    plain = tmp_path / "plain.pth"
    plain.write_bytes(pickle.dumps(Payload(planted), protocol=2))
    for file in (zipped, plain):
        with pytest.raises(DataError, match=r"\.pth: holds posix\.mkdir beside tensors; .* save its state_dict alone$"):
            read_released(file)
        assert not planted.exists()
    pickle.loads(plain.read_bytes())  # the payload is a live one
    assert planted.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 0.5])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, name, kept):
    body = pack(branches(), recognised()) if name.endswith("safetensors") else saved(tmp_path, branches()).read_bytes()
    (tmp_path / name).write_bytes(body[: int(kept * len(body)) if isinstance(kept, float) else kept])
    with pytest.raises(DataError, match=r"weights\.\w+: not .*get the file again$") as caught:
        read_released(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"x\.pth: no such file$"):
        read_released(tmp_path / "x.pth")


def test_a_torchvision_stem_is_refused_with_the_way_out(tmp_path):
    weights = {key: tensor for key, tensor in backbone().items() if not key.startswith("conv1.")}
    file = saved(tmp_path, weights | {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(
        DataError, match=r"its stem is one convolution of 64 x 3 x 7 x 7 .*, expected three convolutions .* use a v1c ResNet"
    ):
        read_released(file)


def test_an_unknown_depth_is_refused_with_the_known_ones(tmp_path):
    deeper = backbone() | {f"layer1.2.conv{i}.weight": torch.zeros(64, 64, 3, 3) for i in (1, 2)}
    with pytest.raises(DataError, match=r"basic blocks 3, 2, 2, 2 of 64 channels, which is none of tiny, resnet18"):
        read_released(saved(tmp_path, deeper))


def test_a_mismatch_names_the_first_tensors_with_both_shapes(tmp_path):
    weights = branches()
    del weights["branch2.classifier.bias"]
    weights["branch1.head.reduce.0.weight"] = torch.zeros(9, 16, 1, 1)
    weights["branch1.head.attention.weight"] = torch.zeros(1)
    with pytest.raises(DataError, match="looks like two branches on tiny with 7 classes, but ") as caught:
        read_released(saved(tmp_path, weights))
    assert "branch2.classifier.bias is missing" in str(caught.value)
    assert "branch1.head.attention.weight is unknown" in str(caught.value)
    assert "branch1.head.reduce.0.weight is 9 x 16 x 1 x 1, expected 16 x 16 x 1 x 1" in str(caught.value)


def test_a_file_with_one_branch_or_two_copies_of_both_is_refused(tmp_path):
    one = {key: tensor for key, tensor in branches().items() if key.startswith("branch1.")}
    with pytest.raises(DataError, match=r"branch2\.backbone\.conv1\.0\.weight is missing; .* and \d+ more"):
        read_released(saved(tmp_path, one))
    with pytest.raises(DataError, match=r"model\.branch1\.\S+ and ema\.branch1\.\S+ both hold branch1\."):
        read_released(saved(tmp_path, {"model": branches(), "ema": branches()}))


def test_a_file_without_any_network_of_ours_shows_its_keys(tmp_path):
    with pytest.raises(DataError, match=r"expected two branches or one ResNet; its first keys: blocks\.0\.weight$"):
        read_released(saved(tmp_path, {"blocks": {"0.weight": torch.zeros(1)}}))


# initialise


def test_a_backbone_starts_both_branches_and_leaves_the_heads(tmp_path):
    quartet, before = (build_networks(config(backbone="resnet18"), CLASSES) for _ in range(2))
    weights = backbone()
    text = initialise(quartet, imported(tmp_path, weights), classes=NAMES)
    for branch, old in ((quartet.branch1, before.branch1), (quartet.branch2, before.branch2)):
        assert all(torch.equal(tensor, weights[key]) for key, tensor in branch.backbone.state_dict().items())
        assert same(branch.head, old.head)
        assert same(branch.classifier, old.classifier)
    assert same(quartet.D1, before.D1)
    assert text == "backbone resnet18 in both branches"


def test_branches_and_discriminators_start_the_same_parts(tmp_path):
    quartet = build_networks(config(), CLASSES)
    weights, judges = branches(), [judge(seed=1), judge(seed=2)]
    text = initialise(quartet, imported(tmp_path, {"model": weights, "D1": judges[0], "D2": judges[1]}), classes=NAMES)
    expected = weights | {f"D{i + 1}.{key}": tensor for i, found in enumerate(judges) for key, tensor in found.items()}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in quartet.state_dict().items())
    assert text == "both branches; both discriminators; the file does not name its classes, so they are matched by number"


@pytest.mark.parametrize(
    ("settings", "judges", "text"),
    [
        ({}, {}, "discriminators start at random: the file has none"),
        ({}, {"D1": judge("image"), "D2": judge("image")}, "are of kind image, the run's of kind patch"),
        ({"discriminator_width": 4}, {"D1": judge(), "D2": judge()}, "of other sizes"),
        ({"method": "cps"}, {"D1": judge(), "D2": judge()}, "the method has no discriminators"),
    ],
)
def test_discriminators_that_do_not_fit_stay_as_drawn_and_the_text_says_so(tmp_path, settings, judges, text):
    quartet, before = (build_networks(config(**settings), CLASSES) for _ in range(2))
    assert text in initialise(quartet, imported(tmp_path, {"model": branches(), **judges}), classes=NAMES)
    assert quartet.D1 is before.D1 is None or (same(quartet.D1, before.D1) and same(quartet.D2, before.D2))


def test_weights_that_do_not_fit_the_run_are_refused(tmp_path):
    body = imported(tmp_path, branches())
    with pytest.raises(DataError, match=r"^init_weights: the weights are for 7 classes, the data have 11; start from"):
        initialise(build_networks(config(), 11), body, classes=[f"c{k}" for k in range(11)])
    with pytest.raises(DataError, match=r"^init_weights: the weights are of tiny, the run is of resnet18; set backbone: tiny$"):
        initialise(build_networks(config(backbone="resnet18"), CLASSES), body, classes=NAMES)
    with pytest.raises(DataError, match=r"^init_weights: not a readable safetensors file"):
        initialise(build_networks(config(), CLASSES), body[:-9], classes=NAMES)


def test_other_contents_than_planned_are_refused(tmp_path):
    body = imported(tmp_path, branches())
    quartet = build_networks(config(), CLASSES)
    initialise(quartet, body, classes=NAMES, sha256=hashlib.sha256(body).hexdigest())
    with pytest.raises(DataError, match=r"init_weights: planned with SHA-256 0{12}, found [0-9a-f]{12}; restore the file"):
        initialise(quartet, body, classes=NAMES, sha256="0" * 64)


def test_safetensors_that_say_nothing_of_themselves_are_refused(tmp_path):
    save_file(branches(), tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="rrn-sweep weights import"):
        initialise(build_networks(config(), CLASSES), (tmp_path / "x.safetensors").read_bytes(), classes=NAMES)


# classes

NAMES = tuple("abcdefg")


def named(names: tuple[str, ...] | None, body: bytes) -> bytes:
    tensors, metadata = unpack(body)
    return pack(tensors, metadata.model_copy(update={"classes": names}))


def test_classes_in_another_order_start_branches_and_discriminators_by_name():
    order = [3, 0, 1, 2, 6, 5, 4]
    trained = build_networks(config(seed=5), CLASSES).eval()
    body = pack(trained.state_dict(), training_metadata(config(), trained, NAMES))
    moved = build_networks(config(), CLASSES).eval()
    initialise(moved, body, classes=[NAMES[k] for k in order])
    image, maps = torch.rand(2, 3, 64, 64), torch.rand(2, CLASSES, 64, 64)
    with torch.no_grad():
        assert torch.equal(moved.branch2(image), trained.branch2(image)[:, order])
        before, after = (torch.cat([classes, image], dim=1) for classes in (maps, maps[:, order]))
        assert torch.allclose(moved.D1(after)[0], trained.D1(before)[0], atol=1e-5)
        model = load_model(body).ordered_as([NAMES[k] for k in order], remedy="")
        assert torch.equal(model.quartet.branch1(image), moved.branch1(image))
    assert model.metadata.classes == tuple(NAMES[k] for k in order)


def test_other_class_names_are_refused_with_both_lists(tmp_path):
    body, quartet = imported(tmp_path, branches()), build_networks(config(), CLASSES)
    texts = r"for 7 classes \(a, b, c, d, e, f, g\), the data have 7 classes \(A, b, c, d, e, f, g\); start from an ImageNet backbone$"
    with pytest.raises(DataError, match=f"^init_weights: the weights are {texts}"):
        initialise(quartet, named(NAMES, body), classes=["A", *NAMES[1:]])
    many = tuple(f"name{k}" for k in range(150))
    with pytest.raises(DataError, match="the data have 151 classes") as caught:
        order_of([*many, "sky"], many, remedy="give other data")
    assert str(caught.value) == "the weights are for 150 classes, the data have 151 classes (among them sky); give other data"
    assert order_of(["caf\u00e9", "b"], ["b", "cafe\u0301"], remedy="") == (1, 0)


def test_weights_without_names_are_matched_by_number_and_say_so(tmp_path):
    body, quartet = imported(tmp_path, branches()), build_networks(config(), CLASSES)
    assert "does not name its classes, so they are matched by number" in initialise(quartet, body, classes=NAMES)
    with pytest.raises(DataError, match="for 7 classes, the data have 8; start from"):
        initialise(quartet, body, classes=(*NAMES, "h"))


@pytest.mark.parametrize("names", [("a", "b"), ("a",) * CLASSES, (*NAMES[1:], ""), (*NAMES[1:], "x\x1b[2J")])
def test_class_names_that_contradict_the_file_are_refused(tmp_path, names):
    with pytest.raises(DataError, match=r"its metadata was written by .* \(classes: must be 7 different names\)"):
        load_model(named(names, imported(tmp_path, branches())))


# load_model


def test_a_training_checkpoint_loads_by_what_it_says_of_itself(tmp_path):
    trained = config(seed=4, ensemble_weight=0.3)
    state = TrainState(build_networks(trained, CLASSES), Optimisers(build_networks(trained, CLASSES), trained), trained)
    state.save(tmp_path)
    for source in (tmp_path, tmp_path / "model.safetensors", state.to_files()["model.safetensors"]):
        model = load_model(source)
        assert (model.num_classes, model.config.ensemble_weight, model.config.seed) == (CLASSES, 0.3, 4)
        assert same(model.quartet.branch2, state.quartet.branch2)
        assert not model.quartet.branch1.training


def test_a_window_that_the_discriminators_would_forbid_can_be_evaluated():
    trained = config(crop=128, region_kernel=8)
    state = TrainState(build_networks(trained, CLASSES), Optimisers(build_networks(trained, CLASSES), trained), trained)
    assert load_model(state.to_files()["model.safetensors"], changes={"crop": 64}).config.crop == 64


def test_an_imported_file_loads_with_its_backbone_and_the_callers_settings(tmp_path):
    weights = branches()
    model = load_model(imported(tmp_path, weights), changes={"dataset": "camvid", "crop": 96})
    assert (model.config.backbone, model.config.dataset, model.config.crop, model.num_classes) == ("tiny", "camvid", 96, CLASSES)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.quartet.state_dict().items())


def test_imported_weights_are_evaluated_on_cityscapes_in_its_windows(tmp_path):
    body = imported(tmp_path, branches())
    assert load_model(body, changes={"dataset": "cityscapes"}).config.crop == 800
    assert load_model(body, changes={"dataset": "voc"}).config.crop == 512


def test_models_that_cannot_be_evaluated_are_refused(tmp_path):
    with pytest.raises(DataError, match="holds a backbone alone"):
        load_model(imported(tmp_path, backbone()))
    with pytest.raises(ConfigError, match=r"crop: Input should be greater than or equal to 64, got 3"):
        load_model(imported(tmp_path, branches()), changes={"crop": 3})
    with pytest.raises(ConfigError, match="backbone: the weights are of tiny, got resnet50"):
        load_model(imported(tmp_path, branches()), changes={"backbone": "resnet50"})
    with pytest.raises(DataError, match="no such file"):
        load_model(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"crop": 3}, r"crop: Input should be greater than or equal to 64, got 3$"),
        ({"method": "foo"}, r'method: must be one of cps, rrn, supervised, got "foo"$'),
    ],
)
def test_settings_in_a_file_that_cannot_be_used_are_a_fault_of_the_file(settings, told):
    stored = recognised().model_copy(update={"config": {"backbone": "tiny"} | settings})
    for changes in ({}, {"eval_batch": 1}):
        with pytest.raises(DataError, match=f"^checkpoint: {told}"):
            load_model(pack(branches(), stored), changes=changes)


def test_settings_that_no_evaluation_reads_are_refused_by_name(tmp_path):
    body = imported(tmp_path, branches())
    for changes, told in (
        ({"emsemble": "prob"}, "emsemble: unknown setting, did you mean ensemble?; change settings such as"),
        ({"eps": 0.7}, "eps: only a training reads this setting; change"),
        ({"partition_by": "list"}, "checkpoint: partition_by: list and labeled_list need each other"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_model(body, changes=changes)
        assert told in str(caught.value)
    assert str(caught.value) == "checkpoint: partition_by: list and labeled_list need each other"


def test_a_setting_that_the_file_does_not_know_has_its_neutral_value(monkeypatch):
    monkeypatch.setattr(
        "rrn_core.evaluation_settings.setting_of",
        lambda field: Setting("evaluation", neutral="none") if field is ensemble else setting_of(field),
    )
    ensemble = TrainConfig.model_fields["ensemble"]
    assert load_model(pack(branches(), recognised().model_copy(update={"config": {"backbone": "tiny"}}))).config.ensemble == "none"


def recognised():
    return recognise({key: tuple(tensor.shape) for key, tensor in branches().items()})[0]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


# stems


def mmseg(name: str) -> dict[str, Tensor]:
    """A ResNet v1c as mmsegmentation names it, inside a segmentor."""
    own = Branch(name, 2).backbone.state_dict()
    renamed = {key.replace("bn1.", "stem.7.", 1) if key.startswith("bn1.") else key: tensor for key, tensor in own.items()}
    return {f"backbone.{key.replace('conv1.', 'stem.', 1) if key.startswith('conv1.') else key}": t for key, t in renamed.items()}


@pytest.mark.parametrize("name", ["resnet18", "resnet50_stem32"])
def test_a_v1c_backbone_of_mmsegmentation_is_imported(tmp_path, name):
    weights = mmseg(name)
    found = read_released(saved(tmp_path, {"meta": {"epoch": 1}, "state_dict": weights | {"decode_head.conv_seg.bias": torch.zeros(2)}}))
    assert (found.metadata.kind, found.metadata.backbone) == ("backbone", name)
    assert torch.equal(found.tensors["backbone.conv1.6.weight"], weights["backbone.stem.6.weight"])
    assert torch.equal(found.tensors["backbone.bn1.bias"], weights["backbone.stem.7.bias"])
    assert found.unexpected == ("state_dict.decode_head.conv_seg.bias",)


@pytest.mark.parametrize(
    ("stem", "told"),
    [
        ({"conv1.weight": (64, 3, 7, 7)}, r"one convolution of 64 x 3 x 7 x 7 \(conv1\.weight\)"),
        (
            {"stem.conv1.conv.weight": (32, 3, 3, 3), "stem.conv2.weight": (64, 32, 3, 3)},
            r"2 convolutions of 32 x 3 x 3 x 3 \(stem\.conv1\.conv\.weight\)",
        ),
        ({}, "of an unknown form"),
    ],
)
def test_another_stem_is_named(tmp_path, stem, told):
    weights = {key: tensor for key, tensor in backbone().items() if not key.startswith(("conv1.", "bn1."))}
    with pytest.raises(DataError, match=rf"its stem is {told}.*expected three convolutions"):
        read_released(saved(tmp_path, {name: torch.zeros(shape) for name, shape in stem.items()} | weights))
