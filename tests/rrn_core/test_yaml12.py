"""yaml12.py: scalars as YAML 1.2's core schema reads them."""

import tracemalloc

import pytest

from rrn_core.yaml12 import YamlError, parse


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *(("010", 10), ("08", 8), ("-007", -7), ("0o10", 8), ("0x1F", 31), ("12", 12), ("+3", 3)),
        *(("1_8", "1_8"), ("0b11", "0b11"), ("0o8", "0o8"), ("1:30", "1:30"), ("2024-13-01", "2024-13-01"), ("1/8", "1/8")),
        *(("1e-3", 0.001), (".5", 0.5), ("08.5", 8.5), ("-.inf", float("-inf"))),
        *(("no", "no"), ("yes", "yes"), ("true", True), ("~", None), ("null", None), ('"010"', "010")),
    ],
)
def test_scalars_are_those_of_the_core_schema(written, value):
    read = parse(f"x: {written}")["x"]
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("text", ["{a: 1, a: 2}", "1: x", "a: [", "!!int x", "9" * 5000])
def test_what_yaml_or_python_refuses_is_one_line(text):
    with pytest.raises(YamlError, match=r"^not valid YAML: [^\n]+$"):
        parse(text)


def test_merge_keys_merge_and_own_keys_win():
    text = "a: &a {x: 1, y: 2}\nc: &c {<<: *a, y: 3}\nb: {y: 4, <<: [*c, {z: 5}]}\nd: {<<: *b}".replace("b: {", "b: &b {")
    whole = {"x": 1, "y": 4, "z": 5}
    assert parse(text) == {"a": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}, "b": whole, "d": whole}
    assert parse("'<<': 1") == {"<<": 1}


@pytest.mark.parametrize("text", ["{<<: {a: 1}, <<: {b: 1}}", "{<<: 1}", "{<<: {a: 1}, b: 1, b: 2}", "0x" + "f" * 6000, "a: &a [*a]"])
def test_what_does_not_merge_or_end_is_refused(text):
    with pytest.raises(YamlError, match=r"^not valid YAML: [^\n]+$"):
        parse(text)


@pytest.mark.parametrize("form", ["[{0}]", "{{<<: [{0}]}}"], ids=["lists", "merges"])
def test_a_bomb_of_aliases_is_refused_before_it_is_expanded(form):
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} " + form.format(", ".join([f"*a{n - 1}"] * 10)) for n in range(1, 10))]
    tracemalloc.start()
    with pytest.raises(YamlError, match=r"aliases expand to [34],\d{3},\d{3},\d{3} values; at most 100,000 are read"):
        parse("\n".join(lines))
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()
