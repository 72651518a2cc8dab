"""Strict reading of JSON objects: every field there, of its type, within its limits, and no other.

Errors name the file and the path of the field. Knows no store.
"""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from expert_store.errors import StoreFormatError

MAX_STRING = 4096
MAX_NUMBER = 1e300
SHA256 = r"[0-9a-f]{64}"

Choice = TypeVar("Choice")


def parse_object(text: bytes, where: str) -> Fields:
    """The object in `text`. StoreFormatError for bad JSON, duplicate keys, NaN or a non-object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = sorted({key for key in keys if keys.count(key) > 1})
            raise StoreFormatError(f"{where}: duplicate key {twice[0]!r}; write each field once")
        return found

    def refuse(constant: str) -> Any:
        raise StoreFormatError(f"{where}: {constant} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise StoreFormatError(
            f"{where}: not valid JSON ({error}); the file is truncated or damaged"
        ) from error
    return Fields(value, where)


class Fields:
    """One JSON object, read field by field; `close()` refuses what was not read."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise StoreFormatError(f"{where}: expected an object, got {_kind(value)}")
        self._value = value
        self._unread = set(value)
        self.where = where

    def take(self, name: str) -> Any:
        if name not in self._value:
            raise StoreFormatError(
                f"{self.where}: field {name!r} is missing; an older moetier may have written it, "
                "if it is a store's manifest compress the model again with --force"
            )
        self._unread.discard(name)
        return self._value[name]

    def is_null(self, name: str) -> bool:
        """Whether the field is null; if so it is read."""
        if self._value.get(name, ...) is None:
            self._unread.discard(name)
            return True
        return False

    def integer(self, name: str, low: int, high: int) -> int:
        return self._integer(name, self.take(name), low, high)

    def integers(
        self, name: str, low: int, high: int, *, count: int | None = None, limit: int = 64
    ) -> list[int]:
        """A list of `count` integers, of at most `limit` when None."""
        return [self._integer(name, v, low, high) for v in self.items(name, limit, count=count)]

    def number(self, name: str, low: float = 0.0, high: float = MAX_NUMBER) -> float:
        """A finite number from `low` to `high`."""
        return self._number(name, self.take(name), low, high)

    def numbers(self, name: str, low: float, high: float, *, count: int) -> list[float]:
        """A list of `count` finite numbers."""
        items = self.items(name, count, count=count)
        return [self._number(name, value, low, high) for value in items]

    def choice(self, name: str, allowed: tuple[Choice, ...]) -> Choice:
        """One of the values allowed, of the same type: 2.0 and true are not 2 and 1."""
        return self._choice(name, self.take(name), allowed)

    def choices(self, name: str, allowed: tuple[Choice, ...], *, count: int) -> list[Choice]:
        """A list of `count` of the values allowed."""
        items = self.items(name, count, count=count)
        return [self._choice(name, value, allowed) for value in items]

    def boolean(self, name: str) -> bool:
        value = self.take(name)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false", _kind(value))
        return value

    def string(self, name: str, pattern: str = r".+") -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise self.bad(name, "a string", _kind(value))
        if len(value) > MAX_STRING:
            raise self.bad(name, f"at most {MAX_STRING} characters", len(value))
        if re.fullmatch(pattern, value, re.DOTALL) is None:
            raise self.bad(name, f"text matching {pattern}", repr(value))
        return value

    def fields(self, name: str) -> Fields:
        return Fields(self.take(name), f"{self.where}: {name}")

    def items(self, name: str, limit: int, *, count: int | None = None) -> list[Any]:
        """A list of at most `limit` values, of exactly `count` unless None."""
        value = self.take(name)
        if not isinstance(value, list):
            raise self.bad(name, "a list", _kind(value))
        if count is not None and len(value) != count:
            raise self.bad(name, f"{count} items", len(value))
        if len(value) > limit:
            raise self.bad(name, f"at most {limit} items", len(value))
        return value

    def names(self) -> list[str]:
        """All field names of this object, for objects used as mappings."""
        return list(self._value)

    def close(self) -> None:
        if self._unread:
            raise StoreFormatError(
                f"{self.where}: unknown field {sorted(self._unread)[0]!r}; "
                "a newer moetier may have written it"
            )

    def bad(self, name: str, expected: str, got: object) -> StoreFormatError:
        return StoreFormatError(f"{self.where}: {name}: expected {expected}, got {got}")

    def _integer(self, name: str, value: Any, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.bad(name, "an integer", _kind(value))
        if not low <= value <= high:
            raise self.bad(name, f"{low} to {high}", value)
        return value

    def _number(self, name: str, value: Any, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.bad(name, "a number", _kind(value))
        if not low <= value <= high:  # nor is NaN, infinity or an integer too large for a float
            upper = f" and <= {high:g}" if high < MAX_NUMBER else ""
            raise self.bad(name, f"a finite number >= {low:g}{upper}", value)
        return float(value)

    def _choice(self, name: str, value: Any, allowed: tuple[Choice, ...]) -> Choice:
        for item in allowed:
            if value == item and type(value) is type(item):
                return item
        raise self.bad(name, f"one of {allowed}", repr(value))


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return kinds.get(type(value), "null" if value is None else "a number")
