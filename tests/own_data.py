"""A small data set of the user's own, in the plain folder layout."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def make_folder(root: Path, *, images: int = 10) -> Path:
    """Images im0, im1, ... of two classes; the last two are for validation."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(images):
        add_image(root, f"im{i}", seed=i)
    (root / "val.txt").write_text(f"im{images - 2}\nim{images - 1}\n")
    (root / "dataset.yaml").write_text("classes: [background, thing]\n")
    return root


def add_image(root: Path, name: str, *, seed: int) -> None:
    generator = np.random.default_rng(seed)
    cv2.imwrite(str(root / "images" / f"{name}.png"), generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    cv2.imwrite(str(root / "masks" / f"{name}.png"), generator.integers(0, 2, (64, 64), dtype=np.uint8))
