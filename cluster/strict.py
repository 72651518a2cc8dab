"""Frozen dataclasses from plain mappings (YAML), with every mistake named by file and place.

Knows types, not meanings: what a field is for stands in the dataclass that has it. What a class
checks in its own `__post_init__` ("field: got ..., expected ...") is passed on with its place.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
from collections.abc import Hashable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

T = TypeVar("T")


def parse_yaml(text: str, file: str) -> object:
    """The text's one document as plain values; None when it is empty.

    Raises ValueError with file, line and column for what is not YAML and for a repeated field.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        problem = getattr(error, "problem", None) or str(error)
        raise ValueError(f"{place}: not valid YAML: {problem}") from error


def build(cls: type[T], data: object, *, file: str, where: str = "") -> T:
    """A `cls` (a dataclass) from a mapping of its fields; None or {} means all defaults.

    Raises ValueError naming the file, the path of the field, what was given and what is allowed.
    """
    place = where or "the document"
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise ValueError(f"{file}: {place}: got {_shown(data)}, expected a mapping of fields")
    hints = get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ValueError(f"{file}: {_join(where, key)}: unknown field{_nearest(key, names)}")
    values = {
        key: _value(hints[key], value, file=file, where=_join(where, key))
        for key, value in data.items()
    }
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {_join(where, str(error))}") from error


def within(name: str, value: float | None, least: float, most: float) -> None:
    """Raises ValueError naming the field, unless value is from `least` to `most`, or None."""
    if value is not None and not (least <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name}: got {value}, expected {least:g} to {most:g}")


def field_texts(cls: type[Any]) -> dict[str, str]:
    """Field name -> its text, read from the `- name: text` list of the class's docstring.

    `- a, b: text` gives both fields the same text. Raises ValueError for a field without a text.
    """
    texts: dict[str, str] = {}
    for item in re.split(r"\n\s*- ", cls.__doc__ or "")[1:]:
        names, _, text = item.split("\n\n")[0].partition(": ")
        for name in names.split(","):
            texts[name.strip()] = " ".join(text.split())
    missing = [f.name for f in dataclasses.fields(cls) if f.name not in texts]
    if missing:
        raise ValueError(f"{cls.__name__}: no text for {', '.join(missing)} in its docstring")
    return texts


def _value(hint: Any, value: object, *, file: str, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    (kind, *others) = [option for option in options if option is not type(None)]
    assert not others, f"{where}: a field has one type, maybe None; got {hint}"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, file=file, where=where)
    if not _fits(kind, value):
        allowed = _described(kind) + (" or null" if type(None) in options else "")
        raise ValueError(f"{file}: {where}: got {_shown(value)}, expected {allowed}")
    return float(value) if kind is float and isinstance(value, int) else value


def _fits(kind: Any, value: object) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(option) for option in get_args(kind))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _nearest(key: object, names: list[str]) -> str:
    near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} known here: {', '.join(names)}"


def _join(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a field given twice is a mistake, `off` is a text and 1e9 a number.

    The last two are YAML 1.2's reading; PyYAML's own is 1.1's.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"field {key!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _BOOL, re.compile("(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)
