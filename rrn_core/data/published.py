"""Hashes of the partitions that CPS published."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

PUBLISHED = {
    ("voc", "1/16"): "baa85754594fcd33",
    ("voc", "1/8"): "c9ca45b4e688d408",
    ("voc", "1/4"): "fd0e8dca3dac524c",
    ("voc", "1/2"): "5338f277730143e0",
    ("cityscapes", "1/16"): "1e5363dd012cdc46",
    ("cityscapes", "1/8"): "6b3b52bab110157a",
    ("cityscapes", "1/4"): "6856046a4415296a",
    ("cityscapes", "1/2"): "2b3183629a3a9f1a",
}
"""`names_hash` of CPS's lists train_aug_labeled_1-k.txt, by data set and partition."""


def names_hash(names: Iterable[str]) -> str:
    """The first 16 hex digits of the SHA-256 of the names, sorted and joined by newlines."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
