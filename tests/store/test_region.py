"""s3.py: the variable that a refusal of the region names is the one that boto3 reads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from orchestration.errors import NotFound, StoreError
from orchestration.store.open import open_store

OTHER_REGION = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>the region is wrong; expecting 'eu-central-1'</Message></Error>"
NO_KEY = b"<Error><Code>NoSuchKey</Code></Error>"


class _Bucket(BaseHTTPRequestHandler):
    """An empty bucket of eu-central-1, which refuses requests that are signed for another region, as AWS does."""

    def do_GET(self) -> None:
        known = "/eu-central-1/" in self.headers["Authorization"]
        body = NO_KEY if known else OTHER_REGION
        self.send_response(404 if known else 400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.delenv("AWS_REGION", raising=False)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_the_region_is_taken_from_the_variable_that_the_message_names(bucket, monkeypatch):
    with pytest.raises(StoreError, match="AuthorizationHeaderMalformed: set AWS_DEFAULT_REGION to the bucket's region") as caught:
        open_store("s3://elsewhere/x", deadline_s=5).read("a")
    (name,) = [word for word in str(caught.value).split() if word.startswith("AWS_")]
    monkeypatch.setenv(name, "eu-central-1")
    with pytest.raises(NotFound):
        open_store("s3://elsewhere/x", deadline_s=5).read("a")
