"""The picture of a confusion matrix."""

from __future__ import annotations

import io

from PIL import Image

from orchestration.tracking.confusion_map import confusion_map


def picture(classes: int, *, name: str = "class") -> Image.Image:
    """Half of each true class is predicted as itself; the last class does not occur."""
    shares = [[50.0 if i == j else 0.0 for j in range(classes)] for i in range(classes - 1)]
    return Image.open(io.BytesIO(confusion_map([f"{name} {i}" for i in range(classes)], [*shares, [None] * classes], "title\nsecond line")))


def colours(image: Image.Image) -> dict[tuple[int, ...], int]:
    return {colour: count for count, colour in image.convert("RGB").getcolors(2**20)}


def test_cells_are_coloured_by_their_share_and_absent_classes_are_grey() -> None:
    seen = colours(picture(21))  # without numbers
    cell = 27 * 27
    assert 20 * cell <= seen[125, 124, 120] < 21 * cell  # 50 percent
    assert 20 * 20 * cell <= seen[0, 34, 78] < 20 * 20 * cell + 1000  # 0 percent, and the end of the scale
    assert 21 * cell <= seen[225, 225, 225] < 22 * cell  # the absent class, and edges of letters


def test_up_to_sixteen_classes_every_cell_has_its_number() -> None:
    assert (0, 0, 0) not in colours(picture(17))
    few = colours(picture(16))
    assert few[0, 34, 78] < 15 * 15 * 39 * 39  # numbers cover a part of the cells


def test_long_names_are_shortened_and_stay_in_the_picture() -> None:
    assert picture(3, name="n" * 200).width == picture(3, name="n" * 400).width < 600


def test_a_title_may_be_wider_than_the_matrix() -> None:
    body = confusion_map(["a"], [[100.0]], "x" * 200)
    image = Image.open(io.BytesIO(body)).convert("RGB")
    assert image.width > 1000
    assert {image.getpixel((image.width - 1, y)) for y in range(image.height)} == {(255, 255, 255)}
