"""YAML 1.2 as people mean it: `1_8` is a text, `1e-3` a number, `010` ten, and a key that is given twice is refused."""

from __future__ import annotations

import re
from typing import Any

import yaml

LARGEST = 100_000
"""Values of a document once its aliases are expanded."""


class YamlError(ValueError):
    """The text is not valid YAML 1.2. One line says what is wrong and where."""


def parse(text: str) -> Any:
    """The document. Raises YamlError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (size := _size(node, {})) > LARGEST:
            raise YamlError(f"not valid YAML: its aliases expand to {size:,} values; at most {LARGEST:,} are read")
        return loader.construct_document(node)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number or date that Python refuses
        words = re.sub(r"\s+", " ", str(error)).replace('in "<unicode string>", ', "at ")
        raise YamlError(f"not valid YAML: {words}") from error
    except RecursionError:
        raise YamlError("not valid YAML: nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node and the node itself, those behind an alias counted each time. Nothing is expanded."""
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # while it is counted: an alias inside its own anchor has no end
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = min(1 + sum(_size(part, known) for part in inner), 10**15)
    return known[id(node)]


_MERGE = "tag:yaml.org,2002:merge"
_INT_BITS = 64


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, and no duplicate keys.

    PyYAML follows YAML 1.1, which reads `1_8` as 18, `1e-3` as a text, `010` as 8, `no` as false and `1:30` as 90.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own protocol)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._checked: set[int] = set()

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Replace `<<` by the keys that it merges; before that, no key may be given twice."""
        if id(node) in self._checked:
            return
        self._checked.add(id(node))
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = "<<" if key_node.tag == _MERGE else self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} must be a text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f'the key "{key}" is given twice', key_node.start_mark)
            seen.add(key)
        super().flatten_mapping(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        digits = self.construct_scalar(node)
        value = int(digits, {"0o": 8, "0x": 16}.get(digits[:2], 10))
        if value.bit_length() > _INT_BITS:
            raise yaml.constructor.ConstructorError(None, None, f"the number {digits[:20]}... is too large", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})$"), list(_first))
