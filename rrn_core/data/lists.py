"""Lists of images in the forms of CPS and UniMatch and as bare names, and where files that a setting names are looked up."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from rrn_core.config import Runtime
from rrn_core.errors import DataError

NAME_ENDINGS = ("_leftImg8bit", "_gtFine")
"""Endings of Cityscapes' image and label files. Without them both have the name of the image."""

_SUFFIX = r"\.(?:png|jpe?g|bmp|tiff?|webp|mat)"


def read_list(file: Path) -> tuple[str, ...]:
    """The image names of a list in order: the first path of each line, without folder, suffix and Cityscapes' ending.

    A line is a bare name, `JPEGImages/ID.jpg SegmentationClass/ID.png` (UniMatch) or `/images/x.png<TAB>/segmentation/x.png` (CPS).
    It may have further columns, and ends in LF or CRLF. Blank lines are skipped. A name with spaces needs its suffix.

    Raises:
        DataError: a missing, unreadable or empty file, or an image that is listed twice.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(f"{file}: not a readable list of images: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a readable list of images: expected UTF-8 text") from error
    names = tuple(image_name(_first_path(line.strip())) for line in lines if line.strip())
    if not names:
        raise DataError(f"{file}: lists no images; write one name per line")
    if len(set(names)) < len(names):
        raise DataError(f"{file}: listed more than once: {first_few(repeated(names))}; remove the repeated lines")
    return names


def image_name(path: str) -> str:
    """The name of an image: `leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png` becomes `ulm_000000_000019`.

    It is in Unicode's normal form C: file systems and archives write `é` as one character or as two.
    """
    name = PurePosixPath(path.replace("\\", "/")).name
    stem = re.sub(rf"{_SUFFIX}$", "", name, flags=re.IGNORECASE)
    for ending in NAME_ENDINGS:
        stem = stem.removesuffix(ending)
    return unicodedata.normalize("NFC", stem)


def roots(runtime: Runtime, *more: Path) -> tuple[Path, ...]:
    """The folders in which relative paths of lists and weights are looked up, in order.

    They are the folder of the sweep file or, without one, the working directory; then the data root; then `more`.
    """
    return (runtime.lists_root or Path.cwd(), *([runtime.data_root] if runtime.data_root else []), *more)


def find_file(written: str, *, roots: Iterable[Path]) -> Path:
    """The file that a setting names. A relative path is looked up in each root in turn.

    Raises:
        DataError: there is no such file in any root.
    """
    path = Path(written).expanduser()
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    if found := next((candidate for candidate in candidates if candidate.is_file()), None):
        return found
    raise DataError(f"{path}: no such file; looked for {', '.join(map(str, candidates))}")


def first_few(names: Iterable[str], count: int = 3) -> str:
    """The first `count` names as text, and how many more there are: `a, b, c and 5 more`."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def repeated(names: Iterable[str]) -> list[str]:
    """Names that occur more than once, each once, in the order of their second occurrence."""
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))  # type: ignore[func-returns-value]


def _first_path(line: str) -> str:
    """The first path of a line without its surrounding blanks.

    It ends at the first tab or after the first image suffix, because a name may hold spaces. Without a suffix it is the first word.
    """
    first = line.partition("\t")[0].strip()
    image = re.match(rf".+?{_SUFFIX}(?=\s|$)", first, re.IGNORECASE)
    return image[0] if image else first.split()[0]
