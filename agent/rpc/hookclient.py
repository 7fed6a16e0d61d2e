"""A hook's call over a connection that somebody else made, wherever it leads.

Promises: gRPC connects nowhere but to what it is given; the call has ended by its deadline and is
never tried again; an answer of any size costs a few kilobytes; the other end has let go of the
connection as ``host.carry`` says.
Does not: judge the answer.
"""

from __future__ import annotations

import dataclasses
import socket

import grpc

from agent import errors
from agent.host import carry, clock
from agent.model.hooks import Told
from agent.model.pods import Placement
from agent.rpc.v1 import hooks_pb2, hooks_pb2_grpc

# The answer has no fields: whatever a workload puts in is left.
_ANSWER_BYTES = 4096
_OPTIONS = (
    ("grpc.max_receive_message_length", _ANSWER_BYTES),
    ("grpc.max_metadata_size", _ANSWER_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * _ANSWER_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.service_config_disable_resolution", 1),
    # Two hooks at once never share a connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
)
OK = "OK"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The status's name, and what it says."""

    status: str
    said: str


def call(connected: socket.socket, told: Told, deadline: clock.Deadline) -> Answer:
    """Call ``Hooks.Call``; closes the socket.

    Raises:
        errors.DeadlineExceeded: it was not answered in time.
        errors.Unreachable: the other end does not speak gRPC, or hung up.
    """
    with (
        carry.carried(connected, deadline) as path,
        grpc.insecure_channel(f"unix:{path}", _OPTIONS) as channel,
    ):
        try:
            stub = hooks_pb2_grpc.HooksStub(channel)
            stub.Call(message(told), timeout=deadline.remaining_s)
        except grpc.RpcError as exc:
            return _answered(exc, deadline)
    return Answer(OK, "")


def _answered(exc: grpc.RpcError, deadline: clock.Deadline) -> Answer:
    if deadline.expired:
        raise errors.DeadlineExceeded("it did not answer in time", hint="allow more time") from exc
    status = exc.code()
    if status is grpc.StatusCode.UNAVAILABLE:
        raise errors.Unreachable(
            "what listens there does not answer as a gRPC server does",
            hint="look at what listens there: it serves without TLS",
        ) from exc
    return Answer(status.name, exc.details() or "")


def message(told: Told) -> hooks_pb2.HookRequest:
    """What a hook is told, as the API has it."""
    made = hooks_pb2.HookRequest(
        hook=told.hook,
        phase=f"HOOK_PHASE_{told.phase.name}",
        outcome=f"HOOK_OUTCOME_{told.outcome.name if told.outcome else 'UNSPECIFIED'}",
        image=told.image,
        namespace=told.namespace,
        now=_place(told.now),
    )
    if told.was is not None:
        made.was.CopyFrom(_place(told.was))
    return made


def _place(found: Placement) -> hooks_pb2.HookPlace:
    return hooks_pb2.HookPlace(
        pod=found.pod, pod_uid=found.pod_uid, node=found.node, addresses=found.addresses
    )
