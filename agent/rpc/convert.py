"""Between values and the messages that carry them.

Promises: what goes into a ``Struct`` and comes back is equal to what JSON would have made of it,
whole numbers as ``int``; times keep their nanoseconds' worth of a float.
Does not: know gRPC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import struct_pb2, timestamp_pb2

# Beyond this a double, which is what a Struct holds, no longer tells neighbouring integers apart.
_EXACT = 1 << 53


def plain(value: object) -> Any:
    """``value`` as JSON has it; what JSON does not know becomes text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, bytes | bytearray | memoryview):
        return [plain(part) for part in value]
    return str(value)


def to_struct(document: Mapping[str, Any]) -> struct_pb2.Struct:
    """A document as a message; integers that a double cannot hold become text."""
    message = struct_pb2.Struct()
    message.update(_fitting(plain(document)))
    return message


def from_struct(message: struct_pb2.Struct) -> dict[str, Any]:
    """The document that ``to_struct`` was given."""
    return {key: _value(part) for key, part in message.fields.items()}


def to_timestamp(seconds: float) -> timestamp_pb2.Timestamp:
    """Seconds since 1970 as a message."""
    message = timestamp_pb2.Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def from_timestamp(message: timestamp_pb2.Timestamp) -> float:
    """Seconds since 1970."""
    return message.ToNanoseconds() / 1e9


def _fitting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fitting(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_fitting(part) for part in value]
    if isinstance(value, int) and abs(value) > _EXACT:
        return str(value)
    return value


def _value(message: struct_pb2.Value) -> Any:
    match message.WhichOneof("kind"):
        case "number_value":
            number = message.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return message.string_value
        case "bool_value":
            return message.bool_value
        case "struct_value":
            return from_struct(message.struct_value)
        case "list_value":
            return [_value(part) for part in message.list_value.values]
        case _:
            return None
