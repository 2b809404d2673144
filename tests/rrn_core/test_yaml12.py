"""yaml12.py: scalars as YAML 1.2's core schema reads them."""

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
