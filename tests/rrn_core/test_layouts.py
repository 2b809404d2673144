"""How data sets lie on disk: VOC, Cityscapes and a plain folder; the lists of the field; what becomes a run's identity."""

import re
import shutil
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from places import SHARED
from scipy.io import savemat

from rrn_core import DataError, configure
from rrn_core.config import Runtime, TrainConfig
from rrn_core.data import cityscapes, voc
from rrn_core.data.dataset import find_split, open_dataset, open_layout, open_validation, split_indices
from rrn_core.data.images import read_image
from rrn_core.data.labels import Legend, decode_label, label_table, read_label, voc_palette
from rrn_core.data.lists import find_file, image_name, read_list, roots
from rrn_core.data.published import PUBLISHED, names_hash

DATA = SHARED / "data"
SPLITS, VOC_MINI = DATA / "splits", DATA / "voc_mini"
needs_splits = pytest.mark.skipif(not SPLITS.is_dir(), reason="the published lists are not in ../shared/data/splits")
needs_voc_mini = pytest.mark.skipif(not VOC_MINI.is_dir(), reason="the three VOC images are not in ../shared/data/voc_mini")

SIZE = 6, 4
"""Width and height of the images made here."""
VOC = voc._Voc.legend


def write_image(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (10, 20, 30)).save(file)


def write_mask(file: Path, *values: int, palette: bool = False) -> None:
    """A column for each value, the last one repeated; as grey levels, or as indices of VOC's colours."""
    columns = [values[min(x, len(values) - 1)] for x in range(SIZE[0])]
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.tile(np.array(columns, np.uint8), (SIZE[1], 1)))
    if palette:
        image.putpalette([channel for colour in voc_palette(256) for channel in colour])
    image.save(file)


def write_sbd(file: Path, value: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, {"GTcls": {"Segmentation": np.full(SIZE[::-1], value, np.uint8), "CategoriesPresent": np.array([value], np.uint8)}})


def write_list(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def touch(*files: Path) -> None:
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.touch()


def at(root: Path) -> Runtime:
    return Runtime(data_root=root, cache_images=False)


def of(dataset: str, **changes) -> TrainConfig:
    return configure(dataset=dataset, **changes)


def first_values(images) -> dict[str, int]:
    """The upper left label of each image."""
    return {name: int(images[i][1][0, 0]) for i, name in enumerate(images.names)}


def roles(config: TrainConfig, root: Path) -> tuple[list[str], list[str]]:
    """Names of the labelled and of the unlabelled images."""
    data = open_dataset(config, at(root))
    return tuple([data.train.names[i] for i in indices] for indices in split_indices(config, data))


# lists


@pytest.mark.parametrize(
    "line",
    [
        "2007_000032",
        "JPEGImages/2007_000032.jpg SegmentationClass/2007_000032.png",
        "/images/train/2007_000032.png\t/segmentation/train/2007_000032_gtFine.png",
        "2007_000032\t./pseudo/other.png",
        "2007_000032  1",
        "2007_000032\t1",
        "2007_000032.jpg 1",
        "  VOC2012\\JPEGImages\\2007_000032.JPG   ",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \n"])
def test_lists_of_every_spelling_name_the_same_images(tmp_path, line, end):
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbf" + f"{line}{end}second one.png{end}my images/third one.jpg masks/3.png{end}v1.2".encode()
    )
    assert read_list(tmp_path / "list.txt") == ("2007_000032", "second one", "third one", "v1.2")


def test_the_image_and_the_label_of_cityscapes_have_one_name():
    for ending in ("_leftImg8bit.png", "_gtFine.png", ""):
        assert image_name(f"leftImg8bit/train/ulm/ulm_000000_000019{ending}") == "ulm_000000_000019"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"a\nb\nA\nb.png\n", "listed more than once: b; remove the repeated lines"),
        (b"\n \n", "lists no images; write one name per line"),
        (b"\xff\xfe", "expected UTF-8 text"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused(tmp_path, content, fault):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"list\.txt: .*{fault}$"):
        read_list(tmp_path / "list.txt")


def test_a_file_is_looked_for_at_each_root_in_turn(tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    touch(a / "other.txt", b / "1-8.txt", c / "1-8.txt")
    assert find_file("1-8.txt", roots=[a, b, c]) == b / "1-8.txt"
    assert find_file(str(c / "1-8.txt"), roots=[a, b]) == c / "1-8.txt"
    with pytest.raises(DataError, match=r"1-4\.txt: no such file; looked for .*/a/1-4\.txt, .*/b/1-4\.txt$"):
        find_file("1-4.txt", roots=[a, b])


def test_relative_paths_start_at_the_sweep_s_folder_then_at_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweeps, data, lists = Path("/sweeps"), Path("/data"), Path("/data/lists")
    assert roots(Runtime(lists_root=sweeps, data_root=data), lists) == (sweeps, data, lists)
    assert roots(Runtime()) == (tmp_path,)


# label files


def test_palette_and_grey_labels_read_alike(tmp_path):
    write_mask(tmp_path / "grey.png", 0, 1, 20, 255)
    write_mask(tmp_path / "palette.png", 0, 1, 20, 255, palette=True)
    grey, palette = (read_label(tmp_path / f"{name}.png", VOC) for name in ("grey", "palette"))
    assert grey[0].tolist() == palette[0].tolist() == [0, 1, 20, 255, 255, 255]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_labels_of_few_bits_keep_their_values(tmp_path, bits):
    values = [0, 1, 1, 0] if bits == 1 else [0, 1, 2, 3]
    (tmp_path / "a.png").write_bytes(grey_png(values, bits=bits))
    assert decode_label(tmp_path / "a.png", VOC).values.tolist() == [values]


def grey_png(values: list[int], *, bits: int) -> bytes:
    """A row of grey values; Pillow writes 8 bits only."""
    row = int("".join(f"{value:0{bits}b}" for value in values).ljust(32, "0"), 2).to_bytes(4, "big")[: -(-len(values) * bits // 8)]
    return png(len(values), 1, bits, row)


def png(width: int, height: int, bits: int, row: bytes) -> bytes:
    """A grey PNG whose header claims any size, and that holds one row."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


def test_files_that_the_decoders_refuse_are_named(tmp_path):
    """OpenCV and Pillow have exceptions of their own for more pixels than they decode."""
    (tmp_path / "huge.png").write_bytes(png(60_000, 60_000, 8, bytes(4)))
    with pytest.raises(DataError, match=r"huge\.png: not a readable image \(.*CV_IO_MAX_IMAGE_PIXELS.*\)$"):
        read_image(tmp_path / "huge.png")
    with pytest.raises(DataError, match=r"huge\.png: 60000 x 60000 pixels; at most 1073 megapixels are read; split it$"):
        decode_label(tmp_path / "huge.png", VOC)


def test_an_image_that_memory_does_not_hold_is_no_fault_of_the_file(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png")

    def no_memory(*_: object) -> None:
        error = cv2.error("Failed to allocate 99 bytes")
        error.code, error.err = cv2.Error.StsNoMem, "Failed to allocate 99 bytes"
        raise error

    monkeypatch.setattr(cv2, "imdecode", no_memory)
    with pytest.raises(MemoryError, match=r"a\.png: out of memory while decoding$"):
        read_image(tmp_path / "a.png")


def test_a_table_renames_and_refuses(tmp_path):
    write_mask(tmp_path / "a.png", 7, 9)
    assert read_label(tmp_path / "a.png", Legend(label_table({7: 0, 9: 255})))[0, :2].tolist() == [0, 255]
    with pytest.raises(DataError, match=r"a\.png: labels must be 0 or 5\.\.7 or 255, got 9$"):
        read_label(tmp_path / "a.png", Legend(label_table({0: 0, 5: 1, 6: 1, 7: 1, 255: 255})))


def test_sixteen_bits_transparency_and_foreign_mat_files_are_no_labels(tmp_path):
    Image.new("I;16", SIZE).save(tmp_path / "deep.png")
    Image.new("RGBA", SIZE).save(tmp_path / "colour.png")
    savemat(tmp_path / "other.mat", {"x": 1})
    faults = (("deep.png", "got mode I;16"), ("colour.png", "has transparent pixels, .*"), ("other.mat", "not one of SBD's cls files"))
    for name, fault in faults:
        with pytest.raises(DataError, match=rf"{name}: .*{fault}$"):
            decode_label(tmp_path / name, VOC)


def test_vocs_colours_are_vocs():
    assert voc_palette(21)[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
    assert voc_palette(21)[20] == (0, 64, 128)
    assert voc_palette(256)[255] == (224, 224, 192)


def test_class_names_can_be_part_of_a_metric_name_and_have_a_colour_each():
    for layout, classes in ((voc._Voc, 21), (cityscapes._Cityscapes, 19)):
        assert len(layout.classes) == len(set(layout.classes)) == len(layout.palette) == len(set(layout.palette)) == classes
        assert all(re.fullmatch(r"\w+", name) for name in layout.classes)


# VOC


@pytest.fixture
def devkit(tmp_path):
    """VOC2012 as downloaded: t1 and t2 to train, v to validate, all of class 1; x has no label of VOC's."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("t1", "t2", "v", "x"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        if name != "x":
            write_mask(root / "SegmentationClass" / f"{name}.png", 1, palette=True)
    write_list(root / "ImageSets" / "Segmentation" / "train.txt", "t2", "t1")
    write_list(root / "ImageSets" / "Segmentation" / "val.txt", "v")
    return root


@pytest.mark.parametrize("up", [0, 1, 2])
def test_vocs_own_images_are_found_from_every_folder_above_them(devkit, up):
    config = of("voc", train_list="train.txt", partition="1/2")
    root = [devkit, *devkit.parents][up]
    assert roles(config, root) == (["t2"], ["t1"])
    assert first_values(open_dataset(config, at(root)).val) == {"v": 1}


def test_without_additional_labels_voc_says_what_to_do(devkit):
    with pytest.raises(DataError, match=r"VOC2012: has labels for 2 training images.* set train_list: train\.txt"):
        find_split(of("voc"), at(devkit))


@pytest.mark.parametrize("place", ["VOCdevkit/VOC2012/SBD", "sbd", "SBD", "benchmark_RELEASE/dataset", "VOCdevkit/sbd"])
def test_sbd_adds_its_images_but_never_labels_validation_ones(devkit, tmp_path, place):
    for name in ("x", "t1", "v"):
        write_sbd(tmp_path / place / "cls" / f"{name}.mat", 5)
    data = open_dataset(of("voc"), at(tmp_path))
    assert first_values(data.train) == {"t1": 1, "t2": 1, "x": 5}
    assert first_values(data.val) == {"v": 1}
    assert first_values(open_dataset(of("voc"), at(devkit)).train)["x"] == 5
    (devkit / "SegmentationClass" / "v.png").unlink()
    with pytest.raises(DataError, match=r"validation images without a label file: v; add the files or remove the images$"):
        open_dataset(of("voc"), at(tmp_path))


def test_augmented_labels_are_preferred_and_give_the_training_images(devkit):
    for name in ("x", "t1", "t2", "v"):
        write_mask(devkit / "SegmentationClassAug" / f"{name}.png", 7)
    data = open_dataset(of("voc"), at(devkit))
    assert first_values(data.train) == {"t1": 7, "t2": 7, "x": 7}
    assert first_values(data.val) == {"v": 1}


def test_masks_of_all_images_in_the_place_of_vocs_own_give_the_training_images(devkit):
    write_mask(devkit / "SegmentationClass" / "x.png", 3)  # as UniMatch's users have them
    assert open_layout(of("voc"), at(devkit)).train_names() == ("t1", "t2", "x")


@pytest.mark.parametrize("name", ["train_aug.txt", "trainaug.txt"])
def test_the_list_of_train_aug_is_taken_sorted(devkit, name):
    write_list(devkit / "ImageSets" / "Segmentation" / name, "/JPEGImages/x.jpg /SegmentationClassAug/x.png", "t1")
    assert open_layout(of("voc"), at(devkit)).train_names() == ("t1", "x")


def test_a_labelled_image_needs_a_label_and_an_unlabelled_one_does_not(devkit):
    write_list(devkit / "all.txt", "t1", "x")
    data = open_dataset(of("voc", train_list="all.txt", partition="1/2"), at(devkit))
    assert (data.train[1][1] == 255).all()
    assert split_indices(of("voc", partition="1/2"), data) == ([0], [1])
    with pytest.raises(DataError, match=r"^dataset voc: labelled images without a label file: x; add the files or choose other images$"):
        find_split(of("voc", train_list="all.txt", partition="full"), at(devkit))


def test_images_that_a_list_names_must_be_there_and_all_that_are_not_are_counted(devkit):
    write_list(devkit / "all.txt", "t1", "gone", "g2", "g3", "g4")
    fault = r"^dataset voc: 4 of 5 training images are missing: gone, g2, g3 and 1 more; .*: gone\.jpg is missing, but a list names it$"
    with pytest.raises(DataError, match=fault):
        find_split(of("voc", train_list="all.txt"), at(devkit))


def test_a_validation_image_is_not_trained_on(devkit):
    write_list(devkit / "all.txt", "t1", "v")
    with pytest.raises(DataError, match=r"^dataset voc: both training and validation images: v; remove them from one of the lists$"):
        find_split(of("voc", train_list="all.txt"), at(devkit))


def test_a_root_without_voc_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"^{tmp_path}: not VOC 2012; data_root must hold"):
        find_split(of("voc"), at(tmp_path))


@needs_voc_mini
def test_real_voc_images_and_palette_labels_are_read():
    data = open_dataset(of("voc", train_list="train.txt", partition="1/2"), at(VOC_MINI))
    assert (data.train.names, data.val.names) == (("2011_000003", "2011_000006"), ("2011_000025",))
    image, label = data.train[0]
    assert image.shape == (338, 500, 3)
    assert {voc.CLASSES[k] for k in np.unique(label) if k != 255} == {"background", "bottle", "person"}
    assert set(np.unique(data.val[0][1])) == {0, 6, 7}


# CPS's copy of VOC


def cps_voc(root: Path, names) -> Path:
    """CPS's folders without any content, and one validation image."""
    touch(*(root / "train_aug" / "image" / f"{name}.jpg" for name in names), root / "val" / "image" / "v.jpg")
    touch(*(root / "train_aug" / "label" / f"{name}.png" for name in names), root / "val" / "label" / "v.png")
    return root


@pytest.fixture(scope="module")
def published_voc(tmp_path_factory):
    """The holder of pascal_voc with all 10582 names."""
    lists = [read_list(SPLITS / "voc" / f"train_aug_{role}_1-16.txt") for role in ("labeled", "unlabeled")]
    return cps_voc(tmp_path_factory.mktemp("voc") / "pascal_voc", lists[0] + lists[1]).parent


@needs_splits
@pytest.mark.parametrize("k", [16, 8, 4, 2])
def test_every_kth_voc_image_is_the_published_partition(published_voc, k):
    labeled, unlabeled = roles(of("voc", partition=f"1/{k}"), published_voc)
    assert labeled == list(read_list(SPLITS / "voc" / f"train_aug_labeled_1-{k}.txt"))
    assert unlabeled == list(read_list(SPLITS / "voc" / f"train_aug_unlabeled_1-{k}.txt"))
    assert len(labeled) + len(unlabeled) == 10582


@needs_splits
@pytest.mark.parametrize(("dataset", "partition"), PUBLISHED)
def test_the_published_partitions_are_known_by_their_hashes(dataset, partition):
    names = read_list(SPLITS / dataset / f"train_aug_labeled_{partition.replace('/', '-')}.txt")
    assert names_hash(names) == PUBLISHED[dataset, partition]


@needs_splits
def test_the_published_lists_give_the_split_of_every_kth(published_voc):
    written = {"labeled_list": "train_aug_labeled_1-{k}.txt", "unlabeled_list": "train_aug_unlabeled_1-{k}.txt"}
    place = Runtime(data_root=published_voc, lists_root=SPLITS / "voc")
    by_rule = find_split(of("voc", partition="1/8"), place)
    assert find_split(of("voc", partition="1/8", partition_by="list", **written), place) == by_rule
    assert find_split(of("voc", partition="1/8", partition_by="list", labeled_list=written["labeled_list"]), place) == by_rule


@needs_splits
@pytest.mark.parametrize(("k", "name"), [(16, "2008_004822"), (8, "2009_001036"), (4, "2007_000032"), (2, "2009_000662")])
def test_the_published_lists_that_name_a_labelled_image_as_unlabelled_are_refused(published_voc, k, name):
    config = of(
        "voc",
        partition=f"1/{k}",
        partition_by="list",
        labeled_list="pseudoseg_labeled_1-{k}.txt",
        unlabeled_list="pseudoseg_unlabeled_1-{k}.txt",
    )
    fault = rf"pseudoseg_unlabeled_1-{k}\.txt: also in the labelled list: {name}; remove the names from one of the lists$"
    with pytest.raises(DataError, match=fault):
        find_split(config, Runtime(data_root=published_voc, lists_root=SPLITS / "voc"))


def test_lists_within_cpss_folder_are_found(tmp_path):
    root = cps_voc(tmp_path / "pascal_voc", ["c", "a", "b"])
    write_list(root / "subset_train_aug" / "train_aug_labeled_1-8.txt", "b")
    config = of("voc", partition="1/8", partition_by="list", labeled_list="subset_train_aug/train_aug_labeled_1-{k}.txt")
    assert roles(config, tmp_path) == roles(config, root) == (["b"], ["a", "c"])


def test_cpss_validation_list_counts_where_it_is(tmp_path):
    root = cps_voc(tmp_path, ["a", "b"])
    touch(root / "val" / "image" / "w.jpg", root / "val" / "label" / "w.png")
    assert open_layout(of("voc"), at(root)).val_names() == ("v", "w")
    write_list(root / "val.txt", "w")
    assert open_layout(of("voc"), at(root)).val_names() == ("w",)


# Cityscapes


def download(root: Path, *, kind: str = "labelIds", values: tuple[int, ...] = (7, 26, 0)) -> Path:
    """Two training images and a validation one by city, as Cityscapes comes."""
    for split, name in (("train", "ulm_000001_000019"), ("train", "jena_000000_000019"), ("val", "munster_000000_000019")):
        city = name.partition("_")[0]
        write_image(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        write_mask(root / "gtFine" / split / city / f"{name}_gtFine_{kind}.png", *values)
    return root


def flat(root: Path, *, values: tuple[int, ...] = (0, 13, 255)) -> Path:
    """The same images in CPS's form."""
    for split, name in (("train", "ulm_000001_000019"), ("train", "jena_000000_000019"), ("val", "munster_000000_000019")):
        write_image(root / "images" / split / f"{name}.png")
        write_mask(root / "segmentation" / split / f"{name}_gtFine.png", *values)
    return root


def test_the_three_forms_of_cityscapes_are_one_data_set(tmp_path):
    forms = [download(tmp_path / "a"), download(tmp_path / "b", kind="labelTrainIds", values=(0, 13, 255)), flat(tmp_path / "c")]
    for root in forms:
        data = open_dataset(of("cityscapes", partition="1/2"), at(root))
        assert (data.train.names, data.val.names) == (("jena_000000_000019", "ulm_000001_000019"), ("munster_000000_000019",))
        for images in (data.train, data.val):
            assert images[0][1][0].tolist() == [0, 13, 255, 255, 255, 255]
    assert len({find_split(of("cityscapes"), at(root)).sha256 for root in forms}) == 1


def test_validation_images_suffice_to_evaluate(tmp_path):
    for root in (download(tmp_path / "a"), flat(tmp_path / "b")):
        for folder in root.iterdir():
            shutil.rmtree(folder / "train")
        assert first_values(open_validation(of("cityscapes"), at(root)).val) == {"munster_000000_000019": 0}
        with pytest.raises(DataError, match="no train images"):
            find_split(of("cityscapes"), at(root))
    write_image(tmp_path / "pascal_voc" / "val" / "image" / "v.jpg")
    write_mask(tmp_path / "pascal_voc" / "val" / "label" / "v.png", 3)
    assert first_values(open_validation(of("voc"), at(tmp_path)).val) == {"v": 3}


def test_all_19_classes_have_their_label_ids(tmp_path):
    table = open_layout(of("cityscapes"), at(download(tmp_path))).legend.table
    meanings = {cityscapes.CLASSES[table[value]]: value for value in range(34) if table[value] < 19}
    known = {"road": 7, "pole": 17, "traffic_light": 19, "sky": 23, "rider": 25, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33}
    assert len(meanings) == 19
    assert known.items() <= meanings.items()


def test_one_kind_of_label_serves_all_files(tmp_path):
    root = download(tmp_path)
    mask = root / "gtFine" / "train" / "ulm" / "ulm_000001_000019_gtFine_labelIds.png"
    mask.rename(mask.with_name(mask.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(DataError, match="labelled images without a label file: ulm_000001_000019; "):
        find_split(of("cityscapes", partition="full"), at(root))


@pytest.mark.parametrize("where", ["train.txt", "config_new/train.txt"])
def test_cpss_list_sets_the_order_of_either_form(tmp_path, where):
    for root in (download(tmp_path / "a"), flat(tmp_path / "b")):
        lines = [f"/images/train/{name}.png\t/segmentation/train/{name}_gtFine.png" for name in ("ulm_000001_000019", "jena_000000_000019")]
        write_list(root / where, *lines)
        assert roles(of("cityscapes", partition="1/2"), root) == (["ulm_000001_000019"], ["jena_000000_000019"])


@needs_splits
def test_every_kth_cityscapes_image_is_the_published_partition_in_the_order_of_the_list(tmp_path):
    lists = SPLITS / "cityscapes"
    names = read_list(lists / "train.txt")
    touch(*(tmp_path / "images" / "train" / f"{name}.png" for name in names), tmp_path / "images" / "val" / "v_0_0.png")
    touch(*(tmp_path / "segmentation" / "train" / f"{name}_gtFine.png" for name in names))
    touch(tmp_path / "segmentation" / "val" / "v_0_0_gtFine.png")
    write_list(tmp_path / "train.txt", *(lists / "train.txt").read_text().splitlines())
    for k in (16, 8, 4, 2):
        labeled, unlabeled = roles(of("cityscapes", partition=f"1/{k}"), tmp_path)
        assert labeled == list(read_list(lists / f"train_aug_labeled_1-{k}.txt"))
        assert unlabeled == list(read_list(lists / f"train_aug_unlabeled_1-{k}.txt"))
    (tmp_path / "train.txt").unlink()
    assert roles(of("cityscapes", partition="1/16"), tmp_path)[0] != list(read_list(lists / "train_aug_labeled_1-16.txt"))


def test_unimatchs_lists_of_cityscapes_are_read(tmp_path):
    root = download(tmp_path)
    name = "ulm_000001_000019"
    line = f"leftImg8bit/train/ulm/{name}_leftImg8bit.png gtFine/train/ulm/{name}_gtFine_labelTrainIds.png"
    write_list(root / "labeled.txt", line)
    config = of("cityscapes", partition="n:1", partition_by="list", labeled_list="labeled.txt")
    assert roles(config, root) == ([name], ["jena_000000_000019"])


def test_label_ids_in_the_place_of_train_ids_are_reported_in_one_line(tmp_path):
    for root in (flat(tmp_path / "a", values=(7, 26)), download(tmp_path / "b", kind="labelTrainIds", values=(7, 26))):
        with pytest.raises(DataError, match=r"\.png: labels must be 0\.\.18 or 255, got 26; if these are Cityscapes' labelIds, .*$"):
            open_dataset(of("cityscapes"), at(root)).train[0]


def test_train_ids_in_the_place_of_label_ids_are_recognised_by_their_void(tmp_path):
    data = open_dataset(of("cityscapes"), at(download(tmp_path, values=(0, 13, 255))))
    with pytest.raises(DataError, match=r"labelIds\.png: labels must be 0\.\.33, got 255$"):
        data.train[0]


@pytest.mark.parametrize("folder", [".", "leftImg8bit"])
def test_a_root_without_cityscapes_is_named(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    with pytest.raises(DataError, match=r"not Cityscapes; data_root|gtFine: no \*_gtFine_labelIds\.png in train/CITY or val/CITY; unpack"):
        find_split(of("cityscapes"), at(tmp_path))


# a folder of one's own


@pytest.fixture
def own(tmp_path):
    """a, b and c with masks, c to validate; d without; e in unlabeled/."""
    for name in ("a.png", "b.JPG", "c.webp", "d.bmp"):
        write_image(tmp_path / "images" / name)
    write_image(tmp_path / "unlabeled" / "e.tif")
    for name in "abc":
        write_mask(tmp_path / "masks" / f"{name}.png", 0, 1, 255)
    touch(tmp_path / "images" / "._a.png", tmp_path / "images" / "Thumbs.db")
    write_list(tmp_path / "val.txt", "c")
    write_list(tmp_path / "dataset.yaml", "classes: [background, cat]")
    return tmp_path


def test_images_without_a_mask_are_unlabelled(own):
    config = of("folder", partition="1/2")
    data = open_dataset(config, at(own))
    assert data.train.names == ("a", "b", "d", "e")
    assert (data.classes, data.palette) == (("background", "cat"), ((0, 0, 0), (128, 0, 0)))
    assert split_indices(config, data) == ([0], [1, 2, 3])
    assert first_values(data.train) == {"a": 0, "b": 0, "d": 255, "e": 255}
    assert all(data.train[i][0].shape == (4, 6, 3) for i in range(4))


def test_a_training_list_sets_the_order_and_who_takes_part(own):
    write_list(own / "train.txt", "b", "d")
    assert open_dataset(of("folder"), at(own)).train.names == ("b", "d", "e")


def test_an_image_that_a_list_names_and_the_folder_calls_unlabelled_stands_there_once(own):
    write_list(own / "all.txt", "a", "b", "d")
    assert open_dataset(of("folder", train_list="all.txt"), at(own)).train.names == ("a", "b", "d", "e")
    config = of("folder", train_list="all.txt", **listed("one.txt"))
    write_list(own / "one.txt", "b")
    assert roles(config, own) == (["b"], ["a", "d", "e"])


def test_without_a_validation_list_the_folder_says_what_to_write(own):
    (own / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt: no such list; write into it the names of the validation images"):
        find_split(of("folder"), at(own))


def test_a_validation_image_needs_a_mask(own):
    write_list(own / "val.txt", "c", "d")
    with pytest.raises(DataError, match="validation images without a label file: d; "):
        find_split(of("folder"), at(own))


def test_values_colours_and_void_can_be_described(own):
    lines = "classes: {background: [1, 2, 3], cat: [4, 5, 6]}", "values: [0, 255]", "void: 1"
    write_list(own / "dataset.yaml", *lines)
    data = open_dataset(of("folder"), at(own))
    assert data.palette == ((1, 2, 3), (4, 5, 6))
    assert data.train[0][1][0, :3].tolist() == [0, 255, 1]


def test_a_binary_mask_has_no_void_unless_described(own):
    for name in "abc":
        write_mask(own / "masks" / f"{name}.png", 0, 255)
    write_list(own / "dataset.yaml", "classes: [background, cat]", "values: [0, 255]")
    assert open_dataset(of("folder"), at(own)).train[0][1][0, :2].tolist() == [0, 1]


def test_values_that_the_description_does_not_name_are_refused(own):
    write_mask(own / "masks" / "a.png", 0, 2)
    with pytest.raises(
        DataError, match=r"masks/a\.png: labels must be 0\.\.1 or 255, got 2; .*write `values: \[0, 2\]` into dataset\.yaml$"
    ):
        open_dataset(of("folder"), at(own)).train[0]


def test_no_description_is_answered_with_an_example(own):
    (own / "dataset.yaml").unlink()
    with pytest.raises(
        DataError, match=r"dataset\.yaml: cannot be read: .*; write into it, for example, `classes: \[background, cat, dog\]`$"
    ):
        find_split(of("folder"), at(own))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[a, b]", r"must be a mapping with classes, for example `classes: \[background, cat, dog\]`, got \['a', 'b'\]"),
        ("", "must be a mapping with classes, .*, got None"),
        ("clases: [a, b]", "clases: unknown key, did you mean classes.*classes: missing; write, for example"),
        ("classes: [a, b]\nviod: 255", r"viod: unknown key, did you mean void\? \(known: classes, values, void, void_colours, bits\)"),
        ("classes: [a]", "classes: must be 2 to 255 names"),
        ("classes: [a, b, a]", "classes: named more than once: a"),
        ("classes: [a, traffic light]", "letters, digits and _, .* got 'traffic light'"),
        ("classes: [a, true]", "got True"),
        ("classes: {a: [0, 0, 0], b: [0, 256, 0]}", r"classes\.b: must be a colour .* got \[0, 256, 0\]"),
        ("classes: [a, b]\nvalues: [0, 1, 2]", "values: must be one for each of the 2 classes, got 3"),
        ("classes: [a, b]\nvalues: [3, 3]", "values: given more than once: 3"),
        ("classes: [a, b]\nvoid: [255, 0]", "void: 0 is the value of class a; remove it"),
        ("classes: [a, b]\nvoid: black", "void: must be a value or a list of values in 0..255, got black"),
        ("classes: [a", "not valid YAML"),
        ("classes: [a, b]\nvoid: 2024-13-01", "void: must be a value or a list of values in 0..255, got 2024-13-01"),
        ("classes: [a, b]\nvoid: 1_8", "void: must be a value or a list of values in 0..255, got 1_8"),
        ("classes: [a, b]\nvoid: 3\nclasses: [a, c]", r'not valid YAML: the key "classes" is given twice at line 3'),
        ("classes: {a: [0, 0, 0], b: [1, 1, 1], a: [2, 2, 2]}", r'not valid YAML: the key "a" is given twice'),
    ],
)
def test_a_wrong_description_is_reported_in_one_line(own, text, fault):
    (own / "dataset.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"^{own}/dataset\.yaml: .*{fault}") as refused:
        find_split(of("folder"), at(own))
    assert "\n" not in str(refused.value)


def test_a_description_is_read_by_yaml_1_2(own):
    write_mask(own / "masks" / "a.png", 0, 10)
    write_list(own / "dataset.yaml", "classes: [background, no]", "values: [0, 010]")
    data = open_dataset(of("folder"), at(own))
    assert data.classes == ("background", "no")
    assert data.train[0][1][0, :2].tolist() == [0, 1]


def test_every_fault_of_a_description_is_reported_at_once(own):
    (own / "dataset.yaml").write_text("classes: [a, b c]\nvoid: 256\nvalue: [1, 2]")
    with pytest.raises(DataError, match=r"did you mean values.*'b c'.*void: must be"):
        find_split(of("folder"), at(own))


def test_files_that_do_not_fit_together_are_named(own):
    write_mask(own / "masks" / "a_mask.png", 0)
    with pytest.raises(
        DataError, match=r"masks: 1 of 4 masks have no image of the same name in images/: a_mask; rename or remove the masks$"
    ):
        find_split(of("folder"), at(own))
    (own / "masks" / "a_mask.png").unlink()
    write_image(own / "images" / "a.jpg")
    with pytest.raises(DataError, match=r"images: more than one file of the same name: a; keep one$"):
        find_split(of("folder"), at(own))
    (own / "images" / "a.jpg").rename(own / "unlabeled" / "b.png")
    with pytest.raises(DataError, match=r"unlabeled: also in images/: b; remove one of the files$"):
        find_split(of("folder"), at(own))


# what a run's identity knows of the images


def identity(root: Path, **changes) -> tuple[str, str]:
    """SHA-256 of the split and of the settings that hold it."""
    config = of("folder", **changes)
    split = find_split(config, at(root))
    return split.sha256, config.model_copy(update={"split": split}).digest


def listed(file: str) -> dict[str, str]:
    return {"partition": "n:1", "partition_by": "list", "labeled_list": file}


def test_a_name_that_moves_between_roles_makes_another_run(own):
    write_list(own / "one.txt", "a")
    before = identity(own, **listed("one.txt"))
    write_list(own / "one.txt", "b")
    after = identity(own, **listed("one.txt"))
    assert before[0] != after[0]
    assert before[1] != after[1]
    write_list(own / "val.txt", "a")
    assert identity(own, **listed("one.txt"))[0] not in (before[0], after[0])


def test_another_meaning_of_the_values_makes_another_run(own):
    before = identity(own)
    write_list(own / "dataset.yaml", "classes: [background, cat]", "void: 255  # as without this line")
    assert identity(own) == before
    for line in ("values: [1, 0]", "void: [255, 3]"):
        write_list(own / "dataset.yaml", "classes: [background, cat]", line)
        assert identity(own)[0] != before[0]
        assert identity(own)[1] != before[1]


def test_the_place_of_a_list_makes_no_other_run(own):
    write_list(own / "one.txt", "a")
    write_list(own / "lists" / "same.txt", "images/a.png masks/a.png")
    assert identity(own, **listed("one.txt")) == identity(own, **listed("lists/same.txt"))
    assert of("folder", **listed("one.txt")).digest != of("folder", **listed("lists/same.txt")).digest


def test_a_list_of_every_kth_image_is_still_another_setting_than_the_rule(own):
    write_list(own / "one.txt", "a")
    assert identity(own, **listed("one.txt"))[0] == identity(own, partition="n:1")[0]
    assert identity(own, **listed("one.txt"))[1] != identity(own, partition="n:1")[1]


def test_data_that_changed_since_the_plan_are_refused(own):
    config = of("folder", partition="1/2")
    planned = config.model_copy(update={"split": find_split(config, at(own))})
    assert len(open_dataset(planned, at(own)).train) == 4
    (own / "unlabeled" / "e.tif").unlink()
    with pytest.raises(
        DataError, match=r"^dataset folder: planned for 1 \+ 3 .*, found 1 \+ 2 .*; restore the data, or plan the sweep again$"
    ):
        open_dataset(planned, at(own))


def test_a_balanced_split_reads_the_labels_and_no_image(own):
    for file in (own / "images").iterdir():
        file.write_bytes(b"")
    write_mask(own / "masks" / "a.png", 0)
    config = of("folder", partition="1/2", partition_by="balanced")
    assert open_dataset(config, at(own)).class_sets == (frozenset({0}), frozenset({0, 1}))
    assert find_split(config, at(own)).labeled == 1


def test_a_split_is_found_without_reading_an_image(own):
    for file in (*(own / "images").iterdir(), *(own / "masks").iterdir()):
        file.write_bytes(b"")
    assert find_split(of("folder", partition="1/2"), at(own)).labeled == 1
    with pytest.raises(DataError, match=r"masks/a\.png: not a readable image|images/a\.png: not a readable image"):
        open_dataset(of("folder"), Runtime(data_root=own))
