"""Taking JSON from a volume apart without trusting it.

Promises: a value returned has the type and range asked for; anything else, however malformed,
raises ``errors.Corrupt`` naming the part.
Does not: know what the values mean.
"""

from __future__ import annotations

import json
from typing import Any

from agent import errors

MAX_COUNT = 1 << 62
_MAX_DEPTH_HINT = "the file was damaged or made by something else; verify shows what is left"


def encode(value: dict[str, Any]) -> bytes:
    """Return ``value`` as canonical JSON.

    Raises:
        errors.InvalidInput: something in it is not a JSON value.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise errors.InvalidInput(f"not a JSON value: {exc}") from exc
    return text.encode("ascii")


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


class Fields:
    """One JSON object of a file called ``part``."""

    def __init__(self, value: object, part: str) -> None:
        if not isinstance(value, dict):
            raise errors.Corrupt(f"{part} lacks an object where one belongs", part=part)
        self._values: dict[str, Any] = value
        self._part = part

    @classmethod
    def parse(cls, data: bytes, part: str) -> Fields:
        """Parse bytes that hold one JSON object."""
        try:
            value = json.loads(data, parse_constant=_no_number)
        except (ValueError, RecursionError) as exc:
            raise errors.Corrupt(f"{part} is not JSON", part=part, hint=_MAX_DEPTH_HINT) from exc
        return cls(value, part)

    def has(self, key: str) -> bool:
        """Tell whether there is a value other than null."""
        return self._values.get(key) is not None

    def integer(self, key: str, *, least: int = 0, most: int = MAX_COUNT) -> int:
        """An integer within bounds."""
        value = self._values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self._wrong(key)
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(key)
        if not abs(value) < MAX_COUNT:
            raise self._wrong(key)
        return float(value)

    def text(self, key: str) -> str:
        """A string that can be encoded."""
        value = self._values.get(key)
        if not isinstance(value, str):
            raise self._wrong(key)
        return value

    def blob(self, key: str, length: int | None = None) -> bytes:
        """Bytes written as hexadecimal digits."""
        try:
            value = bytes.fromhex(self.text(key))
        except ValueError as exc:
            raise self._wrong(key) from exc
        if length is not None and len(value) != length:
            raise self._wrong(key)
        return value

    def objects(self, key: str) -> list[Fields]:
        """A list of objects."""
        return [Fields(value, self._part) for value in self._list(key)]

    def texts(self, key: str) -> list[str]:
        """A list of strings."""
        values = self._list(key)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key)
        return values

    def pair(self, key: str) -> tuple[int, int]:
        """Two integers, not negative."""
        value = self._list(key)
        if len(value) != 2:
            raise self._wrong(key)
        both = Fields({"0": value[0], "1": value[1]}, self._part)
        return both.integer("0"), both.integer("1")

    def mapping(self, key: str) -> dict[str, Any]:
        """An object with whatever is in it."""
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self._wrong(key)
        return value

    def _list(self, key: str) -> list[Any]:
        value = self._values.get(key)
        if not isinstance(value, list):
            raise self._wrong(key)
        return value

    def _wrong(self, key: str) -> errors.Corrupt:
        return errors.Corrupt(f"{self._part} has no valid {key!r}", part=self._part)
