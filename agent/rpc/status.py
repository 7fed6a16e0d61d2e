"""Our errors as gRPC statuses, and back.

Promises: an error of the tree that crosses the wire arrives as the same class with the same
message, hint and facts; facts that are too large for a header are shortened, never the message.
What comes from a program of another version, or from gRPC itself, becomes the nearest class.
Does not: send anything but what the error itself says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from google.protobuf import message as protobuf

from agent import errors
from agent.rpc import convert
from agent.rpc.v1 import node_pb2

METADATA_KEY = "ckpt-agent-error-bin"
# What gRPC's own clients wait for before they try again (gRFC A6).
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# gRPC drops headers that come to more than 8 KiB, and base64 makes a third more of ours.
_ERROR_BYTES = 4 << 10
_TEXT_CHARS = 1 << 10

# The first class of which the error is an instance.
_STATUSES: tuple[tuple[type[errors.CkptError], grpc.StatusCode], ...] = (
    (errors.InvalidInput, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.Unauthenticated, grpc.StatusCode.UNAUTHENTICATED),
    (errors.Forbidden, grpc.StatusCode.PERMISSION_DENIED),
    (errors.TargetBusy, grpc.StatusCode.ABORTED),
    (errors.Overloaded, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Refused, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.Interrupted, grpc.StatusCode.CANCELLED),
    (errors.Failed, grpc.StatusCode.ABORTED),
    (errors.DataError, grpc.StatusCode.DATA_LOSS),
    (errors.VolumeFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.VolumeError, grpc.StatusCode.UNAVAILABLE),
    (errors.Unreachable, grpc.StatusCode.UNAVAILABLE),
    (errors.EnvironmentUnfit, grpc.StatusCode.FAILED_PRECONDITION),
)

_FAMILIES: dict[int, type[errors.CkptError]] = {
    3: errors.Refused,
    4: errors.Failed,
    5: errors.DataError,
    6: errors.VolumeError,
    7: errors.EnvironmentUnfit,
    130: errors.Interrupted,
}

_FOREIGN: dict[grpc.StatusCode, type[errors.CkptError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidInput,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.Forbidden,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Interrupted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.UNAVAILABLE: errors.Unreachable,
}


def code(exc: errors.CkptError) -> grpc.StatusCode:
    """The gRPC status that stands for an error."""
    return next(
        (status for kind, status in _STATUSES if isinstance(exc, kind)), grpc.StatusCode.INTERNAL
    )


def details(exc: errors.CkptError) -> str:
    """What a client that knows nothing of ``METADATA_KEY`` shows."""
    return exc.message[:_TEXT_CHARS]


def metadata(exc: errors.CkptError) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata that carries the error, and when to come again if it says so
    (``facts['retry_after_s']``).
    """
    told: tuple[tuple[str, str | bytes], ...] = ((METADATA_KEY, message(exc).SerializeToString()),)
    after_s = exc.facts.get("retry_after_s")
    return (*told, (_PUSHBACK_KEY, f"{after_s * 1000:.0f}")) if isinstance(after_s, float) else told


def message(exc: errors.CkptError) -> node_pb2.Error:
    """The error as a message."""
    made = node_pb2.Error(
        code=exc.code,
        message=exc.message[:_TEXT_CHARS],
        hint=exc.hint[:_TEXT_CHARS],
        retryable=exc.retryable,
        exit_status=exc.exit_status,
    )
    for facts in _shorter(convert.plain(exc.facts)):
        made.facts.CopyFrom(convert.to_struct(facts))
        if made.ByteSize() <= _ERROR_BYTES:
            break
    return made


def error(exc: grpc.RpcError, peer: str) -> errors.CkptError:
    """The error that a call to ``peer`` ended with."""
    for key, value in _trailing(exc):
        if key == METADATA_KEY and isinstance(value, bytes):
            try:
                message = node_pb2.Error.FromString(value)
            except protobuf.DecodeError:
                break
            return rebuilt(message)
    status = exc.code() if isinstance(exc, grpc.Call) else grpc.StatusCode.UNKNOWN
    said = (exc.details() if isinstance(exc, grpc.Call) else "") or str(exc)
    kind = _FOREIGN.get(status, errors.AgentDefect)
    hints = {
        errors.Unreachable: "is the agent of that node running and ready?",
        errors.AgentDefect: "the agent's log says more",
        errors.DeadlineExceeded: "allow more time, or find what is slow",
    }
    return kind(
        f"{peer} answered {status.name}: {said}", hint=hints.get(kind, ""), status=status.name
    )


def _trailing(exc: grpc.RpcError) -> Sequence[tuple[str, str | bytes]]:
    if not isinstance(exc, grpc.Call):
        return ()
    return tuple((key, value) for key, value in exc.trailing_metadata() or ())


def rebuilt(message: node_pb2.Error) -> errors.CkptError:
    """The error that ``message`` was made of."""
    known = {kind.code: kind for kind in _kinds(errors.CkptError) if "code" in vars(kind)}
    kind = known.get(message.code) or _FAMILIES.get(message.exit_status, errors.AgentDefect)
    facts = convert.from_struct(message.facts)
    found = kind(message.message, hint=message.hint)
    # Not as keywords: a fact may be called like a parameter.
    found.facts.update(facts)
    return found


def _kinds(root: type[errors.CkptError]) -> Iterator[type[errors.CkptError]]:
    """Every class of ``errors`` itself below ``root``; a module's private ones are not for others
    to raise.
    """
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from _kinds(kind)


def _shorter(facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """``facts``, then with ever less in long texts and lists, at last without any."""
    yield facts
    for limit in (20, 8, 3):
        yield {key: _cut(value, limit) for key, value in facts.items()}
    yield {}


def _cut(value: Any, limit: int) -> Any:
    chars = limit * 40
    if isinstance(value, str) and len(value) > chars:
        # The end: of a log it tells the most.
        return f"...{value[-chars:]}"
    if isinstance(value, list):
        parts = [_cut(part, limit) for part in value[:limit]]
        more = len(value) - limit
        return [*parts, f"... and {more} more"] if more > 0 else parts
    if isinstance(value, dict):
        return {key: _cut(part, limit) for key, part in value.items()}
    return value
