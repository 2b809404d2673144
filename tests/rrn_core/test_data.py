"""Data sets, augmentation, CutMix and batches."""

import random
from dataclasses import fields

import cv2
import golden
import numpy as np
import pytest
import torch
from places import SHARED

from rrn_core import ConfigError, DataError, configure
from rrn_core.config import Runtime, TrainConfig, iterations_per_epoch
from rrn_core.data import digits
from rrn_core.data.augment import augment, draw, normalise, pad
from rrn_core.data.batch import IMAGENET_MEAN, IMAGENET_STD
from rrn_core.data.batches import Batches, loader
from rrn_core.data.camvid import CLASSES, CamVid
from rrn_core.data.cutmix import box_masks
from rrn_core.data.dataset import find_split, open_dataset
from rrn_core.data.digits import Digits

CAMVID = SHARED / "data" / "camvid"
needs_camvid = pytest.mark.skipif(not CAMVID.is_dir(), reason="CamVid is not in ../shared/data/camvid")


def config(**changes) -> TrainConfig:
    return configure("digits", **{"train_images": 40, "val_images": 4, "batch_size": 8, **changes})


def equal(a, b) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))


# digits


def test_a_scene_depends_on_split_index_and_size_alone():
    small, large = Digits("train", 3, 64), Digits("train", 30, 64)
    for a, b in zip(small[2], large[2], strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(small[0][0], small[1][0])
    assert not np.array_equal(small[0][0], Digits("val", 3, 64)[0][0])


@pytest.mark.parametrize("side", [64, 100, 256])
def test_scenes_have_the_size_and_the_labels_that_they_promise(side):
    scenes = Digits("train", 12, side)
    labels = set()
    for i in range(len(scenes)):
        image, label = scenes[i]
        assert image.shape == (side, side, 3)
        assert label.shape == (side, side)
        assert image.dtype == label.dtype == np.uint8
        labels |= set(np.unique(label).tolist())
    assert labels <= {*range(11), 255}
    assert {0, 255} < labels
    assert len(scenes.names) == len(set(scenes.names)) == 12


def test_every_digit_occurs_about_as_often_as_any_other():
    scenes = Digits("train", 256, 64)
    counts = np.sum([np.bincount(scenes[i][1].ravel(), minlength=256)[1:11] > 0 for i in range(len(scenes))], axis=0)
    assert counts.min() > 0.6 * counts.max()


def test_a_larger_scene_shows_the_same_digits():
    small, large = Digits("val", 6, 64), Digits("val", 6, 256)
    for i in range(6):
        label, shrunk = small[i][1], cv2.resize(large[i][1], (64, 64), interpolation=cv2.INTER_NEAREST)
        known = (label != 255) & (shrunk != 255)
        assert (label == shrunk)[known].mean() > 0.97


def test_void_separates_every_digit_from_the_background():
    label = Digits("train", 1, 64)[0][1].astype(int)
    for a, b in ((label[:, 1:], label[:, :-1]), (label[1:], label[:-1])):
        assert ((a == b) | (a == 255) | (b == 255)).all()


def test_training_and_validation_scenes_share_no_handwriting():
    train, val = ({scan.tobytes() for scan in digits._glyphs(split)[0]} for split in ("train", "val"))
    assert len(train) + len(val) >= 1790
    assert not train & val


def test_a_digit_stands_out_from_the_background_around_it():
    scenes = Digits("train", 64, 64)
    contrasts = []
    for i in range(len(scenes)):
        image, label = scenes[i]
        brightness = image.mean(axis=2) / 255
        contrasts.append(abs(brightness[(label > 0) & (label < 255)].mean() - brightness[label == 0].mean()))
    assert min(contrasts) > 0.2


def test_a_scene_beyond_the_end_is_an_index_error():
    with pytest.raises(IndexError):
        Digits("train", 3, 64)[3]


# the data set that a configuration names


@pytest.mark.parametrize("cache", [True, False])
def test_memory_changes_no_image(cache):
    data = open_dataset(config(), Runtime(cache_images=cache))
    assert data.classes == digits.CLASSES
    assert (len(data.train), len(data.val)) == (40, 4)
    assert np.array_equal(data.train[5][0], Digits("train", 40, 64)[5][0])
    assert (data.train[5][0] is data.train[5][0]) == cache
    assert data.val.names[0] == "val_00000"


def test_class_names_can_be_part_of_a_metric_name():
    for name in (*digits.CLASSES, *CLASSES):
        assert name.replace("_", "").isalnum()
    assert (len(digits.CLASSES), len(CLASSES)) == (11, 11)


# CamVid


@pytest.fixture
def tiny_camvid(tmp_path):
    """Two images a split, listed in the original's way: b (v_b), then a (v_a)."""
    for split, names in (("train", ("b", "a")), ("val", ("v_b", "v_a"))):
        for kind in ("", "annot"):
            (tmp_path / f"{split}{kind}").mkdir()
        for name in names:
            image = np.full((6, 8, 3), (30, 20, 10), np.uint8)  # blue, green, red on disk
            cv2.imwrite(str(tmp_path / split / f"{name}.png"), image)
            cv2.imwrite(str(tmp_path / f"{split}annot" / f"{name}.png"), np.arange(48, dtype=np.uint8).reshape(6, 8) % 12)
        lines = [f"/SegNet/CamVid/{split}/{name}.png /SegNet/CamVid/{split}annot/{name}.png" for name in names]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def tiny(root):
    """Configuration and place of `tiny_camvid`, every image labelled."""
    return configure(dataset="camvid", partition="full"), Runtime(data_root=root, cache_images=False)


def test_original_lists_are_read_in_their_order(tiny_camvid):
    assert CamVid(tiny_camvid).train_names() == ("b", "a")
    assert open_dataset(*tiny(tiny_camvid)).train.names == ("b", "a")


def test_a_folder_without_a_list_is_read_by_name(tiny_camvid):
    (tiny_camvid / "train.txt").unlink()
    assert CamVid(tiny_camvid).train_names() == ("a", "b")


def test_images_are_rgb_and_class_eleven_is_void(tiny_camvid):
    image, label = open_dataset(*tiny(tiny_camvid)).train[0]
    assert image[0, 0].tolist() == [10, 20, 30]
    assert set(np.unique(label).tolist()) == {*range(11), 255}
    assert (label == 255).sum() == 4


def test_a_missing_label_is_named(tiny_camvid):
    (tiny_camvid / "trainannot" / "a.png").unlink()
    with pytest.raises(DataError, match=r"^dataset camvid: labelled images without a label file: a; add the files or choose other images$"):
        find_split(*tiny(tiny_camvid))
    (tiny_camvid / "valannot" / "v_b.png").unlink()
    with pytest.raises(
        DataError, match=r"^dataset camvid: validation images without a label file: v_b; add the files or remove the images$"
    ):
        find_split(*tiny(tiny_camvid))


def test_a_missing_image_is_named(tiny_camvid):
    (tiny_camvid / "train" / "a.png").unlink()
    with pytest.raises(
        DataError, match=r"1 of 2 training images are missing: a; .*train: a\.png or a\.jpg is missing, but the train list names it$"
    ):
        open_dataset(*tiny(tiny_camvid))


def test_a_label_of_another_size_is_named_with_both_sizes(tiny_camvid):
    cv2.imwrite(str(tiny_camvid / "trainannot" / "a.png"), np.zeros((5, 8), np.uint8))
    with pytest.raises(DataError, match=r"a\.png: 8 x 5, but a\.png is 8 x 6$"):
        open_dataset(*tiny(tiny_camvid)).train[1]


def test_a_label_out_of_range_is_named_with_its_value(tiny_camvid):
    cv2.imwrite(str(tiny_camvid / "trainannot" / "a.png"), np.full((6, 8), 131, np.uint8))
    with pytest.raises(DataError, match=r"a\.png: labels must be 0\.\.11 or 255, got 131$"):
        open_dataset(*tiny(tiny_camvid)).train[1]


def test_camvids_colours_are_its_classes_and_another_colour_is_refused(tiny_camvid):
    colours = np.tile(np.array([*CamVid.palette, (0, 0, 0)], np.uint8), (4, 1)).reshape(6, 8, 3)
    cv2.imwrite(str(tiny_camvid / "trainannot" / "a.png"), colours[..., ::-1])
    assert open_dataset(*tiny(tiny_camvid)).train[1][1].ravel()[:13].tolist() == [*range(11), 255, 0]
    colours[0, 0] = 1, 2, 3
    cv2.imwrite(str(tiny_camvid / "trainannot" / "a.png"), colours[..., ::-1])
    with pytest.raises(DataError, match=r"a\.png: an RGB mask with colours that are not stated: \[1, 2, 3\]; save the mask in"):
        open_dataset(*tiny(tiny_camvid)).train[1]


@pytest.mark.parametrize("folder", ["val", "valannot"])
@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_an_unreadable_file_is_named_before_training_starts(tiny_camvid, folder, content):
    (tiny_camvid / folder / "v_a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"{folder}/v_a\.png: not a readable image(, or truncated)?$"):
        open_dataset(configure(dataset="camvid"), Runtime(data_root=tiny_camvid))


def test_camvid_without_a_root_says_what_to_do():
    with pytest.raises(DataError, match=r"dataset camvid: no data root; .* data_root"):
        open_dataset(configure(dataset="camvid"), Runtime())


def test_a_root_without_the_layout_is_named(tmp_path):
    with pytest.raises(DataError, match="train: no such folder; data_root must hold train/"):
        CamVid(tmp_path).train_names()


@needs_camvid
def test_the_published_camvid_has_367_training_and_101_validation_images():
    data = open_dataset(configure(dataset="camvid"), Runtime(data_root=CAMVID, cache_images=False))
    assert (len(data.train), len(data.val)) == (367, 101)
    for images in (data.train, data.val):
        image, label = images[len(images) - 1]
        assert image.shape == (360, 480, 3)
        assert set(np.unique(label).tolist()) <= {*range(11), 255}
        assert image[label == 0].mean() > 128  # class 0 is the sky


@needs_camvid
def test_batches_of_camvid_have_the_shape_of_the_crop():
    c = configure(dataset="camvid", crop=128, batch_size=2, region_kernel=4, partition="1/16")
    batches = Batches(c, open_dataset(c, Runtime(data_root=CAMVID, cache_images=False)))
    assert len(batches.labeled) == 23
    assert batches.iterations_per_epoch == iterations_per_epoch(c, 367) == 172
    assert batches[0].u1.shape == (2, 3, 128, 128)


# augmentation


@pytest.mark.parametrize("seed", range(6))
def test_augmentation_equals_the_release(seed):
    reference = golden.load("prep")
    chance = random.Random(seed)  # replays the release's draws, in its order
    flip, scale = chance.random() >= 0.5, chance.choice([0.5, 0.75, 1, 1.5, 1.75, 2])
    start = tuple(chance.randint(0, side - 100 + 1) if side > 100 else 0 for side in (int(90 * scale), int(110 * scale)))
    assert reference[f"t{seed}.flip_scale"].tolist() == [flip, scale]
    image, label = augment(reference["img"], reference["gt"], flip=flip, scale=scale, start=start, crop=100)
    assert np.array_equal(label, reference[f"t{seed}.gt"])
    np.testing.assert_allclose(image[:, ::3, ::3], reference[f"t{seed}.img_every3"], rtol=0, atol=1e-6)


def test_a_crop_that_starts_one_past_the_end_is_padded_by_one_pixel():
    image, label = np.full((70, 70, 3), 9, np.uint8), np.ones((70, 70), np.uint8)
    out, out_label = augment(image, label, flip=False, scale=1.0, start=(7, 0), crop=64)
    assert (out_label[-1] == 255).all()
    assert (out_label[:-1] == 1).all()
    assert (out[:, -1] == 0).all()


def test_padding_is_split_evenly_and_an_odd_pixel_goes_to_the_end():
    padded = pad(np.ones((2, 3), int), 5, 4, value=7)
    assert padded.tolist() == [[7, 7, 7, 7], [1, 1, 1, 7], [1, 1, 1, 7], [7, 7, 7, 7], [7, 7, 7, 7]]


def test_normalisation_is_imagenets():
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    expected = ((image / 255 - IMAGENET_MEAN) / IMAGENET_STD).transpose(2, 0, 1)
    np.testing.assert_allclose(normalise(image), expected, rtol=0, atol=1e-6)


def test_decisions_cover_their_range_and_nothing_else():
    c = config(hflip=0.25, scales=[0.5, 1.0, 2.0])
    generator = np.random.default_rng(0)
    drawn = [draw(generator, (70, 64), c) for _ in range(4000)]
    assert {d["scale"] for d in drawn} == {0.5, 1.0, 2.0}
    assert abs(np.mean([d["flip"] for d in drawn]) - 0.25) < 0.03
    assert {d["start"] for d in drawn if d["scale"] == 0.5} == {(0, 0)}
    assert {d["start"] for d in drawn if d["scale"] == 1.0} == {(top, 0) for top in range(8)}
    assert {d["start"][1] for d in drawn if d["scale"] == 2.0} == set(range(66))


# CutMix


@pytest.mark.parametrize("case", "abcd")
def test_box_masks_equal_the_release(case):
    reference = golden.load("cutmix")
    count, height, width, seed = reference[f"{case}.cfg"].tolist()
    masks = box_masks(np.random.RandomState(seed), count, height, width, boxes=3, area=(0.25, 0.5))
    expected = np.unpackbits(reference[f"{case}.packed"])[: masks.size].reshape(masks.shape)
    assert masks.dtype == np.float32
    assert np.array_equal(masks, expected)


def test_the_distribution_of_boxes_equals_the_release():
    reference = golden.load("cutmix")
    areas = box_masks(np.random.default_rng(0), 4000, 128, 128, boxes=3, area=(0.25, 0.5)).mean(axis=(1, 2, 3))
    mean, deviation, *_ = reference["dist.area_mean_std_min_max"]
    assert abs(areas.mean() - mean) < 0.005
    assert abs(areas.std() - deviation) < 0.005
    one = box_masks(np.random.default_rng(0), 4000, 128, 128, boxes=1, area=(0.25, 0.5)).mean(axis=(1, 2, 3))
    assert abs(one.mean() - reference["onebox.area_mean_std_min_max"][0]) < 0.005


@pytest.mark.parametrize(("area", "share"), [((0.0, 0.0), 0.0), ((1.0, 1.0), 1.0)])
def test_an_empty_and_a_whole_box_give_an_empty_and_a_whole_mask(area, share):
    assert (box_masks(np.random.default_rng(0), 3, 20, 30, boxes=1, area=area) == share).all()


# batches


@pytest.fixture(scope="module")
def data():
    return open_dataset(config(), Runtime())


def test_a_batch_has_the_promised_shapes_and_types(data):
    batch = Batches(config(batch_size=3), data)[0]
    for image in (batch.x, batch.u0, batch.u1):
        assert (image.shape, image.dtype) == ((3, 3, 64, 64), torch.float32)
    for label in (batch.y, batch.hidden0, batch.hidden1):
        assert (label.shape, label.dtype) == ((3, 64, 64), torch.int64)
    assert (batch.mask.shape, batch.mask.dtype) == ((3, 1, 64, 64), torch.float32)
    assert set(batch.mask.unique().tolist()) == {0.0, 1.0}


def test_a_batch_is_a_function_of_seed_and_iteration(data):
    batches = Batches(config(seed=4), data)
    late = batches[9]
    assert equal(late, Batches(config(seed=4), data)[9])
    assert not torch.equal(late.x, batches[8].x)
    assert not torch.equal(late.x, Batches(config(seed=5), data)[9].x)


def test_streams_and_masks_do_not_share_their_randomness(data):
    batch = Batches(config(partition="full"), data)[0]
    assert not torch.equal(batch.x, batch.u0)
    assert not torch.equal(batch.u0, batch.u1)
    assert not torch.equal(batch.mask[0], batch.mask[1])


def test_every_pass_of_a_stream_sees_every_image_once(data):
    batches = Batches(config(batch_size=6, partition="1/4"), data)  # 10 labelled images: passes end within batches
    for stream, indices in ((0, batches.labeled), (1, batches.unlabeled), (2, batches.unlabeled)):
        seen = [i for iteration in range(30) for i in batches._shuffled(stream, indices, iteration)]
        passes = [seen[k : k + len(indices)] for k in range(0, len(seen) - len(indices) + 1, len(indices))]
        assert all(sorted(p) == indices for p in passes)
        assert passes[0] != passes[1]


def test_labeled_images_come_with_their_labels_and_hidden_labels_belong_to_their_images(data):
    c = config(partition="1/8", hflip=0.0, scales=[1.0])
    batches = Batches(c, data)
    known = {data.train[i][1].tobytes() for i in batches.labeled}
    hidden = {data.train[i][1].tobytes() for i in batches.unlabeled}
    batch = batches[0]
    assert {y.numpy().astype(np.uint8).tobytes() for y in batch.y} <= known
    images = {normalise(data.train[i][0]).tobytes(): data.train[i][1] for i in batches.unlabeled}
    for u, h in ((batch.u0, batch.hidden0), (batch.u1, batch.hidden1)):
        for image, label in zip(u, h, strict=True):
            assert label.numpy().astype(np.uint8).tobytes() in hidden
            assert np.array_equal(images[image.numpy().tobytes()], label)


@pytest.mark.parametrize(("partition", "expected"), [("1/8", 35 // 8), ("1/2", 20 // 8), ("full", 40 // 8), ("n:3", 37 // 8)])
def test_an_epoch_is_as_long_as_the_longer_stream(data, partition, expected):
    assert Batches(config(partition=partition), data).iterations_per_epoch == expected


def test_a_balanced_partition_reads_the_labels(data):
    settings = config(partition="1/8", partition_by="balanced")
    batches = Batches(settings, open_dataset(settings, Runtime()))
    assert len(batches.labeled) == 5
    classes = set().union(*(np.unique(data.train[i][1]).tolist() for i in batches.labeled))
    assert len(classes - {0, 255}) >= 9


def test_a_partition_larger_than_the_data_is_refused(data):
    with pytest.raises(ConfigError, match="asks for 41 labelled images; the training list has 40"):
        Batches(config(partition="n:41"), data)


def test_worker_processes_change_no_batch(data):
    batches = Batches(config(), data)
    alone = list(loader(batches, start=0, stop=6, workers=0, pin=False))
    helped = list(loader(batches, start=0, stop=6, workers=2, pin=False))
    assert len(alone) == len(helped) == 6
    assert all(equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_start_in_the_middle_gives_the_tail(data):
    batches = Batches(config(), data)
    whole = list(loader(batches, start=0, stop=7, workers=0, pin=False))
    tail = list(loader(batches, start=4, stop=7, workers=0, pin=False))
    assert len(tail) == 3
    assert all(equal(a, b) for a, b in zip(whole[4:], tail, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_every_global_random_state_alone(data, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    list(loader(Batches(config(), data), start=0, stop=2, workers=workers, pin=False))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
