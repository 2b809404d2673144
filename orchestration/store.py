"""Bytes under keys, durable and with compare-and-swap: a directory or an S3 bucket behind one Protocol."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import random
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from orchestration.errors import Conflict, Corrupt, NotFound, StoreError, StoreUnavailable

_log = logging.getLogger(__name__)

T = TypeVar("T")
_Client = Any
"""A boto3 S3 client."""

_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
"""No part of a key starts with a dot: those names are the directory's own, and `..` cannot be spelled."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_STRAY_AFTER_S = 3600.0


class Store(Protocol):
    """Whole objects under keys such as `trials/3f2a/manifest.json`.

    An etag is a token of the content: equal bytes may have equal etags, so what writers must tell apart must differ in its bytes.
    Every method raises StoreError with one clear line when the store refuses, ValueError for a malformed key. All methods may be
    called from many threads, processes and machines at once, and the store may be pickled; it never holds a credential.
    """

    @property
    def uri(self) -> str:
        """Where the store is, in a form that `open_store` accepts."""
        ...

    def read(self, key: str) -> tuple[bytes, str]:
        """The body and its etag; raises NotFound, or Corrupt when the server's checksum differs."""
        ...

    def write(self, key: str, body: bytes) -> None:
        """Create or replace, unconditionally; on return the body is durable, and readers only ever see the old or the new one."""
        ...

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        """Compare-and-swap: write if the etag is still `expected` (None: if the key doesn't exist), and return the new etag.

        Raises Conflict, and writes nothing, when another writer came first. Rival bodies must differ (each carries its attempt's
        number): after a lost reply a writer knows its own success only by its bytes.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the keys; missing ones are fine."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys that start with the string `prefix`, sorted; end it with `/` to mean a folder."""
        ...


def open_store(uri: str, *, deadline_s: float = 600.0) -> Store:
    """The store at `s3://bucket/prefix`, at `file:///path`, or at a path (made absolute); nothing is contacted or created yet.

    An operation on S3 outlasts an outage of `deadline_s` seconds; a directory never waits. Raises StoreError for any other `uri`.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/", uri)
    if not uri.strip() or (scheme and scheme[1] not in ("s3", "file")):
        raise StoreError(f"store: expected s3://bucket/prefix, file:///path or a path, got {uri!r}")
    if not scheme:
        return DirectoryStore(Path(uri).expanduser().absolute())
    return _s3_store(uri, deadline_s) if scheme[1] == "s3" else _file_store(uri)


def _file_store(uri: str) -> DirectoryStore:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or parts.path in ("", "/"):
        raise StoreError(f"store: expected file:///absolute/path, got {uri!r}")
    return DirectoryStore(Path(unquote(parts.path)))


def _s3_store(uri: str, deadline_s: float) -> S3Store:
    bucket, _, prefix = uri.removeprefix("s3://").strip("/").partition("/")
    odd = re.search(r"[\s?#\\]|//|(^|/)\.{1,2}(/|$)", prefix)
    if not uri.startswith("s3://") or not _BUCKET.fullmatch(bucket) or odd:
        raise StoreError(f"store: expected s3://bucket/prefix with a bucket name of 3 to 63 of a-z, 0-9, - and ., got {uri!r}")
    return S3Store(bucket, prefix, deadline_s=deadline_s)


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"key must be parts of A-Z, a-z, 0-9, _, - and . joined by /, none starting with a dot, got {key!r}")
    return key


@dataclass(frozen=True)
class DirectoryStore:
    """A store in a folder that all its users see, local or on a network file system with working `flock`."""

    root: Path

    @property
    def uri(self) -> str:
        return self.root.as_uri()

    def read(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)
        with _explained(path):
            try:
                body = path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise NotFound(key) from None
        return body, _sha256(body)

    def write(self, key: str, body: bytes) -> None:
        path = self._path(key)
        with _explained(path, body), _staged(path, body) as staged, self._locked():
            _publish(staged, path)

    def replace(self, key: str, body: bytes, *, expected: str | None) -> str:
        path = self._path(key)
        with _explained(path, body), _staged(path, body) as staged, self._locked():
            if self._etag(key) != expected:
                raise Conflict(key)
            _publish(staged, path)
        return _sha256(body)

    def delete(self, keys: Iterable[str]) -> None:
        for path in map(self._path, keys):
            with _explained(path):
                if path.is_file():
                    with self._locked():
                        path.unlink(missing_ok=True)
                    with suppress(OSError):  # something else lies in the folder
                        path.parent.rmdir()

    def keys(self, prefix: str) -> Iterator[str]:
        if prefix:
            _checked(prefix.removesuffix("/"))
        folder = self.root / prefix.rpartition("/")[0]
        with _explained(folder):
            found = [path.relative_to(self.root).as_posix() for path in _files_below(folder)]
        yield from sorted(key for key in found if key.startswith(prefix))

    def _path(self, key: str) -> Path:
        return self.root / _checked(key)

    def _etag(self, key: str) -> str | None:
        try:
            return self.read(key)[1]
        except NotFound:
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the one lock of the store, only while a name changes; the kernel frees it when its holder dies."""
        _make(self.root)
        with (self.root / ".lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


@contextmanager
def _staged(path: Path, body: bytes) -> Iterator[Path]:
    """The body, durable under a hidden name beside `path`; gone at the end unless it was published."""
    _make(path.parent)
    _sweep_strays(path.parent)
    staged = path.parent / f".new-{uuid.uuid4().hex}"
    try:
        with staged.open("xb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        yield staged
    finally:
        staged.unlink(missing_ok=True)


def _publish(staged: Path, path: Path) -> None:
    staged.replace(path)
    _sync(path.parent)


def _make(folder: Path) -> None:
    """mkdir -p that survives a power cut: a new name lasts once its parent folder is synced."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep_strays(folder: Path) -> None:
    """Remove what killed writers left; a living one touches its file far more often than hourly."""
    for stray in folder.glob(".new-*"):
        try:
            if stray.stat().st_mtime < time.time() - _STRAY_AFTER_S:
                stray.unlink()
        except FileNotFoundError:  # its writer, or another sweeper, was faster
            continue


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder, onerror=_raise_unless_gone):
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _raise_unless_gone(error: OSError) -> None:
    # os.walk ignores errors by default: a folder that cannot be read would look empty, and its checkpoints lost
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
        raise error


@contextmanager
def _explained(path: Path, body: bytes = b"") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{path}: disk full: no room for {len(body)} bytes{_free(path)}; make room, then run again") from error
        raise StoreError(f"{path}: {error}") from error


def _free(path: Path) -> str:
    try:
        return f" ({shutil.disk_usage(path.parent).free} free)"
    except OSError:
        return ""


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


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
        return _s3_store, (self.uri, self.deadline_s)  # no client, hence no credential, in the pickle

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
            return str(client.put_object(**put)["ETag"])
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
        if prefix:
            _checked(prefix.removesuffix("/"))
        root = f"{self.prefix}/" if self.prefix else ""
        listed = [name.removeprefix(root) for name in self._listed(root + prefix)]
        yield from sorted(key for key in listed if _KEY.fullmatch(key))  # SeaweedFS sorts by folder, and some servers list folders

    def _listed(self, prefix: str) -> Iterator[str]:
        answer = self._page(prefix)
        yield from (entry["Key"] for entry in answer.get("Contents", ()))
        while answer.get("IsTruncated"):
            answer = self._page(prefix, ContinuationToken=answer["NextContinuationToken"])
            yield from (entry["Key"] for entry in answer.get("Contents", ()))

    def _page(self, prefix: str, **after: str) -> dict[str, Any]:
        return self._patiently(prefix, lambda client, _: dict(client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **after)))

    def _at(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{_checked(key)}".lstrip("/")}

    def _patiently(self, key: str, call: Callable[[_Client, bool], T]) -> T:
        """Call until it works, fails for good, or `deadline_s` has passed; its second argument: did an earlier try perhaps get through?"""
        started, unsure = time.monotonic(), False
        for pause_s in _pauses():
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
        raise AssertionError("_pauses never ends")

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
        if code in ("NoSuchKey", "PreconditionFailed"):
            return NotFound(key) if code == "NoSuchKey" else Conflict(key)
        if code in ("ConditionalRequestConflict", "OperationAborted"):
            return _Again(code, unsure=False)
        if code in ("ExpiredToken", "ExpiredTokenException"):
            self._clients.clear()  # the next client reads the credentials afresh
            return _Again(f"{code}: renew the credentials")
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
    return session.client("s3", region_name=session.region_name or "us-east-1", config=config)


def _get(client: _Client, at: dict[str, str]) -> tuple[bytes, str]:
    answer = client.get_object(**at)
    return answer["Body"].read(), answer["ETag"]  # boto3 compares the length and the checksum


def _body(body: bytes) -> dict[str, Any]:
    """The checksum is made here and not by boto3: so it's a plain header, which every server checks, and made once for all tries."""
    digest = hashlib.sha256(body).digest()
    return {"Body": body, "ChecksumAlgorithm": "SHA256", "ChecksumSHA256": base64.b64encode(digest).decode()}


def _pauses() -> Iterator[float]:
    """Seconds between tries: 0.1, 0.2, 0.4 .. 5, each cut by up to half so that writers don't return in step."""
    jitter = random.Random()  # its own: the global generator belongs to the training
    return (min(5.0, 0.1 * 2 ** min(n, 6)) * jitter.uniform(0.5, 1.0) for n in itertools.count())


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
