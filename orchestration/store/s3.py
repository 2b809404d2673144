"""Bytes under keys in an S3 bucket: the only file that knows boto3, whose errors it turns into ours."""

from __future__ import annotations

import base64
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from orchestration.errors import Conflict, Corrupt, NotFound, StoreError, StoreUnavailable
from orchestration.store.base import UnfinishedWrite, checked, checked_prefix, is_key
from orchestration.store.retry import pauses

_log = logging.getLogger(__name__)

T = TypeVar("T")

_Client = Any
"""A boto3 S3 client."""

_List = Callable[[_Client, dict[str, str]], dict[str, Any]]
"""Asks a client for one page of a listing."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def s3_store(uri: str, deadline_s: float) -> S3Store:
    """The store at `s3://bucket/prefix`; nothing is contacted. Raises StoreError for any other `uri`."""
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    odd = re.search(r"[\s?#\\]|//|(^|/)\.{1,2}(/|$)", prefix)
    if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket) or odd:
        raise StoreError(f"store: expected s3://bucket/prefix with a bucket name of 3 to 63 of a-z, 0-9, - and ., got {uri!r}")
    return S3Store(bucket, prefix, deadline_s=deadline_s)


class _Again(StoreUnavailable):
    """A fault that may pass; `unsure` when the server may have done the work and only its answer was lost."""

    def __init__(self, text: str, *, unsure: bool = True) -> None:
        super().__init__(text)
        self.unsure = unsure


@dataclass(frozen=True)
class S3Store:
    """A store in a bucket of AWS, MinIO, Ceph or SeaweedFS; endpoint, region and credentials come from boto3's own chain."""

    bucket: str
    prefix: str
    deadline_s: float = field(default=600.0, kw_only=True)
    _clients: dict[int, _Client] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    """The client of this process, by process id: a forked child mustn't share its parent's sockets."""

    def __reduce__(self) -> tuple[Any, ...]:
        return s3_store, (self.uri, self.deadline_s)  # no client, hence no credential, in the pickle

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    def read(self, key: str) -> tuple[bytes, str]:
        at = self._at(key)
        return self._patiently(key, lambda client, _: _get(client, at))

    def write(self, key: str, body: bytes) -> None:
        put = {**self._at(key), **_body(body)}
        self._patiently(key, lambda client, _: client.put_object(**put))

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        put = {**self._at(key), **_body(body), **condition}
        try:
            return self._patiently(key, lambda client, unsure: self._put(client, put, unsure))
        except NotFound:  # some servers answer so when IfMatch meets no object
            raise Conflict(key) from None

    def _put(self, client: _Client, put: dict[str, Any], unsure: bool) -> str:
        """One conditional put. When an earlier one may have got through, a refusal may be of our own body: look."""
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
        for key in keys:  # one at a time: the batch call wants a checksum that differs between S3 servers
            with suppress(NotFound):
                self._delete(key)

    def _delete(self, key: str) -> None:
        at = self._at(key)
        self._patiently(key, lambda client, _: client.delete_object(**at))

    def keys(self, prefix: str) -> Iterator[str]:
        return iter(self.sizes(prefix))

    def sizes(self, prefix: str) -> dict[str, int]:
        pages = self._pages(prefix, lambda client, ask: client.list_objects_v2(**ask), {"ContinuationToken": "NextContinuationToken"})
        found = {self._key(entry): int(entry["Size"]) for page in pages for entry in page.get("Contents", ())}
        return {key: found[key] for key in sorted(found) if is_key(key)}  # SeaweedFS sorts by folder, and some servers list folders

    def unfinished(self, prefix: str) -> Iterator[UnfinishedWrite]:
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        now = datetime.now(UTC)
        for page in self._pages(prefix, lambda client, ask: client.list_multipart_uploads(**ask), marks):
            for entry in page.get("Uploads", ()):
                if is_key(key := self._key(entry)):
                    yield UnfinishedWrite(key, entry["UploadId"], (now - entry["Initiated"]).total_seconds(), None)

    def abandon(self, writes: Iterable[UnfinishedWrite]) -> None:
        for write in writes:
            with suppress(NotFound):
                self._abort({**self._at(write.place), "UploadId": write.upload})

    def _abort(self, at: dict[str, str]) -> None:
        self._patiently(at["Key"], lambda client, _: client.abort_multipart_upload(**at))

    def _key(self, entry: dict[str, Any]) -> str:
        return str(entry["Key"]).removeprefix(f"{self.prefix}/" if self.prefix else "")

    def _pages(self, prefix: str, call: _List, marks: dict[str, str]) -> Iterator[dict[str, Any]]:
        """All answers of a listing; `marks` are the parameters that ask for the next one, and where the last one says them."""
        root = f"{self.prefix}/" if self.prefix else ""
        page = self._page(call, ask := {"Bucket": self.bucket, "Prefix": root + checked_prefix(prefix)})
        yield page
        while page.get("IsTruncated"):
            page = self._page(call, ask | {mark: page[said] for mark, said in marks.items() if said in page})
            yield page

    def _page(self, call: _List, ask: dict[str, str]) -> dict[str, Any]:
        return self._patiently(ask["Prefix"], lambda client, _: call(client, ask))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{checked(key)}".lstrip("/")}

    def _patiently(self, key: str, call: Callable[[_Client, bool], T]) -> T:
        """Call until it works, fails for good, or `deadline_s` has passed; its second argument: did an earlier try perhaps get through?"""
        started, unsure = time.monotonic(), False
        for pause_s in pauses():
            try:
                result = self._once(key, call, unsure)
            except _Again as fault:
                left_s = started + self.deadline_s - time.monotonic()
                if left_s <= 0:
                    raise self._unavailable(fault) from fault
                if fault.unsure and not unsure:  # one line an outage, none for a mere race
                    _log.warning("%s: %s; trying again for %.0f s", self.uri, fault, left_s)
                unsure = unsure or fault.unsure
                time.sleep(min(pause_s, left_s))
            else:
                if unsure:
                    _log.info("%s: answers again after %.0f s", self.uri, time.monotonic() - started)
                return result
        raise AssertionError("pauses never ends")

    def _unavailable(self, fault: _Again) -> StoreUnavailable:
        return StoreUnavailable(f"{self.uri}: no answer for {self.deadline_s:g} s: {fault}; is it up, and AWS_ENDPOINT_URL right?")

    def _once(self, key: str, call: Callable[[_Client, bool], T], unsure: bool) -> T:
        """One try, botocore's exceptions turned into ours."""
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
            raise _Again(f"{type(error).__name__}: {_one_line(error)}") from error
        except ValueError as error:  # boto3 refuses an endpoint that is no URL
            raise StoreError(f"{self.uri}: {_one_line(error)}: check AWS_ENDPOINT_URL") from error

    def _client(self) -> _Client:
        """This process's client, made at first use."""
        client = self._clients.get(os.getpid())
        if client is None:
            client = self._clients[os.getpid()] = _new_client(patience_s=self.deadline_s)
        return client

    def _refusal(self, key: str, error: Any) -> StoreError:
        """What an error answer of the server means."""
        code, status = _code(error), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code in ("NoSuchKey", "NoSuchUpload"):
            return NotFound(key)
        if code == "PreconditionFailed":
            return Conflict(key)
        if code in ("ConditionalRequestConflict", "OperationAborted"):
            return _Again(code, unsure=False)
        if code in ("ExpiredToken", "ExpiredTokenException"):
            self._clients.clear()  # the next client reads the credentials afresh
            return _Again(f"{code}: renew the credentials")
        if code == "404":  # without S3's own words: an answer that was cut short
            return _Again("an answer of 404 without a reason")
        if status in (408, 429) or (status >= 500 and status != 501) or code in _PASSING:
            return _Again(f"{code} ({status})")
        return StoreError(f"{self.uri}: {code}: {_HINTS.get(code, _one_line(error))}")

    def _breakdown(self, key: str, error: Exception) -> StoreError:
        """What a failure without an answer means."""
        from botocore import exceptions as boto

        if isinstance(error, boto.FlexibleChecksumError):
            return Corrupt(key)
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return StoreError(f"{self.uri}: the server's certificate is not trusted: set AWS_CA_BUNDLE to its authority's file")
        if isinstance(error, (boto.NoCredentialsError, boto.PartialCredentialsError)):
            return StoreError(f"{self.uri}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE")
        if isinstance(error, (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError)):
            return _Again(_one_line(error))
        if isinstance(error, (boto.MetadataRetrievalError, boto.CredentialRetrievalError)):
            return _Again(f"credentials: {_one_line(error)}")
        return StoreError(f"{self.uri}: {_one_line(error)}")


_PASSING = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "RequestLimitExceeded", "BadDigest", "IncompleteBody")
"""Error codes that come with a 4xx status but say: send it again."""

_KEYS_HINT = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and that AWS_ENDPOINT_URL is the server that knows them"

_REGION_HINT = "set AWS_REGION to the bucket's region"

_HINTS = {
    "AccessDenied": "these credentials may not do this; they need GetObject, PutObject, DeleteObject and ListBucket here",
    "InvalidAccessKeyId": _KEYS_HINT,
    "SignatureDoesNotMatch": _KEYS_HINT,
    "NoSuchBucket": "create the bucket first, or correct `store:`",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "PermanentRedirect": _REGION_HINT,
    "AuthorizationHeaderMalformed": _REGION_HINT,
    "NotImplemented": "this server lacks conditional puts: use a newer one",
}


def _new_client(*, patience_s: float) -> _Client:
    """A client with short timeouts and no retries of its own: only our loop may retry, as it must know of every lost reply."""
    import boto3
    from botocore.config import Config

    session = boto3.session.Session()  # its own: the default session isn't safe between threads
    config = Config(
        connect_timeout=max(1.0, min(10.0, patience_s)),
        read_timeout=max(1.0, min(60.0, patience_s)),
        retries={"total_max_attempts": 1},
    )
    client = session.client("s3", region_name=session.region_name or "us-east-1", config=config)
    client.meta.events.register_last("before-call.s3", _ask_no_permission)
    return client


def _ask_no_permission(params: dict[str, Any], **_: Any) -> None:
    """Bodies are sent at once: where a `100 Continue` is cut short, botocore 1.44 reads on for ever, past every timeout."""
    params["headers"].pop("Expect", None)


def _get(client: _Client, at: dict[str, str]) -> tuple[bytes, str]:
    answer = client.get_object(**at)
    etag = _etag(answer)
    if "ContentLength" not in answer:
        raise _Again("an answer whose headers were cut short")
    return answer["Body"].read(), etag  # boto3 compares the length and the checksum


def _etag(answer: dict[str, Any]) -> str:
    """Whole only with its closing quote: Python takes headers that a broken connection cut short for complete."""
    etag = str(answer.get("ETag", ""))
    if not etag.endswith('"'):
        raise _Again("an answer whose headers were cut short")
    return etag


def _body(body: bytes) -> dict[str, Any]:
    """The checksum is made here and not by boto3: so it's a plain header, which every server checks, and made once for all tries."""
    digest = hashlib.sha256(body).digest()
    return {"Body": body, "ChecksumAlgorithm": "SHA256", "ChecksumSHA256": base64.b64encode(digest).decode()}


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
