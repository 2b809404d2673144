"""The contract of every store, tested with both, and the faults of each."""

from __future__ import annotations

import base64
import errno
import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import new_s3_server, set_environment
from half_writes import folder_of, start_half_a_write
from places import ROOT
from servers import ForgetfulProxy, S3Server, free_port, fresh_s3, wait_until

from orchestration.errors import Conflict, Corrupt, NotFound, SpecError, StoreError, StoreUnavailable
from orchestration.store import directory, s3
from orchestration.store.base import Store
from orchestration.store.directory import DirectoryStore
from orchestration.store.open import open_store
from orchestration.store.s3 import S3Store


def winners_of_race(store: Store, key: str, bodies: list[bytes], *, expected: str | None) -> list[bytes]:
    """The bodies of the writers whose `replace` succeeded, all started together."""
    barrier = threading.Barrier(len(bodies))

    def race(body: bytes) -> bytes | None:
        barrier.wait(30)
        try:
            store.replace(key, body, expected=expected)
        except Conflict:
            return None
        return body

    with ThreadPoolExecutor(len(bodies)) as pool:
        return [body for body in pool.map(race, bodies) if body is not None]


def count_up(store: Store, times: int) -> None:
    """Add 1 to a counter `times` times, by compare-and-swap."""
    for _ in range(times):
        while True:
            body, etag = store.read("counter")
            try:
                store.replace("counter", str(int(body) + 1).encode(), expected=etag)
                break
            except Conflict:
                continue


class TestContract:
    @pytest.mark.parametrize("body", [b"", b"hello\n", bytes(range(256)), os.urandom(5_000_000)], ids=["empty", "text", "bytes", "5MB"])
    def test_what_is_written_is_read(self, store: Store, body: bytes):
        store.write("a/b.bin", body)
        assert store.read("a/b.bin")[0] == body

    @pytest.mark.parametrize("key", ["x", "A-b_c.9/d--/e.tar.gz", "-/_", "a/" * 20 + "z", "k" * 200])
    def test_every_allowed_character_works_in_a_key(self, store: Store, key: str):
        store.write(key, b"1")
        assert store.read(key)[0] == b"1"
        assert list(store.keys("")) == [key]

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "..", "a/../b", "./a", ".a", "a/.b", "a b", "a\n", "ä", "a\\b", "a?b"])
    def test_a_malformed_key_is_refused_by_every_method(self, store: Store, key: str):
        for call in (store.read, lambda k: store.write(k, b""), lambda k: store.replace(k, b"", expected=None)):
            with pytest.raises(ValueError, match="key must be"):
                call(key)
        with pytest.raises(ValueError, match="key must be"):
            store.delete([key])

    @pytest.mark.parametrize("prefix", ["/", "..", "../x", "a/../b", "/etc"])
    def test_a_prefix_cannot_leave_the_store(self, store: Store, prefix: str):
        with pytest.raises(ValueError, match="key must be"):
            list(store.keys(prefix))

    def test_reading_a_missing_key_raises_not_found(self, store: Store):
        store.write("a/b", b"")
        for key in ("missing", "a", "a/missing", "x/y/z"):
            with pytest.raises(NotFound, match=key) as caught:
                store.read(key)
            assert caught.value.key == key

    def test_a_new_body_has_a_new_etag_and_reading_changes_nothing(self, store: Store):
        store.write("k", b"1")
        first = store.read("k")[1]
        assert store.read("k")[1] == first
        store.write("k", b"2")
        assert store.read("k") == (b"2", store.read("k")[1])
        assert store.read("k")[1] != first

    def test_replace_returns_the_etag_that_read_gives(self, store: Store):
        etag = store.replace("k", b"1", expected=None)
        assert store.read("k") == (b"1", etag)
        etag = store.replace("k", b"2", expected=etag)
        assert store.read("k") == (b"2", etag)

    def test_replace_with_an_old_etag_conflicts_and_writes_nothing(self, store: Store):
        old = store.replace("k", b"1", expected=None)
        store.write("k", b"2")
        with pytest.raises(Conflict, match="k"):
            store.replace("k", b"3", expected=old)
        assert store.read("k")[0] == b"2"

    def test_replace_of_an_existing_key_conflicts_when_none_is_expected(self, store: Store):
        store.write("k", b"1")
        with pytest.raises(Conflict):
            store.replace("k", b"1", expected=None)  # even with equal bytes: only after a lost reply are they compared

    def test_replace_of_a_missing_key_conflicts_when_one_is_expected(self, store: Store):
        etag = store.replace("k", b"1", expected=None)
        store.delete(["k"])
        with pytest.raises(Conflict):
            store.replace("k", b"2", expected=etag)
        with pytest.raises(NotFound):
            store.read("k")

    def test_a_deleted_key_can_be_created_again(self, store: Store):
        store.replace("k", b"1", expected=None)
        store.delete(["k"])
        store.replace("k", b"2", expected=None)
        assert store.read("k")[0] == b"2"

    @pytest.mark.slow
    def test_of_eight_creators_exactly_one_wins(self, store: Store):
        def one_round(n: int) -> bool:
            winners = winners_of_race(store, f"race/{n}", [f"{n}-{writer}".encode() for writer in range(8)], expected=None)
            return winners == [store.read(f"race/{n}")[0]]

        with ThreadPoolExecutor(10) as pool:  # SeaweedFS delays the losers by a second or two
            assert list(pool.map(one_round, range(20))) == [True] * 20

    @pytest.mark.slow
    def test_of_eight_updaters_exactly_one_wins(self, store: Store):
        def two_rounds(key: str) -> None:
            etag = store.replace(key, b"start", expected=None)
            for n in range(2):
                winners = winners_of_race(store, key, [f"{n}-{writer}".encode() for writer in range(8)], expected=etag)
                body, etag = store.read(key)
                assert winners == [body]

        with ThreadPoolExecutor(10) as pool:
            list(pool.map(two_rounds, "abcdefghij"))

    def test_several_processes_count_without_losing_an_update(self, store: Store):
        store.write("counter", b"0")
        spawn = multiprocessing.get_context("spawn")
        workers = [spawn.Process(target=count_up, args=(store, 10)) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        assert store.read("counter")[0] == b"30"

    def test_readers_during_writes_see_a_whole_body(self, store: Store):
        bodies = {bytes([n]) * 300_000 for n in range(4)}
        store.write("k", min(bodies))
        with ThreadPoolExecutor(2) as pool:
            writing = [pool.submit(store.write, "k", body) for body in sorted(bodies) * 5]
            while not all(future.done() for future in writing):
                assert store.read("k")[0] in bodies
        assert all(future.result() is None for future in writing)

    def test_delete_is_idempotent(self, store: Store):
        store.delete([])
        store.delete(["never", "never/was"])
        store.write("a/1", b"")
        store.write("a/2", b"")
        store.delete(iter(["a/1", "a/missing", "a/1"]))
        assert list(store.keys("")) == ["a/2"]

    def test_keys_are_sorted_and_start_with_the_prefix(self, store: Store):
        names = ["a-b/1", "a.b/1", "a/1", "a/10", "a/2/x", "ab/1", "b"]
        for name in reversed(names):
            store.write(name, b"")
        assert list(store.keys("")) == sorted(names)
        assert list(store.keys("a/")) == ["a/1", "a/10", "a/2/x"]
        assert list(store.keys("a/1")) == ["a/1", "a/10"]
        assert list(store.keys("a")) == sorted(names)[:-1]
        assert list(store.keys("b")) == ["b"]
        assert list(store.keys("zzz/")) == []

    def test_sizes_are_those_of_the_keys(self, store: Store):
        for name, count in (("a/1", 0), ("a/2", 7), ("b", 70_000)):
            store.write(name, bytes(count))
        assert list(store.sizes("").items()) == [("a/1", 0), ("a/2", 7), ("b", 70_000)]
        assert store.sizes("a/") == {"a/1": 0, "a/2": 7}

    def test_an_untouched_store_is_empty(self, store: Store):
        assert list(store.keys("")) == []
        assert store.sizes("") == {}
        assert list(store.unfinished("")) == []

    def test_no_other_method_shows_unfinished_writes_and_they_can_be_abandoned(self, store: Store):
        store.write("a/k", b"1")
        for key in ("a/k", "a/b/new", "ab/new", "b"):
            start_half_a_write(store, key)
        before = time.monotonic()
        found = list(store.unfinished("a"))
        assert sorted(folder_of(write) for write in found) == ["a", "a/b", "ab"]
        assert [folder_of(write) for write in store.unfinished("a/b/")] == ["a/b"]
        assert all(-5 < write.age_s < 60 + time.monotonic() - before for write in found)
        assert store.sizes("") == {"a/k": 1}
        with pytest.raises(NotFound):
            store.read("a/b/new")
        store.abandon(found)
        store.abandon(found)  # missing ones are ignored
        assert [folder_of(write) for write in store.unfinished("")] == ["."]
        assert store.read("a/k")[0] == b"1"

    def test_a_prefix_of_unfinished_writes_cannot_leave_the_store(self, store: Store):
        with pytest.raises(ValueError, match="key must be"):
            list(store.unfinished("../x"))

    def test_a_pickled_store_still_works(self, store: Store):
        store.write("k", b"1")
        copy = pickle.loads(pickle.dumps(store))
        assert (copy, copy.uri) == (store, store.uri)
        assert copy.read("k") == store.read("k")

    def test_the_uri_opens_the_same_store(self, store: Store):
        store.write("k", b"1")
        assert open_store(store.uri).read("k")[0] == b"1"

    def test_errors_survive_pickling(self):
        for error in (NotFound("a/b"), Conflict("a/b"), SpecError(["one", "two"]), StoreUnavailable("gone")):
            assert str(pickle.loads(pickle.dumps(error))) == str(error)


class TestOpenStore:
    def test_a_relative_path_becomes_absolute(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        assert open_store("runs/my store") == DirectoryStore(tmp_path / "runs" / "my store")
        assert not (tmp_path / "runs").exists()

    def test_a_file_uri_is_a_directory(self):
        assert open_store("file:///srv/my%20runs") == DirectoryStore(Path("/srv/my runs"))
        assert open_store("file:///srv/my%20runs").uri == "file:///srv/my%20runs"

    @pytest.mark.parametrize(("uri", "normal"), [("s3://bkt", "s3://bkt"), ("s3://bkt/a/b=1/", "s3://bkt/a/b=1")])
    def test_an_s3_uri_is_a_bucket_and_a_prefix(self, uri: str, normal: str):
        assert open_store(uri).uri == normal

    @pytest.mark.parametrize(
        "uri",
        [
            "",
            " ",
            "gs://b/p",
            "http://x/y",
            "s3://",
            "s3:/bkt/p",
            "s3://B/p",
            "s3://ab",
            "s3://bkt/a//b",
            "s3://bkt/../x",
            "file://host/x",
            "file:///",
        ],
    )
    def test_anything_else_is_one_clear_line(self, uri: str):
        with pytest.raises(StoreError, match=r"expected .*, got '") as caught:
            open_store(uri)
        assert "\n" not in str(caught.value)

    def test_a_directory_store_never_imports_boto3(self, tmp_path: Path):
        code = f"""
import sys
from orchestration.store.open import open_store
store = open_store({str(tmp_path)!r}); store.write("k", b"1"); open_store("s3://bkt/p")
assert store.read("k")[0] == b"1"
print([name for name in ("boto3", "botocore", "urllib3") if name in sys.modules])
"""
        assert run_python(code).stdout == "[]\n"


class TestDirectory:
    def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_body(self, tmp_path: Path):
        store, moments = open_store(str(tmp_path)), random.Random(0)
        bodies = [bytes([n]) * 3_000_000 for n in (1, 2)]
        store.write("a/k", bodies[0])
        code = f"""
from orchestration.store.open import open_store
store = open_store({str(tmp_path)!r}); print("ready", flush=True)
while True:
    for n in (1, 2):
        store.replace("a/k", bytes([n]) * 3_000_000, expected=store.read("a/k")[1])
"""
        for _ in range(15):
            kill_after(code, moments.uniform(0.0, 0.1))
            assert store.read("a/k")[0] in bodies
            assert list(store.keys("")) == ["a/k"]
        store.write("a/k", b"the lock of the dead writer is free")

    def test_half_written_files_are_invisible_and_deleted_after_an_hour(self, tmp_path: Path):
        store = open_store(str(tmp_path))
        store.write("a/k", b"1")
        for name, age_s in ((".new-old", 3700), (".new-young", 60)):
            (tmp_path / "a" / name).write_bytes(b"half")
            os.utime(tmp_path / "a" / name, (time.time() - age_s,) * 2)
        assert list(store.keys("")) == ["a/k"]
        store.write("a/k", b"2")
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [".new-young", "k"]

    def test_only_the_body_and_the_lock_stay(self, tmp_path: Path):
        store = open_store(str(tmp_path / "s"))
        etag = store.replace("k", b"1", expected=None)
        with pytest.raises(Conflict):
            store.replace("k", b"2", expected="other")
        store.replace("k", b"3", expected=etag)
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [".lock", "k"]

    def test_a_full_disk_is_one_clear_line_and_the_old_body_stays(self, small_disk: Path):
        store = open_store(str(small_disk), deadline_s=0.2)
        store.write("k", b"old")
        for write in (lambda: store.write("k", bytes(3_000_000)), lambda: store.replace("new", bytes(3_000_000), expected=None)):
            with pytest.raises(StoreError, match=r"disk full: 3000000 bytes needed, \d+ free; free some space"):
                write()
        assert store.read("k")[0] == b"old"
        assert sorted(path.name for path in small_disk.iterdir()) == [".lock", "k"]
        store.write("k", bytes(500_000))

    def test_a_full_disk_is_waited_for_and_is_then_unavailable(self, small_disk: Path):
        store = open_store(str(small_disk), deadline_s=60)
        ballast = small_disk / "ballast"
        ballast.write_bytes(bytes(450_000))
        with pytest.raises(StoreUnavailable, match="disk full"):
            open_store(str(small_disk), deadline_s=0.2).write("k", bytes(200_000))
        threading.Timer(0.5, ballast.unlink).start()
        store.write("k", bytes(200_000))

    def test_a_read_only_disk_is_waited_for(self, small_disk: Path):
        open_store(str(small_disk)).write("k", b"1")
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(StoreUnavailable, match="Read-only file system; check the disk"):
            open_store(str(small_disk), deadline_s=0.2).write("k", b"2")
        threading.Timer(0.5, subprocess.run, [["mount", "-o", "remount,rw", small_disk]]).start()
        open_store(str(small_disk), deadline_s=60).write("k", b"2")

    @pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EDQUOT])
    def test_a_failing_disk_is_tried_again_and_a_rename_that_happened_counts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ):
        store, real, fails = open_store(str(tmp_path), deadline_s=30), directory._publish, [True]

        def publish(staged: Path, path: Path) -> None:
            real(staged, path)
            if fails and fails.pop():
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(directory, "_publish", publish)
        etag = store.replace("k", b"1", expected=None)
        assert store.read("k") == (b"1", etag)

    def test_files_and_folders_take_the_permissions_of_the_root(self, tmp_path: Path):
        root = tmp_path / "shared"
        root.mkdir()
        root.chmod(0o2770)
        open_store(str(root)).write("a/b/k", b"1")
        assert {oct(path.stat().st_mode & 0o777) for path in (root / "a", root / "a/b")} == {"0o770"}
        assert {oct(path.stat().st_mode & 0o777) for path in (root / ".lock", root / "a/b/k")} == {"0o660"}

    @pytest.mark.skipif(os.geteuid() != 0, reason="a second user needs root")
    def test_two_users_share_a_folder_and_a_folder_of_one_s_own_is_named(self, tmp_path: Path):
        for parent in (tmp_path, *tmp_path.parents):
            if "pytest-of" in str(parent):
                parent.chmod(0o755)
        root = tmp_path / "shared"
        root.mkdir()
        os.chown(root, 0, 60001)
        root.chmod(0o2770)
        store = open_store(str(root))
        etag = store.replace("demo/t/k", b"1", expected=None)
        store.write("demo/own/k", b"1")
        (root / "demo" / "own").chmod(0o700)
        fork = multiprocessing.get_context("fork")
        other = fork.Process(target=as_second_user, args=(store, etag))
        other.start()
        other.join(60)
        assert other.exitcode == 0
        assert store.read("demo/t/k")[0] == b"2"
        store.write("demo/t/k", b"3")

    def test_a_folder_that_cannot_be_created_is_one_clear_line(self, tmp_path: Path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(StoreError, match=r"file/x/k: .*/file'"):
            open_store(str(tmp_path / "file" / "x")).write("k", b"")


class TestS3:
    def test_a_damaged_body_is_never_returned(self, forgetful: ForgetfulProxy):
        store = fresh_s3()
        store.write("k", b"GOOD" * 1000)
        forgetful.tamper = (b"GOOD", b"EVIL")
        with pytest.raises(Corrupt, match="k: damaged"):
            store.read("k")

    @pytest.mark.parametrize(
        ("answers", "warnings"),
        [
            (["200"], 0),
            (["409 ConditionalRequestConflict", "200"], 0),
            (["503 SlowDown", "500 InternalError", "200"], 1),
            (["429 TooManyRequests", "400 RequestTimeout", "200"], 1),
            (["400 ExpiredToken", "200"], 1),
            (["500 InternalError", "412 PreconditionFailed", "200 mine"], 1),
        ],
    )
    def test_a_transient_fault_is_retried_with_one_warning(self, scripted: ScriptedServer, caplog, answers: list[str], warnings: int):
        scripted.answers = list(answers)
        assert fresh_s3().replace("k", b"mine", expected=None) == '"etag"'
        assert scripted.answers == []
        assert len([record for record in caplog.records if record.name == "orchestration.store.s3"]) == warnings

    @pytest.mark.parametrize(
        "answers",
        [
            ["412 PreconditionFailed"],
            ["404 NoSuchKey"],
            ["409 ConditionalRequestConflict", "412 PreconditionFailed"],  # no reply was lost, so equal bytes prove nothing
            ["500 InternalError", "412 PreconditionFailed", "200 rival"],
            ["500 InternalError", "412 PreconditionFailed", "404 NoSuchKey"],
        ],
    )
    def test_a_refusal_is_a_conflict(self, scripted: ScriptedServer, answers: list[str]):
        scripted.answers = list(answers)
        with pytest.raises(Conflict):
            fresh_s3().replace("k", b"mine", expected="etag")
        assert scripted.answers == []

    @pytest.mark.parametrize(
        ("answer", "text"), [("403 AccessDenied", "need GetObject"), ("501 NotImplemented", "newer"), ("400 Odd", "as scripted")]
    )
    def test_a_permanent_refusal_fails_at_the_first_response(self, scripted: ScriptedServer, answer: str, text: str):
        scripted.answers = [answer]
        with pytest.raises(StoreError, match=text):
            fresh_s3().replace("k", b"mine", expected=None)

    @pytest.mark.parametrize("where", ["ETag", 'tag"', "Content-Length"])
    def test_a_response_with_truncated_headers_is_requested_again(self, scripted: ScriptedServer, where: str):
        scripted.answers = [f"cut {where}", "200 body"]
        assert open_store("s3://rrn-test/x", deadline_s=30).read("k") == (b"body", '"etag"')
        assert scripted.answers == []

    @pytest.mark.parametrize("where", ["ETag", 'tag"'])
    def test_a_put_whose_response_headers_are_truncated_is_sent_again(self, scripted: ScriptedServer, where: str):
        scripted.answers = [f"cut {where}", "200"]
        assert open_store("s3://rrn-test/x", deadline_s=30).replace("k", b"1", expected=None) == '"etag"'
        assert scripted.answers == []

    def test_a_put_does_not_wait_forever_for_the_rest_of_a_100_continue(self, scripted: ScriptedServer):
        scripted.answers = ["200"]  # its "100 Continue", if the client expects one, is truncated
        store, etags = open_store("s3://rrn-test/x", deadline_s=30), list[str]()
        threading.Thread(target=lambda: etags.append(store.replace("k", b"1", expected=None)), daemon=True).start()
        wait_until(lambda: etags == ['"etag"'], deadline_s=20, what="the response")

    def test_a_put_carries_its_condition_and_its_sha256(self, scripted: ScriptedServer):
        scripted.answers = ["200", "200"]
        fresh_s3().replace("k", b"mine", expected=None)
        fresh_s3().replace("k", b"mine", expected='"old"')
        create, update = scripted.headers
        assert (create["If-None-Match"], update["If-Match"]) == ("*", '"old"')
        assert create["x-amz-checksum-sha256"] == base64.b64encode(hashlib.sha256(b"mine").digest()).decode()

    @pytest.mark.slow
    def test_more_keys_than_one_page_are_all_listed(self, s3_environment: S3Server):
        store = fresh_s3()
        names = [f"k/{n:04}" for n in range(1050)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: store.write(name, b""), names))
        assert list(store.keys("k/")) == names

    @pytest.mark.slow
    def test_more_unfinished_uploads_than_one_page_are_all_listed(self, s3_environment: S3Server):
        store = fresh_s3()
        start_half_a_write(store, "m/0000")
        client = store._client()
        with ThreadPoolExecutor(8) as pool:
            upload = lambda n: client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/m/{n:04}")  # noqa: E731
            list(pool.map(upload, range(1, 1010)))
        found = list(store.unfinished("m/"))
        assert sorted(write.place for write in found) == [f"m/{n:04}" for n in range(1010)]
        store.abandon(found)

    def test_no_credential_is_pickled_or_shown(self, s3_environment: S3Server):
        store = fresh_s3()
        store.write("k", b"1")
        for text in (pickle.dumps(store), repr(store).encode()):
            assert s3_environment.access_key.encode() not in text
            assert s3_environment.secret_key.encode() not in text

    def test_sixteen_threads_create_one_client(self, monkeypatch: pytest.MonkeyPatch):
        made, store = [], S3Store("bkt", "p")
        monkeypatch.setattr(s3, "_new_client", lambda patience_s: (time.sleep(0.05), made.append(1), object())[2])
        with ThreadPoolExecutor(16) as pool:
            assert len(set(pool.map(lambda _: store._client(), range(16)))) == len(made) == 1

    @pytest.mark.slow
    def test_a_forked_child_creates_its_own_client(self, s3_environment: S3Server):
        store = fresh_s3()
        store.write("k", b"1")
        fork = multiprocessing.get_context("fork").Process(target=store.write, args=("child", b"2"))
        fork.start()
        fork.join(30)
        assert (fork.exitcode, store.read("child")[0]) == (0, b"2")

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
            ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId: check AWS_ACCESS_KEY_ID"),
            ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials: set AWS_ACCESS_KEY_ID"),
            ({"AWS_ENDPOINT_URL": "localhost"}, "check AWS_ENDPOINT_URL"),
            ({"AWS_PROFILE": "nobody"}, "profile .*nobody.* could not be found"),
        ],
        ids=["secret", "key", "none", "endpoint", "profile"],
    )
    def test_wrong_settings_fail_at_once_and_name_what_to_set(self, s3_environment, monkeypatch: pytest.MonkeyPatch, change, text: str):
        for name, value in change.items():
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
        for call in each_method(fresh_s3()):
            started = time.monotonic()
            with pytest.raises(StoreError, match=f"^s3://rrn-test/.*: .*{text}") as caught:
                call()
            assert not isinstance(caught.value, StoreUnavailable)
            assert "\n" not in str(caught.value)
            assert time.monotonic() - started < 5

    def test_a_missing_bucket_fails_at_once(self, s3_environment: S3Server):
        with pytest.raises(StoreError, match="s3://no-such-bucket: NoSuchBucket: create the bucket first"):
            open_store("s3://no-such-bucket").read("k")

    def test_an_absent_server_fails_after_the_deadline(self, s3_environment, monkeypatch, caplog: pytest.LogCaptureFixture):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"no answer for 6 s: .*; check .*AWS_ENDPOINT_URL is correct") as caught:
            fresh_s3(deadline_s=6).read("k")
        assert 5.9 < time.monotonic() - started < 20
        assert "\n" not in str(caught.value)
        assert len([record for record in caplog.records if record.name == "orchestration.store.s3"]) == 1

    def test_a_hanging_server_fails_after_the_deadline(self, s3_environment, monkeypatch: pytest.MonkeyPatch):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="timeout"):
                fresh_s3(deadline_s=1.0).write("k", b"1")
            assert time.monotonic() - started < 10

    @pytest.mark.parametrize("replaced", [False, True], ids=["create", "update"])
    def test_a_lost_reply_of_a_conditional_put_is_still_a_success(self, forgetful: ForgetfulProxy, replaced: bool):
        store = fresh_s3()
        expected = store.replace("k", b"old", expected=None) if replaced else None
        forgetful.lose_next_reply_to = b"PUT"
        etag = store.replace("k", b"mine", expected=expected)
        assert forgetful.replies_lost == 1
        assert store.read("k") == (b"mine", etag)

    def test_a_lost_refusal_of_a_conditional_put_is_still_a_conflict(self, forgetful: ForgetfulProxy):
        store = fresh_s3()
        store.write("k", b"a rival's")
        forgetful.lose_next_reply_to = b"PUT"
        with pytest.raises(Conflict):
            store.replace("k", b"mine", expected=None)
        assert forgetful.replies_lost == 1
        assert store.read("k")[0] == b"a rival's"

    @pytest.mark.parametrize("method", [b"GET", b"PUT", b"DELETE"])
    def test_any_other_call_is_repeated_after_a_lost_reply(self, forgetful: ForgetfulProxy, method: bytes):
        store = fresh_s3()
        store.write("k", b"1")
        forgetful.lose_next_reply_to = method
        store.write("k", b"2")
        assert store.read("k")[0] == b"2"
        store.delete(["k"])
        assert list(store.keys("")) == []
        assert forgetful.replies_lost == 1

    @pytest.mark.slow
    def test_every_method_survives_a_restart_of_the_server(self, tmp_path_factory, monkeypatch, caplog):
        server = new_s3_server(tmp_path_factory)
        try:
            set_environment(server, monkeypatch)
            store = fresh_s3(deadline_s=90)
            etag = store.replace("k", b"1", expected=None)
            server.kill()
            threading.Timer(1.0, server.launch).start()
            calls = [*each_method(store), lambda: store.replace("k", b"2", expected=etag), lambda: store.read("k")]
            with caplog.at_level(logging.INFO, "orchestration.store.s3"), ThreadPoolExecutor(len(calls)) as pool:
                list(pool.map(lambda call: call(), calls))
            assert store.read("k")[0] == b"2"
            assert any("answers again after" in record.message for record in caplog.records)
        finally:
            server.kill()


class ScriptedServer(ThreadingHTTPServer):
    """An S3 server that gives one of `answers` per request: "status", "status code" ("200 body"), or "cut" and where to truncate."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _ScriptedAnswer)
        self.answers: list[str] = []
        self.headers: list[Message] = []


class _ScriptedAnswer(BaseHTTPRequestHandler):
    server: ScriptedServer
    protocol_version = "HTTP/1.1"

    def handle_expect_100(self) -> bool:
        self.wfile.write(b"HTTP/1.1 100 Continue\r\n")
        self.close_connection = True
        return False

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.headers.append(self.headers)
        status, _, text = self.server.answers.pop(0).partition(" ")
        if status == "cut":
            whole = 'HTTP/1.1 200 OK\r\nETag: "etag"\r\nContent-Length: 4\r\n\r\nbody'
            self.wfile.write(whole[: whole.index(text)].encode())
            self.close_connection = True
            return
        body = text.encode() if status == "200" else f"<Error><Code>{text}</Code><Message>as scripted</Message></Error>".encode()
        self.send_response(int(status))
        self.send_header("ETag", '"etag"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.headers["Content-Length"] = "0"
        self.do_PUT()

    def log_message(self, *_: object) -> None:
        pass


def as_second_user(store: Store, etag: str) -> None:
    os.setgroups([60001])
    os.setgid(60001)
    os.setuid(60002)
    store.replace("demo/t/k", b"2", expected=etag)
    assert list(store.keys("demo/")) == ["demo/t/k"]
    with pytest.raises(StoreError, match=r"user 60002 has no permission: the folder .*/own belongs to root with mode 700"):
        store.write("demo/own/k", b"2")


def each_method(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.write("other", b"1"),
        lambda: store.replace("third", b"1", expected=None),
        lambda: store.delete(["fourth"]),
        lambda: list(store.keys("")),
        lambda: list(store.unfinished("")),
    ]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)


def kill_after(code: str, seconds: float) -> None:
    """Run Python code until it prints `ready`, wait `seconds`, then send SIGKILL."""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(seconds)
        finally:
            process.kill()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        set_environment(S3Server(tmp_path, ports=[0, 0, 0, server.server_port]), monkeypatch)
        yield server
        server.shutdown()


def test_both_stores_fit_the_protocol(tmp_path: Path):
    stores: list[Store] = [DirectoryStore(tmp_path), S3Store("bkt", "p")]
    assert [store.uri for store in stores] == [tmp_path.as_uri(), "s3://bkt/p"]
