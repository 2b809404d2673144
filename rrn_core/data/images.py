"""Image files: the one decoder of checks, training, evaluation and prediction."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rrn_core.errors import DataError

Pixels = NDArray[np.uint8]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MOST_PIXELS = 2**30
"""OpenCV decodes no larger image."""

_ORIENTATION = 0x0112  # tag of EXIF and TIFF
_FLAGS = cv2.IMREAD_COLOR_BGR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION


@dataclass(frozen=True)
class DecodedImage:
    """An image as it is displayed, and what its file says about it."""

    pixels: Pixels
    """RGB (H, W, 3)."""
    orientation: int = 1
    """EXIF orientation, 1..8. `pixels` are turned by it."""
    bits: int | None = None
    """Bits that the values of a 16-bit file need; None for a file of 8 bits."""

    def align(self, label: Pixels) -> Pixels:
        """The label (H, W), turned as the image was, unless only the turned image has its size."""
        height, width = self.pixels.shape[:2]
        stored = (width, height) if self.orientation >= 5 else (height, width)
        return turn(label, self.orientation) if self.orientation > 1 and label.shape == stored else label


def read_image(file: Path, *, bits: int | None = None) -> Pixels:
    """The RGB pixels (H, W, 3) of an image file, turned as EXIF says. Raises DataError as `decode_image`."""
    return decode_image(file, bits=bits).pixels


def decode_image(file: Path, *, bits: int | None = None) -> DecodedImage:
    """Decode an image file.

    Args:
        bits: bits of a pixel value of 16-bit files. Unset: the fewest that hold the file's largest value, at least 8.

    Raises:
        DataError: the file cannot be read or decoded, or holds values of more than `bits`.
    """
    try:
        body = file.read_bytes()
        # imdecode, because for an unreadable file imread prints to stderr and returns None without a reason
        decoded = cv2.imdecode(np.frombuffer(body, np.uint8), _FLAGS) if body else None
    except MemoryError:
        raise
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the decoders raise exceptions of many kinds, for more pixels than OpenCV decodes one of its own
        if isinstance(error, cv2.error) and error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"{file}: out of memory while decoding") from error
        raise DataError(f"{file}: not a readable image ({' '.join(str(getattr(error, 'err', error)).split())})") from error
    if decoded is None:
        raise DataError(f"{file}: not a readable image, or truncated")
    pixels, needed = _eight_bits(file, decoded, bits)
    cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    tiff, orientation = _header(body)
    # OpenCV turns TIFF images in any case
    return DecodedImage(pixels if tiff else turn(pixels, orientation), orientation, needed)


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an opened image file, 1..8; 1 if there is none. The pixels are not decoded."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the whole file to look for it behind the pixels
    found = image.getexif().get(_ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def turn(array: Pixels, orientation: int) -> Pixels:
    """Stored pixels (H, W, ...) as an EXIF orientation displays them."""
    if orientation >= 5:  # the first stored row is a column
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def _eight_bits(file: Path, decoded: NDArray[Any], bits: int | None) -> tuple[Pixels, int | None]:
    """Decoded values in 0..255, and the bits that those of a 16-bit file need."""
    if decoded.dtype == np.uint8:
        return np.asarray(decoded, np.uint8), None
    if decoded.dtype != np.uint16:
        raise DataError(f"{file}: expected an image of 8 or 16 bits, got {decoded.dtype} values; convert it")
    needed = max(8, int(decoded.max()).bit_length())
    if bits is not None and needed > bits:
        raise DataError(
            f"{file}: holds values up to {decoded.max()}, more than `bits: {bits}` of dataset.yaml allows; write `bits: {needed}`"
        )
    return (decoded >> ((bits or needed) - 8)).astype(np.uint8), needed


def _header(body: bytes) -> tuple[bool, int]:
    """Whether an image file is a TIFF, and its EXIF orientation."""
    try:
        with Image.open(io.BytesIO(body)) as image:
            return image.format == "TIFF", orientation_of(image)
    except MemoryError:
        raise
    except Exception:  # OpenCV decoded it; what Pillow cannot open has no orientation
        return False, 1
