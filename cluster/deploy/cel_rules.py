"""Rules of a CustomResourceDefinition that are written in CEL (x-kubernetes-validations).

Evaluated with PyPI's cel-python where it is installed. A rule about `oldSelf` is about changes, and
holds for what is new. Only what a rule's own place in the document holds is in its `self`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# Of the extra "deploy"; without it the rules are counted and not evaluated.
celpy: Any = import_module("celpy") if find_spec("celpy") else None

Mapped = Mapping[str, Any]
RULES = "x-kubernetes-validations"


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule and the value that it is about."""

    place: str
    text: str
    message: str
    value: object

    @property
    def is_of_changes(self) -> bool:
        return "oldSelf" in self.text


def can_evaluate() -> bool:
    return celpy is not None


def rules(document: object, schema: Mapped, place: str = "") -> Iterator[Rule]:
    """The rules of a raw CRD schema that apply to what is in this document."""
    for item in schema.get(RULES) or []:
        yield Rule(place.lstrip("."), item["rule"], item.get("message", ""), document)
    if isinstance(document, Mapping):
        for name, part in document.items():
            known = (schema.get("properties") or {}).get(name)
            more = schema.get("additionalProperties")
            inner = known if known is not None else more
            if isinstance(inner, Mapping):
                yield from rules(part, inner, f"{place}.{name}")
    elif isinstance(document, list) and isinstance(schema.get("items"), Mapping):
        for index, part in enumerate(document):
            yield from rules(part, schema["items"], f"{place}[{index}]")


def cel_problems(document: Mapped, schema: Mapped) -> Iterator[str]:
    """Rules that do not hold, each with its place and message. Needs `can_evaluate()`."""
    assert celpy is not None
    environment = celpy.Environment()
    for rule in rules(document, schema):
        if rule.is_of_changes:
            continue
        program = environment.program(environment.compile(rule.text))
        try:
            holds = bool(program.evaluate({"self": celpy.json_to_cel(rule.value)}))
        except celpy.CELEvalError as error:
            yield f"{rule.place}: rule {rule.text!r}: {error}"
            continue
        if not holds:
            yield f"{rule.place}: {rule.message or rule.text}"
