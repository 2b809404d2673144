"""Lists of images as the field writes them: CPS's, UniMatch's, and bare names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from rrn_core.config import Runtime

NAME_ENDINGS = ("_leftImg8bit", "_gtFine")
"""Endings by which Cityscapes tells the files of one image apart."""

_SUFFIX = r"\.(?:png|jpe?g|bmp|tiff?|webp|mat)"


def read_list(file: Path) -> tuple[str, ...]:
    """The image names of a list, in order: of each line the first path, without folder, suffix and Cityscapes' ending.

    Lines may be bare names, `JPEGImages/ID.jpg SegmentationClass/ID.png` (UniMatch) or `/images/x.png<TAB>/segmentation/x.png` (CPS), have
    further columns, end in LF or CRLF, and be blank. A name that holds spaces needs its suffix.

    Raises:
        ValueError: a missing or empty file, or an image that stands twice.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"{file}: not a readable list of images: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a readable list of images: expected UTF-8 text") from error
    names = tuple(image_name(_first_path(line.strip())) for line in lines if line.strip())
    if not names:
        raise ValueError(f"{file}: names no images")
    if len(set(names)) < len(names):
        raise ValueError(f"{file}: {some(repeated(names))} stands twice")
    return names


def image_name(path: str) -> str:
    """`leftImg8bit/train/ulm/ulm_000000_000019_leftImg8bit.png` -> `ulm_000000_000019`."""
    name = PurePosixPath(path.replace("\\", "/")).name
    stem = re.sub(rf"{_SUFFIX}$", "", name, flags=re.IGNORECASE)
    for ending in NAME_ENDINGS:
        stem = stem.removesuffix(ending)
    return stem


def roots(runtime: Runtime, *more: Path) -> tuple[Path, ...]:
    """Where relative paths of lists and weights start: the sweep file's folder, or else the working one; the data; then `more`."""
    return (runtime.lists_root or Path.cwd(), *([runtime.data_root] if runtime.data_root else []), *more)


def find_file(written: str, *, roots: Iterable[Path]) -> Path:
    """The file that a setting names; a relative path is tried at each root.

    Raises:
        ValueError: it is nowhere.
    """
    path = Path(written).expanduser()
    candidates = [path] if path.is_absolute() else [root / path for root in roots]
    if found := next((candidate for candidate in candidates if candidate.is_file()), None):
        return found
    raise ValueError(f"{path}: no such file; looked for {', '.join(map(str, candidates))}")


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few of some names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def repeated(names: Iterable[str]) -> list[str]:
    """Those that stand more than once, each once, in the order of their second appearance."""
    seen: set[str] = set()
    return list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))  # type: ignore[func-returns-value]


def _first_path(line: str) -> str:
    """Up to a tab; in that, up to the end of the first image suffix, for a name may hold spaces; without any, the first word."""
    first = line.partition("\t")[0].strip()
    image = re.match(rf".+?{_SUFFIX}(?=\s|$)", first, re.IGNORECASE)
    return image[0] if image else first.split()[0]
