"""Nothing that lies in a store or comes from elsewhere can hurt: of 10,000 damaged or hostile files none crashes, runs or slips in."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from orchestration.errors import StoreError
from orchestration.record.lease import current_token
from orchestration.record.manifest import Manifest, dump_manifest, manifest_key, read_manifest
from orchestration.record.tracking_note import tracked
from orchestration.store.open import open_store
from rrn_core import CheckpointError, configure
from rrn_core.foreign_weights import read_released
from rrn_core.networks.deeplab import Branch
from rrn_core.networks.quartet import Quartet
from rrn_core.optimisation import Optimisers
from rrn_core.state import STATE, WEIGHTS, TrainState, seed_everything
from rrn_core.weights import WeightsMetadata, header_of, load_model, load_tensors, pack, unpack

CONFIG = configure("digits")
NUMBERS = "rrn-sweep-state"
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:.*Sparse")

MOST = 400
"""Letters of an error."""


def inputs(count: int) -> Callable:
    """The same `count` inputs at every run."""
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.classifier = nn.Conv2d(2, 3, 1, bias=False)


class Judge(nn.Linear):
    kind = "pixel"


def small_state(seed: int, *, iteration: int = 3) -> TrainState:
    """Of networks as small as can be: a checkpoint does not care what they are."""
    seed_everything(seed)
    quartet = Quartet(Network(), nn.Linear(1, 1, bias=False), Judge(2, 1, bias=False), None)
    optimisers = Optimisers(quartet, CONFIG)
    if iteration:
        for parameter in quartet.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimisers.step(lr=0.1)
    return TrainState(quartet, optimisers, CONFIG, iteration=iteration, sums={"loss": 1.5, "loss_cps": 0.5}, seconds=2.5)


def said_by(state: bytes) -> dict[str, Any]:
    return json.loads(header_of(state)[NUMBERS])


GOOD = small_state(0).to_files()
OTHER = small_state(1).to_files()
WEIGHT_TENSORS, FACTS = unpack(GOOD[WEIGHTS])
TENSORS, SAID = load_tensors(GOOD[STATE]), said_by(GOOD[STATE])


def sealed(state: bytes) -> bytes:
    """The state file with its right SHA-256."""
    zeros = state.replace(SAID["sha256"].encode(), b"0" * 64, 1)
    return zeros.replace(b"0" * 64, hashlib.sha256(zeros).hexdigest().encode(), 1)


def state_of(tensors: dict[str, Tensor] = TENSORS, said: Any = SAID) -> dict[str, bytes]:
    """A checkpoint whose state file is sound, whatever it holds."""
    return GOOD | {STATE: sealed(save(tensors, metadata={NUMBERS: json.dumps(said, separators=(",", ":"))}))}


def vouched(weights: bytes) -> dict[str, bytes]:
    return state_of(said=SAID | {"weights_sha256": hashlib.sha256(weights).hexdigest()}) | {WEIGHTS: weights}


@pytest.fixture(scope="module")
def target() -> TrainState:
    return small_state(2)


@pytest.fixture(scope="module", autouse=True)
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing of this module may create this file."""
    path = tmp_path_factory.mktemp("canary") / "executed"
    yield path
    assert not path.exists()


def assert_short(error: Exception) -> None:
    text = str(error)
    assert text
    assert text.isprintable()
    assert len(text) < MOST


def refused(target: TrainState, files: dict[str, bytes]) -> bool:
    """Whether the files are refused as they should be: in one line, and with nothing changed, the random generators included."""
    before = target.to_files()
    try:
        target.load_files(files)
    except CheckpointError as error:
        assert_short(error)
        assert target.to_files() == before
        return True
    return False


def test_the_checkpoint_that_the_others_damage_is_sound(target):
    assert state_of() == GOOD == vouched(GOOD[WEIGHTS])
    assert not refused(target, GOOD)
    assert target.to_files() == GOOD


def test_a_checkpoint_from_before_the_first_step_empties_the_optimisers(target):
    files = small_state(3, iteration=0).to_files()
    assert not refused(target, files)
    assert target.to_files() == files


# bytes


def damaged(body: bytes) -> st.SearchStrategy[bytes]:
    places = st.integers(0, len(body) - 1)
    return st.one_of(
        places.map(lambda end: body[:end]),
        st.lists(st.tuples(places, st.integers(0, 7)), min_size=1, max_size=8).map(lambda flips: flipped(body, flips)),
        st.tuples(places, st.integers(0, 255)).map(lambda at: body[: at[0]] + bytes([at[1]]) + body[at[0] + 1 :]),
        st.tuples(places, places, places).map(lambda cut: moved(body, *cut)),
        st.tuples(places, st.binary(max_size=64)).map(lambda at: body[: at[0]] + at[1] + body[at[0] :]),
        st.binary(max_size=200),
        st.binary(max_size=100).map(lambda noise: body + noise),
    )


def flipped(body: bytes, flips: list[tuple[int, int]]) -> bytes:
    changed = bytearray(body)
    for place, bit in flips:
        changed[place] ^= 1 << bit
    return bytes(changed)


def moved(body: bytes, start: int, end: int, to: int) -> bytes:
    start, end = sorted((start, end))
    rest = body[:start] + body[end:]
    return rest[:to] + body[start:end] + rest[to:]


@inputs(1200)
@given(body=damaged(GOOD[STATE]))
@pytest.mark.slow
def test_damaged_bytes_of_the_state_are_refused(target, body):
    assert refused(target, GOOD | {STATE: body}) == (body != GOOD[STATE])


@inputs(2000)
@given(body=damaged(GOOD[STATE]).map(sealed))
@pytest.mark.slow
def test_damaged_bytes_of_a_state_that_vouches_for_itself_are_refused_or_taken_as_they_are(target, body):
    if not refused(target, GOOD | {STATE: body}):
        now = target.to_files()[STATE]
        assert said_by(now) | {"sha256": ""} == said_by(body) | {"sha256": ""}
        assert slots(now) == slots(body)


def slots(state: bytes) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_tensors(state).items() if name.startswith("opt")}


@inputs(2200)
@given(body=damaged(GOOD[WEIGHTS]))
@pytest.mark.slow
def test_damaged_bytes_of_the_weights_are_refused_even_where_the_state_vouches_for_them(target, body):
    assert refused(target, GOOD | {WEIGHTS: body}) == (body != GOOD[WEIGHTS])
    try:
        found = {name: (tensor.dtype, tensor.shape, bool(torch.isfinite(tensor).all())) for name, tensor in unpack(body)[0].items()}
    except ValueError as error:
        assert_short(error)
        found = {}
    fits = found == {name: (tensor.dtype, tensor.shape, True) for name, tensor in WEIGHT_TENSORS.items()}
    assert refused(target, vouched(body)) != fits


@pytest.mark.parametrize("files", [{}, {WEIGHTS: GOOD[WEIGHTS]}, {STATE: GOOD[STATE]}, {WEIGHTS: GOOD[STATE], STATE: GOOD[WEIGHTS]}])
def test_absent_and_exchanged_files_are_refused(target, files):
    assert refused(target, files)


@pytest.mark.parametrize("name", [WEIGHTS, STATE])
def test_files_of_two_checkpoints_are_refused(target, name):
    assert refused(target, GOOD | {name: OTHER[name]})


# contents

TWISTS: list[Callable[[Tensor], Tensor]] = [Tensor.double, Tensor.half, Tensor.bool, lambda t: t.float().to(torch.float8_e4m3fn)]
TWISTS += [lambda t: t.to(torch.complex64), lambda t: t[None], lambda t: t.reshape(-1)[:0]]
TWISTS += [lambda t: t * float("nan"), lambda t: t + float("inf")]
NEW_NAMES = ["", "x", "x\ny", "\x1b[2J" * 50, "opt1.99.momentum_buffer", "opt3.0.momentum_buffer", "opt1.0.exp_avg"]
NEW_NAMES += ["random.surprise", "random.cuda.99", "random.cuda.x", "branch1.x", "D2.weight"]


def wrong(tensors: dict[str, Tensor]) -> st.SearchStrategy[dict[str, Tensor]]:
    """One of them of another type, shape or value, left out or renamed; or one too many."""
    names, new = st.sampled_from(sorted(name for name in tensors if "cuda" not in name)), st.sampled_from(NEW_NAMES)
    return st.one_of(
        st.tuples(names, st.sampled_from(TWISTS)).map(lambda twist: tensors | {twist[0]: twist[1](tensors[twist[0]])}),
        names.map(lambda name: without(tensors, name)),
        st.tuples(names, new).map(lambda pair: without(tensors, pair[0]) | {pair[1]: tensors[pair[0]]}),
        st.tuples(names, new).map(lambda pair: tensors | {pair[1]: tensors[pair[0]].clone()}),
    )


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


@inputs(500)
@given(tensors=wrong(TENSORS))
def test_a_sound_state_with_wrong_tensors_is_refused(target, tensors):
    assert refused(target, state_of(tensors))


@inputs(300)
@given(tensors=wrong(WEIGHT_TENSORS))
def test_sound_weights_with_wrong_tensors_are_refused(target, tensors):
    assert refused(target, vouched(pack(tensors, FACTS)))


@pytest.mark.parametrize(
    ("name", "value"), [("python", -1), ("python", 625), ("torch", 0), ("torch", 255)], ids=["negative", "position", "zeros", "ones"]
)
def test_states_that_no_random_generator_takes_are_refused(target, name, value):
    assert refused(target, state_of(TENSORS | {f"random.{name}": torch.full_like(TENSORS[f"random.{name}"], value)}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
RUBBISH = ["surprise", "3", True, [None], {"x": None}, float("nan"), float("inf")]
ODD = [("iteration", 0), ("iteration", -1), ("iteration", 2.5), ("seconds", -1), ("numpy_position", -1), ("numpy_position", 2.5), ("x", 1)]
ODD += [(name, value) for name in SAID for value in RUBBISH]
ODD += [(name, None) for name in SAID if not name.endswith("gauss")]
ODD += [("sums", {"loss": value}) for value in [*RUBBISH, None, 10**400]]
WRONG = st.one_of(
    st.sampled_from(ODD).map(lambda odd: SAID | dict([odd])),
    st.sampled_from(sorted(SAID)).map(lambda name: without(SAID, name)),
    st.integers(min_value=625).map(lambda position: SAID | {"numpy_position": position}),
    JSON,
)


@inputs(700)
@given(said=WRONG)
@pytest.mark.slow
def test_a_sound_state_with_wrong_numbers_is_refused(target, said):
    assert refused(target, state_of(said=said))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "1", "[" * 2**16, '{"__metadata__": []}', '{"__metadata__": {}}']
    + [json.dumps({"__metadata__": {NUMBERS: value}}) for value in (None, 1, {}, "", "{", "[" * 2**16, "9" * 2**16)],
    ids=lambda text: text[:40],
)
def test_a_state_whose_header_is_nonsense_is_refused(target, text):
    assert refused(target, GOOD | {STATE: header(text)})


@pytest.mark.parametrize("own", ["", "{", "[]", '{"kind": "branches"}', '{"kind": "branches", "backbone": 1}'])
def test_weights_that_say_nonsense_of_themselves_are_refused(own):
    with pytest.raises(ValueError, match="another version"):
        unpack(save(WEIGHT_TENSORS, metadata={"rrn-sweep": own}))


@pytest.mark.parametrize("said", [{"num_classes": 2**62}, {"num_classes": -1}, {"num_classes": None}, {"backbone": "resnet9\n"}])
def test_weights_that_say_other_sizes_of_themselves_than_they_have_are_refused(said):
    facts = WeightsMetadata(kind="branches", backbone="tiny", num_classes=3).model_copy(update=said)
    with pytest.raises(ValueError, match=r"says that it holds|backbone alone|backbone: Input should be") as caught:
        load_model(pack(WHOLE, facts))
    assert_short(caught.value)


# hostile pickles


def saved(value: Any, **how: Any) -> bytes:
    body = io.BytesIO()
    torch.save(value, body, **how)
    return body.getvalue()


class Call:
    """Unpickled, it calls."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def hostile(canary: Path) -> st.SearchStrategy[bytes]:
    """Files that would create `canary` or take gigabytes: plain pickles, and torch files of both kinds with one deep inside."""
    calls = [
        Call(os.system, f"touch {canary}"),
        Call(exec, f"open({str(canary)!r}, 'w')"),
        Call(open, str(canary), "w"),
        Call(Path.touch, canary),
        Call(getattr, "x", "upper"),
        Call(torch.hub.load_state_dict_from_url, "file:///dev/null"),
        Call(bytearray, 2**33),
        Call(torch.UntypedStorage, 2**40),
    ]
    protocols = st.integers(0, 5)
    values = st.sampled_from(calls) | st.builds(lambda call: {"model": {"weight": call}}, st.sampled_from(calls))
    plain = st.builds(pickle.dumps, st.sampled_from(calls), protocols)
    archives = st.builds(lambda value, protocol: saved(value, pickle_protocol=protocol), values, protocols)
    legacy = st.builds(
        lambda value, protocol: saved(value, pickle_protocol=protocol, _use_new_zipfile_serialization=False), values, protocols
    )
    return plain | archives | legacy


@inputs(200)
@given(data=st.data())
def test_hostile_pickles_are_refused_and_never_executed(target, canary, data):
    body = data.draw(hostile(canary))
    assert refused(target, GOOD | {STATE: body})
    with pytest.raises(CheckpointError, match="saved by an earlier release"):
        target.load_files({WEIGHTS: GOOD[WEIGHTS], "state.pt": body})


@inputs(300)
@given(data=st.data())
def test_hostile_pickles_are_not_imported_and_never_executed(canary, data):
    body = data.draw(hostile(canary))
    file = canary.with_name(data.draw(st.sampled_from(["x.pth", "x.pt", "x.safetensors"])))
    file.write_bytes(body)
    assert not imported(file)
    with pytest.raises(ValueError, match="not a readable safetensors file") as caught:
        unpack(body)
    assert_short(caught.value)


# imported files

KNOWN = sorted(Branch("tiny", 3).state_dict())
NAMES = st.sampled_from([f"branch{i}.{key}" for i in (1, 2) for key in KNOWN] + KNOWN) | st.sampled_from(
    ["layer1.0.conv1.weight", "conv1.0.weight", "conv1.weight", "optimizer.x", "D.conv4.weight", "D.fc.weight", "x\ny", "", "\x1b[2J" * 50]
)
VALUES = st.sampled_from(
    [torch.zeros(shape) for shape in [(), (0,), (3,), (16, 3, 3, 3), (2**60, 0), (2**31, 0, 3, 3), (0, 2**62)]]
    + [torch.ones(1).expand(2**40), torch.zeros(3).to_sparse(), torch.zeros(2**40, device="meta"), torch.zeros(3, dtype=torch.complex64)]
    + [nn.Parameter(torch.zeros(2)), None, 1, "x", [torch.zeros(1)], torch.full((3,), float("nan"))]
)
WHOLE = {f"branch{i}.{key}": tensor for i in (1, 2) for key, tensor in Branch("tiny", 3).state_dict().items()}


@inputs(200)
@given(some=st.dictionaries(NAMES, VALUES, max_size=12), rest=st.sampled_from([False] * 4 + [True]))
@pytest.mark.slow
def test_files_to_import_with_odd_tensors_are_refused(canary, some, rest):
    file = canary.with_name("odd.pth")
    torch.save({"model": WHOLE | some if rest else some}, file)
    changed = any(name in WHOLE and not name.endswith("num_batches_tracked") for name in some)
    assert not (imported(file) and (changed or not rest))


@pytest.fixture(scope="module")
def released(canary) -> dict[str, bytes]:
    """A backbone and branches as others save them."""
    small = {key: tensor[:2] if tensor.ndim else tensor for key, tensor in WHOLE.items() if "layer1" in key}
    return {"x.pth": saved(small), "y.pth": saved(small, _use_new_zipfile_serialization=False), "x.safetensors": save(small)}


@inputs(400)
@given(data=st.data())
def test_damaged_files_to_import_are_refused(canary, released, data):
    name = data.draw(st.sampled_from(sorted(released)))
    file = canary.with_name(name)
    file.write_bytes(data.draw(damaged(released[name])))
    assert not imported(file)


def test_a_small_file_whose_mappings_hold_each_other_again_and_again_is_soon_refused(tmp_path):
    nest: dict[str, Any] = {}
    for _ in range(60):
        nest = {"a": nest, "b": nest}
    circle: dict[str, Any] = {}
    circle["self"] = circle
    for value in (nest, circle):
        torch.save(value, tmp_path / "nest.pth")
        with pytest.raises(ValueError, match="neither branch1"):
            read_released(tmp_path / "nest.pth")


# memory


def imported(file: Path) -> bool:
    """Whether the file is taken; else it is refused in one line."""
    try:
        read_released(file).to_bytes()
    except ValueError as error:
        assert_short(ValueError(str(error).removeprefix(f"{file}: ")))
        return False
    return True


def header(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    "body",
    [
        header('{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}') + bytes(64),
        header('{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'),
        header('{"__metadata__": null, "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}') + bytes(4),
        header('{"a": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}') + bytes(4),
        b"\xff" * 8 + bytes(64),
        struct.pack("<Q", 2**33) + b"{}",
    ],
    ids=["many elements", "an overflow", "no facts", "an odd type", "a header without end", "a long header"],
)
def test_weights_that_claim_more_than_they_hold_are_refused_in_little_memory(target, body):
    before = peak_mb()
    with pytest.raises(ValueError, match=r"safetensors|say") as caught:
        unpack(body)
    assert_short(caught.value)
    assert refused(target, vouched(body))
    assert peak_mb() < before + 200


CLAIMS: list[dict[str, Any]] = [{"shape": [2**62, 4]}, {"shape": [2**40], "data_offsets": [0, 2**42]}, {"data_offsets": [0, 2**64]}]


@pytest.mark.parametrize("claim", [*CLAIMS, {"dtype": "F8_E8M0"}])
def test_a_state_that_claims_more_than_it_holds_is_refused_in_little_memory(target, claim):
    end = 8 + int.from_bytes(GOOD[STATE][:8], "little")
    entries = json.loads(GOOD[STATE][8:end])
    before = peak_mb()
    for name in TENSORS:
        claims = json.dumps(entries | {name: entries[name] | claim})
        assert refused(target, GOOD | {STATE: sealed(header(claims) + GOOD[STATE][end:])})
    assert peak_mb() < before + 200


def test_a_compressed_archive_is_refused_before_it_fills_the_memory(tmp_path):
    parts = {"archive/data.pkl": pickle.dumps(3, 2), "archive/version": b"3", "archive/data/0": bytes(2**27)}
    bomb = zipped(parts, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    (tmp_path / "bomb.pth").write_bytes(bomb)
    before = peak_mb()
    with pytest.raises(ValueError, match="compressed"):
        read_released(tmp_path / "bomb.pth")
    assert peak_mb() < before + 100


@pytest.mark.parametrize("claimed", [2**31 - 1, 2**27])
def test_a_tensor_that_claims_more_than_the_archive_holds_is_refused_in_little_memory(tmp_path, claimed):
    with zipfile.ZipFile(io.BytesIO(saved({"layer1.0.conv1.weight": torch.zeros(625)}))) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    count = pickle.dumps(625, 2)[2:-1]
    assert count in parts["archive/data.pkl"]
    parts["archive/data.pkl"] = parts["archive/data.pkl"].replace(count, b"J" + struct.pack("<i", claimed))
    (tmp_path / "claim.pth").write_bytes(zipped(parts, zipfile.ZIP_STORED))
    before = peak_mb()
    assert not imported(tmp_path / "claim.pth")
    assert peak_mb() < before + 200


def zipped(parts: dict[str, bytes], method: int) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", method) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    return body.getvalue()


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


# manifests and notes

MANIFEST = json.loads(
    dump_manifest(
        Manifest.model_validate(
            {
                "sweep": "demo",
                "trial_id": "t",
                "label": "eps=0.4",
                "config": CONFIG.model_dump(mode="json"),
                "varied": ("eps",),
                "iterations": 8,
                "attempt": 1,
                "attempts": ({"number": 1, "driver": 1, "node": "n", "started_ms": 1},),
                "created_ms": 1,
                "updated_ms": 2,
                "checkpoints": (
                    {
                        "step": 4,
                        "epoch": 1,
                        "attempt": 1,
                        "score": 0.5,
                        "objects": {STATE: {"key": f"demo/t/checkpoints/4-1/{STATE}", "sha256": "0", "size": 1}},
                    },
                ),
                "history": ({"epoch": 1, "step": 4, "time_ms": 1, "metrics": {"val/miou": 0.5, "train/loss": 1.0}},),
            }
        )
    )
)
LEASE = {
    "token": 1,
    "writer": "w",
    "holder": {"host": "h", "boot": "b", "pid": 1, "started": "1"},
    "beat_ms": 1,
    "every_s": 5.0,
    "seen": {"t": {"attempt": 1, "worked_s": 1.0}},
}
TOLD = {"uri": "sqlite:///a", "trials": ["t"]}


@st.composite
def notes(draw: st.DrawFn, note: dict[str, Any]) -> bytes:
    """JSON with one part replaced or left out; or no JSON."""
    if draw(st.booleans()):
        return draw(damaged(json.dumps(note).encode()))
    changed = copy.deepcopy(note)
    inner: Any = changed
    while True:
        key = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if not isinstance(inner[key], dict | list) or not inner[key] or draw(st.booleans()):
            break
        inner = inner[key]
    if draw(st.booleans()):
        inner[key] = draw(JSON)
    else:
        del inner[key]
    return json.dumps(changed).encode()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    (folder / "demo" / "t").mkdir(parents=True)
    return open_store(str(folder))


def assert_read_or_store_error(store, key: str, body: bytes, read: Callable[[], Any]) -> None:
    (store.root / key).write_bytes(body)
    try:
        read()
    except StoreError as error:
        assert_short(error)


@inputs(1200)
@given(body=notes(MANIFEST))
@pytest.mark.slow
def test_a_damaged_manifest_is_a_store_error(store, body):
    assert_read_or_store_error(store, manifest_key("demo", "t"), body, lambda: read_manifest(store, "demo", "t"))


@inputs(500)
@given(body=notes(LEASE))
def test_a_damaged_lease_is_a_store_error(store, body):
    assert_read_or_store_error(store, "demo/lease.json", body, lambda: current_token(store, "demo"))


@inputs(300)
@given(body=notes(TOLD))
def test_a_damaged_tracking_note_is_a_store_error(store, body):
    assert_read_or_store_error(store, "demo/tracking.json", body, lambda: tracked(store, "demo", TOLD["uri"]))
