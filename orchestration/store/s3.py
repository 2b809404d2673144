"""A store in an S3 bucket. The only file that uses boto3; converts its errors to StoreError."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from orchestration.errors import Conflict, Corrupt, NotFound, StoreError, StoreUnavailable
from orchestration.store.base import UnfinishedWrite, checked, checked_prefix, is_key
from orchestration.store.retry import TransientFault, retried

_log = logging.getLogger(__name__)

T = TypeVar("T")

_Client = Any
"""A boto3 S3 client."""

_List = Callable[[_Client, dict[str, str]], dict[str, Any]]
"""Requests one page of a listing."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def s3_store(uri: str, deadline_s: float) -> S3Store:
    """The store at `s3://bucket/prefix`. Contacts nothing. Raises StoreError for any other `uri`."""
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    odd = re.search(r"[\s?#\\]|//|(^|/)\.{1,2}(/|$)", prefix)
    if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket) or odd:
        raise StoreError(f"store: expected s3://bucket/prefix with a bucket name of 3 to 63 of a-z, 0-9, - and ., got {uri!r}")
    return S3Store(bucket, prefix, deadline_s=deadline_s)


@dataclass(frozen=True)
class S3Store:
    """A store in a bucket of AWS, MinIO, Ceph or SeaweedFS. boto3 finds the endpoint, the region and the credentials."""

    bucket: str
    prefix: str
    deadline_s: float = field(default=600.0, kw_only=True)
    _clients: dict[int, _Client] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    """Clients by process ID: a forked child must not share its parent's sockets."""
    _locks: dict[int, threading.Lock] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return s3_store, (self.uri, self.deadline_s)  # leaves the client, which holds credentials, out of the pickle

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str) -> tuple[bytes, str]:
        at = self._at(key)
        return self._call(key, lambda client, _: _get(client, at))

    def write(self, key: str, body: bytes) -> None:
        put = {**self._at(key), **_body(body)}
        self._call(key, lambda client, _: client.put_object(**put))

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        put = {**self._at(key), **_body(body), **condition}
        try:
            return self._call(key, lambda client, unsure: self._put(client, put, unsure))
        except NotFound:  # some servers reply 404 when IfMatch finds no object
            raise Conflict(key) from None

    def _put(self, client: _Client, put: dict[str, Any], unsure: bool) -> str:
        """One conditional put. If an earlier put may have succeeded, a refusal may be due to our own body, so read it back."""
        from botocore.exceptions import ClientError

        try:
            return _etag(client.put_object(**put))
        except ClientError as refusal:
            if not unsure or _code(refusal) != "PreconditionFailed":
                raise
            body, etag = _get(client, {"Bucket": put["Bucket"], "Key": put["Key"]})
            if body != put["Body"]:
                raise
            return etag

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:  # one by one: the batch call needs a checksum that differs between S3 servers
            with suppress(NotFound):
                self._delete(key)

    def _delete(self, key: str) -> None:
        at = self._at(key)
        self._call(key, lambda client, _: client.delete_object(**at))

    def keys(self, prefix: str) -> Iterator[str]:
        return iter(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        marks = {"ContinuationToken": "NextContinuationToken"}
        pages = self._pages(prefix, lambda client, request: client.list_objects_v2(**request), marks)
        found = {self._key(entry): int(entry["Size"]) for page in pages for entry in page.get("Contents", ())}
        return {key: found[key] for key in sorted(found) if is_key(key)}  # SeaweedFS sorts by folder; some servers list folders as keys

    def unfinished(self, prefix: str) -> Iterator[UnfinishedWrite]:
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        now = datetime.now(UTC)
        for page in self._pages(prefix, lambda client, request: client.list_multipart_uploads(**request), marks):
            for entry in page.get("Uploads", ()):
                if is_key(key := self._key(entry)):
                    yield UnfinishedWrite(key, entry["UploadId"], (now - entry["Initiated"]).total_seconds(), None)

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        for write in writes:
            with suppress(NotFound):
                self._abort({**self._at(write.place), "UploadId": write.upload})

    def _abort(self, at: dict[str, str]) -> None:
        self._call(at["Key"], lambda client, _: client.abort_multipart_upload(**at))

    def _key(self, entry: dict[str, Any]) -> str:
        return str(entry["Key"]).removeprefix(f"{self.prefix}/" if self.prefix else "")

    def _pages(self, prefix: str, call: _List, marks: dict[str, str]) -> Iterator[dict[str, Any]]:
        """All pages of a listing. `marks`: parameters that request the next page, and the fields of a page that hold their values."""
        root = f"{self.prefix}/" if self.prefix else ""
        request = {"Bucket": self.bucket, "Prefix": root + checked_prefix(prefix)}
        page = self._page(call, request)
        yield page
        while page.get("IsTruncated"):
            page = self._page(call, request | {parameter: page[field] for parameter, field in marks.items() if field in page})
            yield page

    def _page(self, call: _List, request: dict[str, str]) -> dict[str, Any]:
        return self._call(request["Prefix"], lambda client, _: call(client, request))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{checked(key)}".lstrip("/")}

    def _call(self, key: str, call: Callable[[_Client, bool], T]) -> T:
        """The result of `call`, retried for up to `deadline_s`. Its second argument: an earlier try may have succeeded."""
        try:
            return retried(lambda unsure: self._once(key, call, unsure), uri=self.uri, deadline_s=self.deadline_s, log=_log)
        except TransientFault as fault:
            text = f"{self.uri}: no answer for {self.deadline_s:g} s: {fault}; check that the server is up and AWS_ENDPOINT_URL is correct"
            raise StoreUnavailable(text) from fault

    def _once(self, key: str, call: Callable[[_Client, bool], T], unsure: bool) -> T:
        """One try. Converts botocore's exceptions."""
        from botocore.exceptions import BotoCoreError, ClientError
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        try:
            return call(self._client(), unsure)
        except ClientError as error:
            raise self._refusal(key, error) from error
        except BotoCoreError as error:
            raise self._breakdown(key, error) from error
        except (ResponseParserError, HTTPError, OSError) as error:
            raise TransientFault(f"{type(error).__name__}: {_one_line(error)}") from error
        except ValueError as error:  # boto3 refuses an endpoint that is not a URL
            raise StoreError(f"{self.uri}: {_one_line(error)}; check AWS_ENDPOINT_URL") from error

    def _client(self) -> _Client:
        """The client of this process, created at first use."""
        with self._locks.setdefault(os.getpid(), threading.Lock()):  # a forked child has a lock of its own
            client = self._clients.get(os.getpid())
            if client is None:
                client = self._clients[os.getpid()] = _new_client(patience_s=self.deadline_s)
            return client

    def _refusal(self, key: str, error: Any) -> StoreError:
        """The exception for an error response of the server."""
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in ("NoSuchKey", "NoSuchUpload"):
            return NotFound(key)
        if code == "PreconditionFailed":
            return Conflict(key)
        if code in ("ConditionalRequestConflict", "OperationAborted"):
            return TransientFault(code, unsure=False)
        if code in ("ExpiredToken", "ExpiredTokenException"):
            self._clients.clear()  # the next client reads the credentials again
            return TransientFault(f"{code}: renew the credentials")
        if code == "404":  # S3 names its error; without a name the response was truncated
            return TransientFault("truncated response (status 404 without an error code)")
        if status in (408, 429) or (status >= 500 and status != 501) or code in _TRANSIENT:
            return TransientFault(f"{code} ({status})")
        return StoreError(f"{self.uri}: {code}: {_HINTS.get(code, _one_line(error))}")

    def _breakdown(self, key: str, error: Exception) -> StoreError:
        """The exception for a failure without a response."""
        from botocore import exceptions as boto

        if isinstance(error, boto.FlexibleChecksumError):
            return Corrupt(key)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StoreError(f"{self.uri}: the server's certificate is not trusted; set AWS_CA_BUNDLE to its CA file")
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return StoreError(f"{self.uri}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
        if isinstance(error, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)):
            return TransientFault(_one_line(error))
        if isinstance(error, (boto.MetadataRetrievalError, boto.CredentialRetrievalError)):
            return TransientFault(f"credentials: {_one_line(error)}")
        return StoreError(f"{self.uri}: {_one_line(error)}")


_TRANSIENT = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BadDigest", "IncompleteBody")
"""Error codes with a 4xx status that a retry may fix."""

_KEYS_HINT = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and that AWS_ENDPOINT_URL is the server that issued them"

_REGION_HINT = "set AWS_DEFAULT_REGION to the bucket's region"

_HINTS = {
    "AccessDenied": "these credentials lack a permission; they need GetObject, PutObject, DeleteObject and ListBucket",
    "InvalidAccessKeyId": _KEYS_HINT,
    "SignatureDoesNotMatch": _KEYS_HINT,
    "NoSuchBucket": "create the bucket first, or correct `store:` in the sweep file",
    "RequestTimeTooSkewed": "the clock of this machine is wrong; set it",
    "PermanentRedirect": _REGION_HINT,
    "AuthorizationHeaderMalformed": _REGION_HINT,
    "NotImplemented": "this server has no conditional puts; use a newer version",
}


def _new_client(*, patience_s: float) -> _Client:
    """A client with short timeouts and no retries: only `retried` may retry, because it must know of every lost reply."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()  # not the default session, which is not thread-safe
    config = Config(
        connect_timeout=max(1.0, min(10.0, patience_s)),
        read_timeout=max(1.0, min(60.0, patience_s)),
        retries={"total_max_attempts": 1},
    )
    client = session.client("s3", region_name=session.region_name or "us-east-1", config=config)
    client.meta.events.register_last("before-call.s3", _without_expect_header)
    return client


def _without_expect_header(params: dict[str, Any], **_: Any) -> None:
    """Send bodies at once: botocore 1.44 waits forever, past every timeout, if a `100 Continue` is truncated."""
    params["headers"].pop("Expect", None)


def _get(client: _Client, at: dict[str, str]) -> tuple[bytes, str]:
    response = client.get_object(**at)
    etag = _etag(response)
    if "ContentLength" not in response:
        raise TransientFault("truncated response headers")
    return response["Body"].read(), etag  # boto3 verifies the length and the checksum


def _etag(response: dict[str, Any]) -> str:
    """The etag. Without its closing quote it is incomplete: Python accepts headers that a broken connection truncated."""
    etag = str(response.get("ETag", ""))
    if not etag.endswith('"'):
        raise TransientFault("truncated response headers")
    return etag


def _body(body: bytes) -> dict[str, Any]:
    """The body and its checksum. Computed here, once for all tries, and sent as a plain header, which every server verifies."""
    digest = hashlib.sha256(body).digest()
    return {"Body": body, "ChecksumAlgorithm": "SHA256", "ChecksumSHA256": base64.b64encode(digest).decode()}


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
