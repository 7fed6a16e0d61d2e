"""Errors cross the wire and come back as what they were; documents do too."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import errors
from agent.rpc import convert, status

PEER = "the agent of node n1"


def kinds(root: type[errors.CkptError] = errors.CkptError) -> Iterator[type[errors.CkptError]]:
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield kind
            yield from kinds(kind)


Ending = Callable[[grpc.ServicerContext], None]
Call = Callable[[Ending], errors.CkptError]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    """Ends a real call as it is told and gives what the caller makes of it."""
    endings: list[Ending] = []

    def end(request: bytes, context: grpc.ServicerContext) -> bytes:
        endings.pop()(context)
        return b""

    handler = grpc.method_handlers_generic_handler(
        "x.X", {"End": grpc.unary_unary_rpc_method_handler(end)}
    )
    address = f"unix:{tmp_path_factory.mktemp('rpc')}/socket"
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[handler])
        server.add_insecure_port(address)
        server.start()
        with grpc.insecure_channel(address) as channel:
            ask: Any = channel.unary_unary("/x.X/End")

            def one(ending: Ending) -> errors.CkptError:
                endings.append(ending)
                with pytest.raises(grpc.RpcError) as caught:
                    ask(b"", timeout=20)
                return status.error(caught.value, PEER)

            yield one
        server.stop(None).wait(5)


def raising(exc: errors.CkptError) -> Ending:
    def end(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(status.metadata(exc))
        context.abort(status.code(exc), status.details(exc))

    return end


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: str(kind.__name__))
def test_every_error_of_the_tree_arrives_as_the_same_class(
    kind: type[errors.CkptError], call: Call
) -> None:
    sent = kind("it failed", hint="try less", reasons=["a", "b"], pid=7, name="x", hint_of=None)
    got = call(raising(sent))
    assert type(got) is kind
    assert (got.message, got.hint, got.facts) == (sent.message, sent.hint, sent.facts)


def test_a_status_is_told_even_to_clients_that_know_nothing_of_our_metadata() -> None:
    table = {
        errors.InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
        errors.Forbidden: grpc.StatusCode.PERMISSION_DENIED,
        errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
        errors.RestoreConflict: grpc.StatusCode.FAILED_PRECONDITION,
        errors.VolumeFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
        errors.Corrupt: grpc.StatusCode.DATA_LOSS,
        errors.CriuFailed: grpc.StatusCode.ABORTED,
        errors.AgentDefect: grpc.StatusCode.INTERNAL,
    }
    for kind, expected in table.items():
        assert status.code(kind("x")) is expected


def test_long_facts_are_shortened_until_they_fit_a_header(call: Call) -> None:
    exc = errors.RestoreConflict(
        "n" * 5000,
        hint="h" * 5000,
        reasons=[f"reason {n} " * 20 for n in range(500)],
        log="l" * 9999,
    )
    ((key, value),) = status.metadata(exc)
    assert key.endswith("-bin")
    assert len(value) <= 4096
    got = call(raising(exc))
    assert isinstance(got, errors.RestoreConflict)
    reasons = got.facts["reasons"]
    assert isinstance(reasons, list)
    assert "reason 0" in reasons[0]
    assert reasons[-1].startswith("... and ")


def test_facts_that_never_fit_are_left_out_and_the_message_stays(call: Call) -> None:
    got = call(raising(errors.Failed("it failed", **{f"key{n}": "v" * 100 for n in range(500)})))
    assert (got.message, got.facts) == ("it failed", {})


def test_an_error_of_a_newer_program_becomes_its_family(call: Call) -> None:
    class Unheard(errors.VolumeError):
        code = "volume-on-fire"

    got = call(raising(Unheard("it burns", hint="water")))
    assert type(got) is errors.VolumeError
    assert got.message == "it burns"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.Unreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.UNIMPLEMENTED, errors.AgentDefect),
    ],
)
def test_what_grpc_itself_says_becomes_the_nearest_error(
    code: grpc.StatusCode, kind: type[errors.CkptError], call: Call
) -> None:
    got = call(lambda context: context.abort(code, "no route"))
    assert type(got) is kind
    assert PEER in got.message
    assert "no route" in got.message


def test_garbage_in_the_metadata_is_not_believed(call: Call) -> None:
    def end(context: grpc.ServicerContext) -> None:
        context.set_trailing_metadata(((status.METADATA_KEY, b"\xff\xff\xff"),))
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    got = call(end)
    assert type(got) is errors.Unreachable


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not x.is_integer())
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), json_values))
def test_a_document_comes_back_equal(document: dict[str, Any]) -> None:
    got = convert.from_struct(convert.to_struct(document))
    assert got == document


def test_what_json_does_not_know_becomes_text() -> None:
    assert convert.plain({1: {2}, "b": b"x", "inf": math.inf}) == {
        "1": [2],
        "b": "b'x'",
        "inf": "inf",
    }
    big = (1 << 53) + 1
    assert convert.from_struct(convert.to_struct({"big": big})) == {"big": str(big)}


@given(st.floats(0, 4e9))
def test_times_come_back_to_the_microsecond(seconds: float) -> None:
    assert abs(convert.from_timestamp(convert.to_timestamp(seconds)) - seconds) < 1e-6
