"""Leaves unfinished writes in a store, as a killed writer does."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

from orchestration.store.base import Store, UnfinishedWrite
from orchestration.store.s3 import S3Store


def start_half_a_write(store: Store, key: str, *, age_s: float = 0.0) -> None:
    """Leave what a writer leaves that is killed halfway. `age_s` applies only to a directory store."""
    if isinstance(store, S3Store):
        store._client().create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/{key}")
        return
    half = store.root / Path(key).parent / f".new-{uuid.uuid4().hex}"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_bytes(b"half")
    os.utime(half, (time.time() - age_s,) * 2)


def folder_of(write: UnfinishedWrite) -> str:
    return str(Path(write.place).parent)
