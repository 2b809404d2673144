"""sweep_file.py: what a sweep file may contain, and the message of each fault."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.errors import SpecError
from orchestration.plan.sweep_file import check, load

GOOD = "name: demo\npreset: digits\ngrid: {eps: [0.3, 0.6]}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return path

    return write


def faults_of(path: Path, **options) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load(path, **options)
    assert all(fault.startswith((f"{path}: ", "--set ")) for fault in caught.value.faults)
    return [fault.removeprefix(f"{path}: ") for fault in caught.value.faults]


def test_a_good_file_merges_preset_and_base(write):
    spec = load(write(GOOD + "base: {lr: 0.02}\n"))
    assert spec.settings["lr"] == 0.02
    assert spec.settings["backbone"] == "tiny"
    assert spec.grid == {"eps": [0.3, 0.6]}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("sedes: [1]", 'sedes: unknown key; did you mean "seeds"?'),
        ("base: {epsilon: 0.5}", 'base.epsilon: unknown setting; did you mean "eps"?'),
        ("base: {lambda_1: 0.5}", 'base.lambda_1: unknown setting; did you mean "lambda1"?'),
        ('base: {lr: "0.6"}', 'base.lr: must be a number, got "0.6"; remove the quotes'),
        ("base: {lambda1: .nan}", "base.lambda1: must be a finite number, got NaN"),
        ("base: {lambda1: .inf}", "base.lambda1: must be a finite number, got Infinity"),
        ("base: {drlc: yes}", 'base.drlc: must be true or false, got "yes"'),
        ("base: {epochs: 1.5}", "base.epochs: must be a whole number, got 1.5"),
        ("base: {discriminator: pacth}", 'base.discriminator: must be one of patch, image, pixel, got "pacth"; did you mean "patch"?'),
        ("base: {scales: [1, -2]}", "base.scales[1]: must be > 0, got -2"),
        (
            "base: {partition: 1_8}",
            'base.partition: must be one of "1/16", "1/8", "1/4", "1/2", "full", or "n:92" for a count, got "1_8"; did you mean "1/8"?',
        ),
        ("base: {partition: 0.125}", "base.partition: must be a text, got 0.125"),
        ("resources: {cpu: 0}", "resources.cpu: must be > 0, got 0"),
        (
            "resources: {gpu: 4}",
            "resources.gpu: must be <= 1 (a trial uses one GPU or a share of it; more GPUs train more trials at once), got 4",
        ),
        ("resources: {memory: lots}", 'resources.memory: must be auto, or GiB of main memory > 0, got "lots"'),
        ("resources: {memory: -1}", "resources.memory: must be auto, or GiB of main memory > 0, got -1"),
        ("resources: {gpus: 1}", 'resources.gpus: unknown key; did you mean "gpu"?'),
        ("retries: -1", "retries: must be >= 0, got -1"),
        ("seeds: []", "seeds: must not be empty"),
        ("seeds: [1.5]", "seeds[0]: must be a whole number, got 1.5"),
        ("points: [{}]", "points[0]: must set something"),
        ("points: [{eps: 2}]", "points[0].eps: must be < 1, got 2"),
        ("space: {lr: {low: 0.1, high: 0.9}}", "search: space is given, so say {sampler: tpe, trials: N}"),
        ("base: {eps: 0.5}", "base.eps: is varied in grid or space too; keep one of them"),
        ("tracking: mlflow.db", "tracking: must be sqlite:///PATH or http(s)://HOST (credentials belong in the environment)"),
    ],
)
def test_each_fault_is_one_line_with_its_place(write, line, fault):
    assert faults_of(write(GOOD + line + "\n")) == [fault]


@pytest.mark.parametrize(
    ("grid", "fault"),
    [
        ("{eps: []}", "grid.eps: must not be empty"),
        ("{eps: [0.2, 1.5]}", "grid.eps[1]: must be < 1, got 1.5"),
        ("{eps: [0.2, 0.2]}", "grid.eps[1]: 0.2 is given twice"),
        ("{epsilon: [0.2]}", 'grid.epsilon[0]: unknown setting; did you mean "eps"?'),
        ("{eps: 0.5}", "grid.eps: must be a list, got 0.5"),
        ("{seed: [1, 2]}\nseeds: [1]", "seeds: seed is also varied in grid, points or space; keep one of them"),
    ],
)
def test_each_fault_of_a_grid_is_told(write, grid, fault):
    assert faults_of(write(f"name: demo\npreset: digits\ngrid: {grid}\n")) == [fault]


@pytest.mark.parametrize(
    ("space", "fault"),
    [
        ("{eps: {low: 0.9, high: 0.1}}", "space.eps: low must be < high, got 0.9 and 0.1"),
        ("{eps: {low: 0.1}}", "space.eps: needs low and high, or choices"),
        ("{eps: {low: 0.1, high: 1.5}}", "space.eps.high: must be < 1, got 1.5"),
        ("{lambda1: {low: 0, high: 1, log: true}}", "space.lambda1.low: must be > 0 for log, got 0"),
        ("{eps: {choices: []}}", "space.eps: give low and high (and log), or a list of choices that is not empty"),
        ("{eps: {choices: [0.1, 7]}}", "space.eps.choices[1]: must be < 1, got 7"),
        ("{}", "space: search needs at least one setting to vary"),
    ],
)
def test_each_fault_of_a_search_space_is_told(write, space, fault):
    assert faults_of(write(f"name: demo\npreset: digits\nsearch: {{sampler: tpe, trials: 3}}\nspace: {space}\n")) == [fault]


@pytest.mark.parametrize(
    ("published", "fault"),
    [
        ("{source: x, rows: []}", "published.rows: must not be empty"),
        ("{rows: [{when: {eps: 0.3}, value: 1}]}", "published.source: is required"),
        ("{source: x, rows: [{when: {eps: 0.3}}]}", "published.rows[0].value: is required"),
        ("{source: x, rows: [{when: {eps: 0.3}, value: 100.5}]}", "published.rows[0].value: must be <= 100, got 100.5"),
        ("{source: x, rows: [{when: {}, value: 1}]}", 'published.rows[0].when: must name a setting, such as {partition: "1/8"}'),
        ("{source: x, rows: [{when: {epsilon: 1}, value: 1}]}", 'published.rows[0].when.epsilon: unknown setting; did you mean "eps"?'),
        ("{source: x, rows: [{when: {eps: 2}, value: 1}]}", "published.rows[0].when.eps: must be < 1, got 2"),
        ("{source: x, rows: [{wen: {eps: 0.3}, value: 1}]}", "published.rows[0].when: is required"),
        (
            "{source: x, rows: [{when: {eps: 0.3}, value: 1, metric: miou_ensemble}]}",
            "published.rows[0].metric: must be one of val/miou, val/miou_branch1, val/miou_branch2, val/miou_ensemble, "
            'got "miou_ensemble"; did you mean "val/miou_ensemble"?',
        ),
    ],
)
def test_each_fault_of_published_numbers_is_told(write, published, fault):
    assert fault in faults_of(write(GOOD + f"published: {published}\n"))


def test_a_published_number_may_be_missing_and_is_of_the_judged_metric_unless_said(write):
    spec = load(write(GOOD + "published: {source: x, rows: [{when: {eps: 0.3}, value: null}]}\n"))
    assert (spec.published.rows[0].metric, spec.published.rows[0].value) == ("val/miou", None)


def test_all_faults_are_reported_at_once(write):
    text = "name: x\npreset: digit\nbase: {lr: '1', epsilon: 1}\ngrid: {eps: [3]}\nsedes: [1]\nresources: {cpu: 0}\n"
    places = [fault.split(":")[0] for fault in faults_of(write(text))]
    assert places == ["resources.cpu", "sedes", "preset", "base.lr", "base.epsilon", "grid.eps[0]"]


def test_a_duplicate_key_is_refused(write):
    (fault,) = faults_of(write("name: demo\nbase:\n  eps: 0.1\n  eps: 0.2\n"))
    assert 'the key "eps" is given twice' in fault
    assert "line 4" in fault


@pytest.mark.parametrize(
    "text", ["", "- a\n", "just words", "name: [", "\x00", "name: !!python/object:os.system {}", "name: " + 3000 * "["]
)
def test_what_is_not_a_sweep_is_refused_in_one_line(write, text):
    (fault,) = faults_of(write(text))
    assert "\n" not in fault


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere.yaml: cannot be read: No such file"):
        load(tmp_path / "nowhere.yaml")


def test_numbers_are_read_as_yaml_1_2_reads_them(write):
    spec = load(write("name: demo\npreset: digits\nbase: {discriminator_lr: 1e-3}\n"))
    assert spec.settings["discriminator_lr"] == 0.001


def test_overrides_go_through_the_same_checks(write):
    path = write(GOOD)
    assert load(path, overrides=["lr=0.5", "grid.eps=[0.1]"]).grid == {"eps": [0.1]}
    assert faults_of(path, overrides=["lr=-1"]) == ["base.lr: must be > 0, got -1"]
    assert faults_of(path, overrides=["lr"]) == ["--set lr: must be key=value"]
    assert faults_of(path, overrides=["name.x=1"]) == ["--set name.x=1: name is not a mapping in the file"]


inner_keys = st.sampled_from(["eps", "lr", "seed", "x", "low", "choices", "rows", "when", "value", "source"])
outer_keys = st.sampled_from(["name", "preset", "base", "grid", "points", "seeds", "search", "space", "store", "published"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(inner_keys, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(outer_keys, json_values, max_size=5))
def test_rubbish_is_refused_in_lines_and_never_crashes(document):
    try:
        check(document)
    except SpecError as error:
        faults = error.faults
        assert faults
        assert all("\n" not in fault for fault in faults)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            f"name: x\ngrid: {{partition: [{', '.join(f'n:{n}' for n in range(1, 1001))}], lr: {[n / 1e4 for n in range(1, 1001)]}}}\n"
            f"seeds: {list(range(1000))}",
            "grid, points and seeds: must make <= 10,000 trials, got 1,000,000,000",
        ),
        (
            "name: x\nsearch: {trials: 1000000000}\nspace: {eps: {low: 0.1, high: 0.2}}",
            "search.trials: must be <= 10,000, got 1,000,000,000",
        ),
        (
            f"name: x\nsearch: {{trials: 1}}\nspace: {{seed: {{choices: {list(range(10001))}}}}}",
            "space: must have <= 10,000 choices, got 10,001",
        ),
    ],
    ids=["grid", "search", "choices"],
)
def test_a_product_is_refused_by_its_number_before_it_is_made(write, text, fault):
    path = write(text)
    tracemalloc.start()
    assert faults_of(path) == [fault]
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_change_of_the_command_line_is_read_like_the_file(write):
    spec = load(write(GOOD + "base: {<<: {lr: 0.02}}\n"), overrides=["seed=007", "epochs=0o10", "batch_size=08"])
    assert spec.base == {"lr": 0.02, "seed": 7, "epochs": 8, "batch_size": 8}


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("base: {seed: 7}\nseeds: [0, 1]", ["seeds: seed is also set in base; keep one of them"]),
        (
            "seeds: []\nbase: {lr: -1}\nstroe: x",
            ['stroe: unknown key; did you mean "store"?', "seeds: must not be empty", "base.lr: must be > 0, got -1"],
        ),
        ("search: {trials: 0}\nspace: {eps: {low: 0.1, high: 0.2}}", ["search.trials: must be >= 1, got 0"]),
        (
            "published: {source: x, rows: [{when: {method: cps, eps: 0.6}, value: 1.0}]}",
            ["published.rows[0].when.eps: method cps has no such setting; rrn has it"],
        ),
    ],
)
def test_no_fault_hides_another_and_nothing_is_ignored(write, text, faults):
    assert faults_of(write(f"name: x\npreset: digits\n{text}\n")) == faults


@pytest.mark.parametrize("partition", ["n:092", "n:0", "n:", "n:+9", "n:9\\n", "n:\u0669\u0662", "n:9" + "0" * 40])
def test_a_number_of_labelled_images_has_one_spelling(write, partition):
    assert "must be one of" in faults_of(write(f'name: x\npreset: digits\nbase: {{partition: "{partition}"}}\n'))[0]
