"""garbage.py: what is deleted, what is kept, and that no object is missing that a manifest names or may still name."""

from __future__ import annotations

import tempfile

import pytest
from half_writes import folder_of, start_half_a_write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from servers import fresh_s3

from orchestration.errors import Fenced, StoreError
from orchestration.plan.spec import FinishedRetention, Retention
from orchestration.plan.sweep_file import check
from orchestration.plan.trial_plan import expand
from orchestration.record import garbage
from orchestration.record.garbage import GarbageItem, GarbageReport, collect, render
from orchestration.record.lease import Lease
from orchestration.record.manifest import EpochMetrics, manifest_key, read_checkpoint, read_manifests
from orchestration.record.tracking_note import tracked, write_tracked
from orchestration.record.trial_record import TrialRecord, settle
from orchestration.store.base import Store
from orchestration.store.directory import DirectoryStore
from orchestration.store.open import open_store
from orchestration.store.s3 import S3Store

PLANS = expand(check({"name": "demo", "preset": "digits", "grid": {"partition": ["1/8", "1/4"], "seed": [0, 1]}}))
IDS = [plan.trial_id for plan in PLANS]


def trial_of(item: GarbageItem) -> str:
    """Empty if it belongs to the whole sweep."""
    return item.place.split("/")[1] if item.place.count("/") > 1 else ""


KEEP = Retention(last=9, best=False)


def opened(store: Store, trial: int = 0, *, driver: int = 1) -> TrialRecord:
    return TrialRecord.open(store, PLANS[trial], retention=KEEP, driver=driver)


def commit(record: TrialRecord, epoch: int, miou: float = 0.5, *, drawn: bool = False) -> None:
    entry = EpochMetrics(epoch=epoch, step=10 * epoch, time_ms=1000 + epoch, metrics={"val/miou": miou})
    files = {"model.safetensors": b"w%d" % epoch, "state.pt": b"s"}
    pictures = {epoch: {"predictions.png": b"p%d" % epoch}} if drawn else {}
    record.commit(step=10 * epoch, epoch=epoch, files=files, entries=[entry], seconds=1.0, pictures=pictures)


def finished(store: Store, trial: int, mious: list[float]) -> TrialRecord:
    record = opened(store, trial)
    for epoch, miou in enumerate(mious, start=1):
        commit(record, epoch, miou)
    record.finish()
    return record


def collected(store: Store, rule: FinishedRetention | None = None, *, driver: int = 2, dry_run: bool = False, ids=IDS) -> GarbageReport:
    """What `rrn-sweep gc` does: it closes the attempts of dead workers first."""
    for manifest in read_manifests(store, "demo").values() if not dry_run else ():
        settle(store, "demo", manifest.trial_id, driver=driver, failure="lost", reason="")
    return collect(store, "demo", ids, driver=driver, retention=Retention(finished=rule), dry_run=dry_run)


def epochs(store: Store) -> list[list[int]]:
    """For each trial, the epochs of its checkpoints. Asserts that all named checkpoints and pictures can be read."""
    manifests = read_manifests(store, "demo")
    for manifest in manifests.values():
        for pictures in manifest.pictures:
            assert store.read(pictures.objects["predictions.png"].key)[0] == b"p%d" % pictures.epoch
        for checkpoint in manifest.checkpoints:
            assert read_checkpoint(store, checkpoint)["model.safetensors"] == b"w%d" % checkpoint.epoch
    return [[c.epoch for c in manifests[trial_id].checkpoints] for trial_id in IDS if trial_id in manifests]


def unnamed(store: Store) -> list[str]:
    """Objects of trials that no manifest names."""
    named = {ref.key for manifest in read_manifests(store, "demo").values() for ref in manifest.objects}
    return [key for key in store.keys("demo/") if ("/checkpoints/" in key or "/pictures/" in key) and key not in named]


def everything(store: Store) -> dict[str, bytes]:
    return {key: store.read(key)[0] for key in store.keys("")}


def orphan(trial_id: str, name: str = "00000099-1/model.safetensors") -> str:
    return f"demo/{trial_id}/checkpoints/{name}"


RULES = [
    (None, [[1, 2, 3], [1, 2], [1, 2, 3], [1]]),
    ({"last": 1, "best_per_sweep": 0}, [[3], [2], [3], [1]]),
    ({"last": 2, "best_per_sweep": 0}, [[2, 3], [1, 2], [2, 3], [1]]),
    ({"last": 0, "best_per_sweep": 0}, [[], [], [], []]),
    ({"last": 0, "best_per_sweep": 1}, [[], [1], [], []]),
    ({"last": 0, "best_per_sweep": 3}, [[2], [1], [1], []]),  # the third is a tie: the earliest step wins
    ({"last": 0, "best_per_sweep": 0, "best_per_partition": 1}, [[], [1], [1], []]),
    ({"last": 0, "best_per_sweep": 0, "best_per_trial": 1}, [[2], [1], [1], [1]]),
    ({"last": 1, "best_per_sweep": 1, "best_per_partition": 1}, [[3], [1, 2], [1, 3], [1]]),
    ({}, [[3], [1, 2], [3], [1]]),
]


@pytest.mark.parametrize(("rule", "left"), RULES)
def test_of_finished_trials_the_rule_keeps_the_newest_and_the_best(store, rule, left):
    for trial, mious in enumerate([[0.1, 0.7, 0.2], [0.9, 0.3], [0.7, 0.2, 0.7], [0.6]]):
        finished(store, trial, mious)
    history = {trial_id: manifest.history for trial_id, manifest in read_manifests(store, "demo").items()}
    found = collected(store, rule and FinishedRetention(**rule) if rule is not None else None)
    assert epochs(store) == left
    assert unnamed(store) == []
    assert len(found.items) == 2 * (9 - sum(map(len, left)))
    assert {item.kind for item in found.items} <= {"retired"}
    assert {trial_id: manifest.history for trial_id, manifest in read_manifests(store, "demo").items()} == history


def test_pictures_are_kept_when_the_checkpoint_of_their_epoch_is_deleted(store):
    record = opened(store)
    for epoch in (1, 2, 3):
        commit(record, epoch, drawn=epoch != 2)
    record.finish()
    found = collected(store, FinishedRetention(last=1, best_per_sweep=0))
    assert epochs(store) == [[3]]
    assert {item.kind for item in found.items} == {"retired"}
    (manifest,) = read_manifests(store, "demo").values()
    assert [pictures.epoch for pictures in manifest.pictures] == [1, 3]


def test_trials_that_lost_checkpoints_are_sent_to_mlflow_again(store):
    for trial, mious in enumerate([[0.5, 0.4], [0.3], [0.2, 0.1]]):
        finished(store, trial, mious)
    write_tracked(store, "demo", "sqlite:///m.db", [*IDS[:3], "another"], driver=1)
    collected(store, FinishedRetention(last=1, best_per_trial=1, best_per_sweep=0), dry_run=True)
    collected(store)
    assert tracked(store, "demo", "sqlite:///m.db") == {*IDS[:3], "another"}
    collected(store, FinishedRetention(last=1, best_per_sweep=0))
    assert epochs(store) == [[2], [1], [2]]
    assert tracked(store, "demo", "sqlite:///m.db") == {IDS[1], "another"}


def test_a_checkpoint_without_a_score_is_never_the_best(store):
    record = opened(store)
    record.commit(step=5, epoch=0, files={"model.safetensors": b"w0"}, entries=[], seconds=1.0)
    commit(record, 1)
    record.finish()
    collected(store, FinishedRetention(last=0, best_per_trial=5))
    assert epochs(store) == [[1]]


@pytest.mark.parametrize("end", [TrialRecord.stop, lambda record: record.fail(failure="code", reason="x"), lambda record: None])
def test_an_unfinished_trial_keeps_everything_that_it_names(store, end):
    record = opened(store)
    for epoch in (1, 2, 3):
        commit(record, epoch)
    end(record)
    assert collected(store, FinishedRetention(last=0, best_per_sweep=0)).items == ()
    assert epochs(store) == [[1, 2, 3]]
    resumed = opened(store, driver=3)
    assert next(resumed.usable_checkpoints())[0].epoch == 3


def test_uploads_that_no_manifest_names_are_deleted_even_without_a_manifest(store):
    finished(store, 0, [0.5])
    commit(opened(store, 1), 1)
    finished(store, 2, [0.5])
    nameless = [key for key in store.keys(f"demo/{IDS[2]}/") if "/checkpoints/" in key]
    store.delete([manifest_key("demo", IDS[2])])
    orphans = [orphan(IDS[0]), orphan(IDS[1]), *nameless, orphan("unknown"), f"demo/{IDS[0]}/pictures/0009-1/predictions.png"]
    for key in orphans:
        store.write(key, b"12345")
    found = collected(store)
    assert sorted(item.place for item in found.items) == sorted(orphans)
    assert {(item.kind, item.size) for item in found.items} == {("orphaned", 5)}
    assert epochs(store) == [[1], [1]]
    assert unnamed(store) == []


def test_nothing_else_is_deleted(store):
    finished(store, 0, [0.5])
    Lease.acquire(store, "demo", say=print).release()
    kept = [
        "demo/tracking.json",
        f"demo/{IDS[0]}/notes.txt",
        "demo2/t/checkpoints/1-1/x",
        "weights/abc.safetensors",
        "x",
    ]
    for key in kept:
        store.write(key, b"1")
    before = everything(store)
    assert collected(store, FinishedRetention(last=1)).items == ()
    assert everything(store) == before | {manifest_key("demo", IDS[0]): store.read(manifest_key("demo", IDS[0]))[0]}  # it has a new token


def test_a_zombie_is_fenced_before_its_uploads_are_deleted(store):
    zombie = opened(store)
    commit(zombie, 1)
    upload = orphan(IDS[0], "00000020-1/model.safetensors")
    store.write(upload, b"w2")  # the first step of a commit; the manifest would be the next
    found = collected(store)
    assert (found.open, [item.place for item in found.items]) == ((), [upload])
    with pytest.raises(Fenced):
        commit(zombie, 2)
    assert epochs(store) == [[1]]
    collected(store)
    assert unnamed(store) == []


@pytest.mark.parametrize("step", ["_unfinished", "_unnamed", "_delete"])
def test_an_attempt_that_starts_meanwhile_loses_nothing(store, monkeypatch, step):
    before = opened(store)
    commit(before, 1)
    before.stop()
    store.write(orphan(IDS[0]), b"1")
    late = []
    real = getattr(garbage, step)

    def do_then_start(*args, **options):
        result = real(*args, **options)
        late.append(opened(store))
        store.write(orphan(IDS[0], "00000020-2/model.safetensors"), b"w2")
        return result

    monkeypatch.setattr(garbage, step, do_then_start)
    found = collected(store)
    assert found.open == ((IDS[0],) if step == "_unfinished" else ())
    assert f"demo/{IDS[0]}/checkpoints/00000020-2/model.safetensors" in store.keys("demo/")
    commit(late[0], 2)
    assert epochs(store) == [[1, 2]]


def test_a_replaced_driver_deletes_nothing(store):
    commit(opened(store, driver=7), 1)
    store.write(orphan(IDS[0]), b"1")
    with pytest.raises(Fenced, match="driver 7 has taken the sweep over from driver 2"):
        collected(store)
    assert unnamed(store) == [orphan(IDS[0])]


def paused_in(monkeypatch, target, name: str, then) -> None:
    """Do `then` once, before the first call of the function: as if the process slept there."""
    real = getattr(target, name)

    def awake(*args, **options):
        monkeypatch.setattr(target, name, real)
        then()
        return real(*args, **options)

    monkeypatch.setattr(target, name, awake)


A_KEEPS, B_KEEPS = FinishedRetention(last=1, best_per_sweep=0), FinishedRetention(last=0, best_per_sweep=1)


@pytest.mark.parametrize(
    ("target", "name"), [(garbage, "_retired"), (garbage, "forget_tracked"), (garbage, "_without"), (garbage, "_delete")]
)
def test_a_gc_that_slept_while_another_took_over_changes_nothing(store, monkeypatch, target, name):
    for trial in (0, 1):
        finished(store, trial, [0.9 - trial / 10, 0.5, 0.3])
    write_tracked(store, "demo", "sqlite:///m.db", IDS, driver=1)
    slept = []

    def b_takes_over():
        lease = Lease.acquire(store, "demo", above=2, say=print)
        collected(store, B_KEEPS, driver=lease.token)
        lease.release()
        slept.append(everything(store))

    paused_in(monkeypatch, target, name, b_takes_over)
    if name != "_delete":
        with pytest.raises(Fenced, match="driver 3 has taken the sweep over from driver 2"):
            collected(store, A_KEEPS, driver=2)
    else:  # only what no manifest names is left to do, and B has done it
        collected(store, A_KEEPS, driver=2)
    assert everything(store) == slept[0]
    assert sum(map(len, epochs(store))) == 1


def test_an_overtaken_gc_does_not_even_begin(store):
    finished(store, 0, [0.5, 0.4])
    with Lease.acquire(store, "demo", above=2, say=print):
        before = everything(store)
        for rule in (None, A_KEEPS):
            with pytest.raises(Fenced, match="sweep demo: driver 3 has taken the sweep over from driver 2"):
                collect(store, "demo", IDS, driver=2, retention=Retention(finished=rule), dry_run=False)
        assert {key: body for key, body in everything(store).items() if "lease" not in key} == {
            key: body for key, body in before.items() if "lease" not in key
        }


def test_trials_that_are_not_in_the_sweep_file_keep_what_they_name(store):
    for trial in (0, 1):
        finished(store, trial, [0.5, 0.4, 0.3])
    found = collected(store, FinishedRetention(last=1, best_per_sweep=0), ids=IDS[:1])
    assert epochs(store) == [[3], [1, 2, 3]]
    assert (found.others, found.others_bytes) == (1, 3 * len(b"w1s"))


def test_a_dry_run_reports_the_same_and_changes_nothing(store):
    for trial in (0, 1):
        finished(store, trial, [0.5, 0.4, 0.3])
    store.write(orphan(IDS[0]), b"1")
    before = everything(store)
    planned = collected(store, FinishedRetention(), driver=0, dry_run=True)
    assert everything(store) == before
    done = collected(store, FinishedRetention())
    assert planned == done
    assert {item.kind for item in done.items} == {"retired", "orphaned"}


def test_a_dry_run_keeps_what_an_open_attempt_may_still_name(store):
    commit(opened(store, driver=7), 1)
    store.write(orphan(IDS[0]), b"1")
    before = everything(store)
    found = collected(store, driver=0, dry_run=True)
    assert (found.items, found.open) == ((), (IDS[0],))
    assert everything(store) == before


def test_a_second_collection_deletes_nothing(store):
    finished(store, 0, [0.5, 0.4, 0.3])
    commit(opened(store, 1), 1)
    store.write(orphan(IDS[1]), b"1")
    assert len(collected(store, FinishedRetention()).items) == 3
    before = everything(store)
    again = collected(store, FinishedRetention())
    assert again.items == ()
    assert everything(store) == before


@pytest.mark.parametrize("rule", [None, FinishedRetention(last=0, best_per_sweep=0)])
def test_of_a_trial_whose_manifest_cannot_be_read_everything_is_kept_and_it_is_named(store, rule):
    finished(store, 0, [0.5])
    finished(store, 1, [0.5])
    for trial in (0, 1):
        store.write(orphan(IDS[trial]), b"1")
    store.write(manifest_key("demo", IDS[1]), b"{}")
    kept = {key: body for key, body in everything(store).items() if IDS[1] in key}
    found = collected(store, rule)
    assert {trial_of(item) for item in found.items} == {IDS[0]}
    assert orphan(IDS[0]) in [item.place for item in found.items]
    assert {key: body for key, body in everything(store).items() if IDS[1] in key} == kept
    assert f"kept: {manifest_key('demo', IDS[1])}: not a manifest" in render(found, dry_run=False)


@pytest.mark.parametrize(("source", "target"), [(f"demo/{IDS[0]}", "demo/a-copy"), (f"other/{IDS[0]}", f"demo/{IDS[0]}")])
def test_a_folder_that_was_copied_by_hand_is_kept_and_named(store, source, target):
    finished(store, 0, [0.5])
    if source.startswith("other"):  # a manifest of the sweep "other"
        body = store.read(manifest_key("demo", IDS[0]))[0].replace(b'"sweep": "demo"', b'"sweep": "other"').replace(b'"demo/', b'"other/')
        store.write(f"{target}/manifest.json", body)
    else:
        for key in list(store.keys(f"{source}/")):
            store.write(key.replace(source, target), store.read(key)[0])
    copied = {key: body for key, body in everything(store).items() if key.startswith(f"{target}/")}
    (fault,) = collected(store, FinishedRetention(last=0, best_per_sweep=0)).unreadable
    assert f"{target}/manifest.json: this is the manifest of sweep '{source.split('/')[0]}', trial '{IDS[0]}'; move" in fault
    assert {key: body for key, body in everything(store).items() if key.startswith(f"{target}/")} == copied


def places(store: Store) -> list[str]:
    return sorted(folder_of(write) for write in store.unfinished(""))


def test_half_written_checkpoints_are_deleted_and_young_writes_elsewhere_kept(store):
    finished(store, 0, [0.5])
    for key in (orphan(IDS[0]), orphan("unknown"), "demo/lease.json", f"demo/{IDS[0]}/manifest.json", "demo2/t/checkpoints/1-1/x"):
        start_half_a_write(store, key)
    planned = collected(store, dry_run=True)
    assert len(places(store)) == 5
    done = collected(store)
    assert planned == done
    assert {item.kind for item in done.items} == {"unfinished"}
    assert {trial_of(item) for item in done.items} == {IDS[0], "unknown"}
    assert places(store) == sorted(["demo", f"demo/{IDS[0]}", "demo2/t/checkpoints/1-1"])
    assert epochs(store) == [[1]]


def test_an_old_half_written_file_is_deleted_anywhere_in_the_sweep(tmp_path):
    store = open_store(str(tmp_path))
    finished(store, 0, [0.5])
    for key in ("demo/lease.json", f"demo/{IDS[0]}/manifest.json", "demo2/lease.json"):
        start_half_a_write(store, key, age_s=3700)
    assert sorted(trial_of(item) for item in collected(store).items) == ["", IDS[0]]
    assert places(store) == ["demo2"]


def test_a_dry_run_keeps_the_half_written_checkpoint_of_an_open_attempt(store):
    opened(store)
    start_half_a_write(store, orphan(IDS[0]))
    assert collected(store, dry_run=True).items == ()
    assert len(collected(store).items) == 1


def test_a_bucket_that_hides_unfinished_uploads_is_collected_anyway(tmp_path, monkeypatch, caplog):
    store = open_store(str(tmp_path))
    store.write(orphan(IDS[0]), b"1")

    def refuse(self, prefix):
        raise StoreError("AccessDenied: no")

    monkeypatch.setattr(DirectoryStore, "unfinished", refuse)
    assert len(collected(store).items) == 1
    assert "demo: cannot list unfinished uploads, so they are kept: AccessDenied: no" in caplog.text


def test_the_report_has_one_line_per_kind_and_a_total():
    items = [GarbageItem("retired", orphan("t1", "1-1/a"), 2_000_000), GarbageItem("retired", orphan("t2", "1-1/a"), 1_500_000_000)]
    items += [GarbageItem("orphaned", orphan("t1"), 500), GarbageItem("unfinished", "demo/.new-1", None)]
    found = GarbageReport(
        items=tuple(items), open=("t2", "t3"), unreadable=("demo/t4/manifest.json: not a manifest",), others=1, others_bytes=42_000_000
    )
    assert render(found, dry_run=True).splitlines() == [
        "would be removed                       number  size",
        "checkpoints beyond retention.finished  2       1.5 GB",
        "objects that no trial uses             1       0.5 kB",
        "unfinished uploads                     1       unknown",
        "total                                  4       1.5 GB and more",
        "kept: still running: 2 trials",
        "kept: demo/t4/manifest.json: not a manifest",
        "kept: not in this sweep file: 1 trial, 42 MB",
    ]
    assert render(found, dry_run=False).split()[0] == "removed"


def test_an_empty_report_is_one_line():
    assert render(GarbageReport((), (), (), 0, 0), dry_run=False) == "nothing to remove"


class Actor:
    """A writer in a random history. Any of its steps may raise Fenced."""

    def __init__(self, store: Store) -> None:
        self.store, self.records, self.driver = store, dict[int, list[TrialRecord]](), 1

    def do(self, action: str, trial: int, number: int) -> None:
        records = self.records.setdefault(trial, [])
        if action == "open" or not records:
            records.append(opened(self.store, trial, driver=self.driver))
            return
        record = records[number % len(records)]  # the newest, or a zombie
        if record.manifest.status == "finished":
            return
        try:
            self._act(action, record, trial, number)
        except Fenced:
            records.remove(record)

    def _act(self, action: str, record: TrialRecord, trial: int, number: int) -> None:
        if action == "commit":
            commit(record, record.manifest.epochs + 1, miou=number / 10, drawn=number % 2 == 0)
        elif action == "commit half":
            folder = f"{10 * record.manifest.epochs + 10:08d}-{record.manifest.attempt}"
            self.store.write(orphan(IDS[trial], f"{folder}/model.safetensors"), b"w%d" % (record.manifest.epochs + 1))
            self.store.write(f"demo/{IDS[trial]}/pictures/{record.manifest.epochs + 1:04d}-{record.manifest.attempt}/confusion.json", b"{}")
        elif action == "stage half":
            start_half_a_write(self.store, orphan(IDS[trial], f"{number:08d}-1/state.pt"))
        elif action == "settle":
            settle(self.store, "demo", IDS[trial], driver=self.driver, failure="lost", reason="")
        elif action == "end":
            [record.finish, record.stop, lambda: record.fail(failure="code", reason="")][number % 3]()


ACTIONS = ("open", "commit", "commit", "commit", "commit half", "stage half", "settle", "end", "gc")
HISTORIES = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2), st.integers(0, 9)), max_size=40)
COUNTS = st.integers(0, 2)
FINISHED = st.none() | st.builds(FinishedRetention, last=COUNTS, best_per_trial=COUNTS, best_per_partition=COUNTS, best_per_sweep=COUNTS)


def live_through(store: Store, history: list[tuple[str, int, int]], rule: FinishedRetention | None) -> None:
    actor = Actor(store)
    for action, trial, number in [*history, ("gc", 0, 0)]:
        if action != "gc":
            actor.do(action, trial, number)
            continue
        actor.driver += 1
        before = {trial_id: manifest.checkpoints for trial_id, manifest in read_manifests(store, "demo").items()}
        collected(store, rule, driver=actor.driver)
        epochs(store)  # reads and verifies all named objects
        assert unnamed(store) == []
        assert list(store.unfinished("demo/")) == []
        for trial_id, manifest in read_manifests(store, "demo").items():
            if rule is None or manifest.status != "finished":
                assert manifest.checkpoints == before[trial_id]
        assert collected(store, rule, driver=actor.driver).items == ()
    for trial in actor.records:  # whatever zombies do now, all named objects remain
        for record in list(actor.records[trial]):
            actor.do("commit", trial, actor.records[trial].index(record))
    epochs(store)


@settings(max_examples=100, deadline=None)
@given(history=HISTORIES, rule=FINISHED)
@pytest.mark.slow
def test_after_any_history_exactly_the_named_objects_remain(history, rule):
    with tempfile.TemporaryDirectory() as folder:
        live_through(open_store(folder), history, rule)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=HISTORIES, rule=FINISHED)
@pytest.mark.slow
def test_after_any_history_exactly_the_named_objects_remain_in_s3(s3_environment, history, rule):
    store = fresh_s3()
    assert isinstance(store, S3Store)
    live_through(store, history, rule)
