"""Every method fulfils the contract of methods/base.py, and every setting says what it is."""

from __future__ import annotations

import inspect

import pytest

from rrn_core import ConfigError, configure
from rrn_core.methods import METHODS, all_settings, method_of, methods_with, settings_class
from rrn_core.methods.base import Method, RegionMaps
from rrn_core.setting import setting_of


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_all_names_of_the_contract(name):
    method = method_of(name)
    assert method.TITLE
    assert method.REGION_MAPS is None or isinstance(method.REGION_MAPS, RegionMaps)
    assert settings_class(name)().method == name
    for function in ("build_networks", "backward"):
        expected = list(inspect.signature(getattr(Method, function)).parameters)
        assert ["self", *inspect.signature(getattr(method, function)).parameters] == expected


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_has_its_properties_and_a_docstring(name):
    for setting, field in settings_class(name).model_fields.items():
        assert setting_of(field), setting
        assert field.description, setting
        assert field.description[0].isupper(), setting
        assert field.description.endswith("."), setting


def test_all_settings_are_those_of_all_methods():
    assert set(all_settings()) == {name for method in METHODS for name in settings_class(method).model_fields}
    assert all(methods_with(name) for name in all_settings())
    assert "rrn" in methods_with("eps")
    assert "supervised" not in methods_with("eps")


def test_unknown_names_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match=f'^method: must be one of {", ".join(METHODS)}, got "x"$'):
        configure(method="x")
    with pytest.raises(ConfigError, match=r'^preset: must be one of paper, .*, got "x"$'):
        configure("x")
