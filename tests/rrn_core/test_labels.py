"""What label and image files mean: palettes, colours, values, EXIF, 16 bits, sizes, and files that are not used."""

import io
import unicodedata
from pathlib import Path

import cv2
import numpy as np
import pytest
from own_data import make_folder
from PIL import Image, ImageOps

from rrn_core import DataError, configure
from rrn_core.config import Runtime
from rrn_core.data.batches import Batches
from rrn_core.data.camvid import CamVid
from rrn_core.data.dataset import open_dataset, open_layout, open_validation
from rrn_core.data.images import decode_image, read_image, turn
from rrn_core.data.labels import Legend, colour_meanings, plain_table, read_label
from rrn_core.data.voc import open_voc

BLACK, RED, GREEN, WHITE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (255, 255, 255)
FOLDER = configure(dataset="folder", method="supervised", partition="full")
STATED = Legend(plain_table(3), colour_meanings([BLACK, RED, GREEN]), described=True)


def at(root: Path) -> Runtime:
    return Runtime(data_root=root, cache_images=False)


def palette_mask(file: Path, values: list[int], *colours: tuple[int, int, int]) -> Path:
    image = Image.fromarray(np.array([values], np.uint8))
    image.putpalette([channel for colour in colours for channel in colour])
    image.save(file)
    return file


def rgb_mask(file: Path, *colours: tuple[int, int, int]) -> Path:
    Image.fromarray(np.array([colours], np.uint8)).save(file)
    return file


@pytest.mark.parametrize(
    ("values", "colours", "labels"),
    [
        ([0, 1, 2], (BLACK, RED, GREEN), [0, 1, 2]),
        ([0, 1, 2], (GREEN, BLACK, RED), [2, 0, 1]),
        ([0, 0, 0], (RED, BLACK), [1, 1, 1]),
        ([0, 5, 6], (BLACK, (1, 1, 1), (2, 2, 2), (3, 3, 3), (4, 4, 4), RED, GREEN), [0, 1, 2]),  # values without a meaning of their own
        ([0, 2, 255], (GREEN, RED, BLACK, *[BLACK] * 253), [2, 0, 255]),  # a palette filled up with black: void stays void
        ([0, 1, 2], tuple((k, k, k) for k in range(256)), [0, 1, 2]),  # grey levels say nothing
        ([0, 1, 2], ((9, 9, 9), (128, 0, 0), (0, 128, 0)), [0, 1, 2]),  # nor do colours that nobody stated
    ],
)
def test_a_palette_of_another_order_is_mapped_by_the_stated_colours(tmp_path, values, colours, labels):
    assert read_label(palette_mask(tmp_path / "a.png", values, *colours), STATED)[0].tolist() == labels


@pytest.mark.parametrize("colours", [(RED, BLACK, (7, 7, 7)), (BLACK, BLACK, BLACK), (BLACK, BLACK, RED)])
def test_a_palette_that_contradicts_the_stated_colours_and_cannot_be_mapped_is_refused(tmp_path, colours):
    with pytest.raises(DataError, match=r"a\.png: its palette gives value \d the colour .* of another class.*dataset\.yaml"):
        read_label(palette_mask(tmp_path / "a.png", [0, 1, 2], *colours), STATED)


def test_vocs_and_camvids_own_palettes_are_known(tmp_path):
    (tmp_path / "JPEGImages").mkdir()
    layouts = open_voc(tmp_path), CamVid(tmp_path)
    for layout in layouts:
        swapped = palette_mask(tmp_path / "a.png", [0, 1, 2], *(layout.palette[k] for k in (2, 0, 1)))
        assert read_label(swapped, layout.legend)[0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("second", [([0, 1], (BLACK, GREEN, RED)), ([0, 2], (BLACK, GREEN, RED))])
def test_two_orders_of_colours_that_nobody_stated_are_refused_by_name(tmp_path, second):
    root = make_folder(tmp_path)
    for i in range(10):
        palette_mask(root / "masks" / f"im{i}.png", [0, 1], BLACK, RED, GREEN)
    assert len(open_dataset(FOLDER, at(root)).train) == 8
    palette_mask(root / "masks" / "im9.png", second[0], *second[1])
    with pytest.raises(DataError, match=r"im9\.png: its palette .*im0\.png.*; state the colours of the classes in dataset\.yaml"):
        open_dataset(FOLDER, at(root))
    palette_mask(root / "masks" / "im8.png", [0, 1], BLACK, RED, GREEN)
    with pytest.raises(DataError, match=r"im9\.png: its palette .*im8\.png"):
        open_validation(FOLDER, at(root))


def test_rgb_masks_are_mapped_by_stated_colours_and_grey_ones_by_their_levels(tmp_path):
    assert read_label(rgb_mask(tmp_path / "a.png", GREEN, BLACK, RED), STATED)[0].tolist() == [2, 0, 1]
    assert read_label(rgb_mask(tmp_path / "b.png", (2, 2, 2), BLACK, (1, 1, 1), WHITE), STATED)[0].tolist() == [2, 0, 1, 255]
    binary = Legend(plain_table(2), colour_meanings([BLACK, WHITE]), described=True)
    assert read_label(rgb_mask(tmp_path / "c.png", BLACK, WHITE), binary)[0].tolist() == [0, 1]
    with pytest.raises(
        DataError, match=r"a\.png: an RGB mask, but no colours are stated: \[0, 0, 0\], .*`classes: \{background: \[0, 0, 0\]"
    ):
        read_label(tmp_path / "a.png", Legend(plain_table(3), described=True))
    with pytest.raises(DataError, match=r"d\.png: an RGB mask with colours that are not stated: \[1, 2, 3\]; state the colour"):
        read_label(rgb_mask(tmp_path / "d.png", (1, 2, 3), BLACK), STATED)


def test_void_has_a_colour_of_its_own_if_it_is_stated(tmp_path):
    root = make_folder(tmp_path)
    (root / "dataset.yaml").write_text("classes: {background: [0, 0, 0], thing: [255, 0, 0]}\nvoid_colours: [255, 255, 255]\n")
    assert read_label(rgb_mask(tmp_path / "a.png", RED, WHITE), open_layout(FOLDER, at(root)).legend)[0].tolist() == [1, 255]


@pytest.mark.parametrize(
    ("classes", "found", "line"),
    [
        (2, {0, 255}, "`values: [0, 255]`"),
        (3, {1, 2, 3}, "`values: [1, 2, 3]`"),
        (3, {1, 3, 255}, "`values: [1, 2, 3]`"),
        (3, {0, 127, 254}, "`values: [0, 127, 254]`"),
        (3, {0, 1, 2, 255}, ""),
        (2, {0, 1}, ""),
    ],
)
def test_the_values_of_the_classes_are_guessed_from_the_masks(classes, found, line):
    assert Legend(plain_table(classes), assumed=classes).values_line(found) == line
    assert Legend(plain_table(classes)).values_line(found) == ""


def test_files_that_are_not_used_are_named_with_their_number(tmp_path):
    root = make_folder(tmp_path)
    (root / "images" / "more").mkdir()
    for file in ("images/more/x.png", "images/more/y.png", "images/z.gif", "masks/im0.tif", "images/Thumbs.db"):
        (root / file).touch()
    images, masks = open_layout(FOLDER, at(root)).unused()
    assert "images: 3 files are not used: more/ (2 files), z.gif; expected .png, .jpg" in images
    assert "masks: 1 files are not used: im0.tif; expected .png files" in masks


def test_case_of_suffixes_and_the_unicode_form_of_names_make_no_difference(tmp_path):
    composed, decomposed = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
    root = make_folder(tmp_path / "own")
    (root / "images" / "im0.png").rename(root / "images" / f"{composed}.PNG")
    (root / "masks" / "im0.png").rename(root / "masks" / f"{decomposed}.Png")
    data = open_dataset(FOLDER, at(root))
    assert (composed in data.train.names, len(data.without_label)) == (True, 0)
    for split, name in (("train", "a"), ("val", decomposed)):
        for kind in ("", "annot"):
            (tmp_path / f"{split}{kind}").mkdir()
            (tmp_path / f"{split}{kind}" / f"{name}.PNG").touch()
    (tmp_path / "val.txt").write_text(composed)
    assert CamVid(tmp_path).train_names() == ("a",)
    assert CamVid(tmp_path).find(composed, "val").label is not None


def deep(file: Path, largest: int) -> Path:
    pixels = np.zeros((4, 4, 3), np.uint16)
    pixels[0, 0] = largest, largest // 2, 0  # blue, green, red
    cv2.imwrite(str(file), pixels)
    return file


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_images_of_16_bits_are_scaled_by_their_range_or_by_the_stated_bits(tmp_path, suffix):
    file = deep(tmp_path / f"a.{suffix}", 2047)
    assert read_image(file)[0, 0].tolist() == [0, 127, 255]
    assert read_image(file, bits=12)[0, 0].tolist() == [0, 63, 127]
    assert read_image(deep(tmp_path / f"b.{suffix}", 65535))[0, 0].tolist() == [0, 127, 255]
    with pytest.raises(DataError, match=r"holds values up to 65535, more than `bits: 12` .*; write `bits: 16`$"):
        read_image(tmp_path / f"b.{suffix}", bits=12)
    root = make_folder(tmp_path / "own")
    (root / "dataset.yaml").write_text("classes: [background, thing]\nbits: 12\n")
    deep(root / "images" / "im0.png", 2047)
    assert open_layout(FOLDER, at(root)).bits == 12
    with pytest.raises(DataError, match=r"im0\.png: 64 x 64, but im0\.png is 4 x 4"):
        open_dataset(FOLDER, at(root)).train[0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_exif_turns_image_and_mask_alike(tmp_path, orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    (tmp_path / "a").write_bytes(body.getvalue())
    image = decode_image(tmp_path / "a")
    tagged = Image.fromarray(pixels)
    tagged.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(tagged))
    assert np.array_equal(image.pixels, expected)
    assert np.array_equal(turn(pixels, orientation), expected)
    assert np.array_equal(image.align(pixels[..., 0]), expected[..., 0])
    if orientation >= 5:
        assert np.array_equal(image.align(expected[..., 0]), expected[..., 0])


def test_what_a_decoder_cannot_read_is_a_data_error_that_names_the_file(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: No such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"gone\.png: not a readable image: No such file"):
        read_label(tmp_path / "gone.png", STATED)
    cv2.imwrite(str(tmp_path / "signed.tif"), np.full((4, 4), -5, np.int16))
    with pytest.raises(DataError, match=r"signed\.tif: expected an image of 8 or 16 bits, got int16 values; convert it$"):
        read_image(tmp_path / "signed.tif")

    def broken(*_: object) -> None:
        raise SystemError("a decoder's bug")

    monkeypatch.setattr(cv2, "imdecode", broken)
    with pytest.raises(DataError, match=r"signed\.tif: not a readable image \(a decoder's bug\)$"):
        read_image(tmp_path / "signed.tif")


def test_an_image_without_a_pixel_at_the_smallest_scale_is_refused_by_name(tmp_path):
    root = make_folder(tmp_path)
    for folder in ("images", "masks"):
        Image.fromarray(np.zeros((1, 40), np.uint8)).save(root / folder / "im0.png")
    config = configure(dataset="folder", method="supervised", partition="full", batch_size=8, crop=64, scales=(0.5,))
    with pytest.raises(DataError, match=r"^image im0: 40 x 1 pixels are less than one after scaling by 0\.5; remove the image"):
        Batches(config, open_dataset(config, at(root)))[0]


@pytest.mark.slow
def test_an_image_and_a_mask_of_200_megapixels_are_read(tmp_path):
    Image.fromarray(np.ones((10_000, 20_000), np.uint8)).save(tmp_path / "a.png", compress_level=1)
    assert read_image(tmp_path / "a.png").shape == (10_000, 20_000, 3)
    assert read_label(tmp_path / "a.png", STATED)[-1, -1] == 1


def test_a_long_list_in_dataset_yaml_is_counted_not_quoted(tmp_path):
    root = make_folder(tmp_path)
    (root / "dataset.yaml").write_text(f"classes: [{', '.join(f'c{k}' for k in range(300))}]\n")
    with pytest.raises(DataError, match=r"got 300: c0, c1, .* and 292 more$") as refused:
        open_layout(FOLDER, at(root))
    assert len(str(refused.value)) < 400
