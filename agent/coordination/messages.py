"""Operations and what is told of them, as the API has it, and as records keep it.

Promises: what is kept as JSON values is told as the message that it was.
Does not: call anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from agent import errors
from agent.coordinator.checkpoint import Checkpoint
from agent.coordinator.jobsetcourse import Returned
from agent.model.operations import Kind, Operation, State
from agent.model.pods import Placement
from agent.rpc import convert, results, status
from agent.rpc.v1 import coordinator_pb2 as api
from agent.rpc.v1 import node_pb2

# Of what there is one of for each pod: hundreds of operations are held in memory, and lie in the
# API server's database.
_MEMBERS = 256
_PEERS = 16

_KINDS = {
    Kind.EPOCH: api.OPERATION_KIND_EPOCH,
    Kind.RESTORE: api.OPERATION_KIND_RESTORE,
    Kind.MIGRATE: api.OPERATION_KIND_MIGRATE,
}
_STATES = {
    State.QUEUED: api.OPERATION_STATE_QUEUED,
    State.RUNNING: api.OPERATION_STATE_RUNNING,
    State.SUCCEEDED: api.OPERATION_STATE_SUCCEEDED,
    State.FAILED: api.OPERATION_STATE_FAILED,
    State.CANCELLED: api.OPERATION_STATE_CANCELLED,
}


def document(message: Message) -> dict[str, Any]:
    """A message as JSON values."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def operation(found: Operation) -> api.Operation:
    """An operation as the API tells it."""
    made = api.Operation(
        id=found.id,
        namespace=found.namespace,
        kind=_KINDS[found.kind],
        group=found.group,
        caller=found.caller.user,
        state=_STATES[found.state],
        step=found.step,
        revision=found.revision,
        created=convert.to_timestamp(found.created_s),
        takeovers=found.takeovers,
        cancelling=found.cancelling,
    )
    if found.ended_s:
        made.ended.CopyFrom(convert.to_timestamp(found.ended_s))
    if found.error is not None:
        json_format.ParseDict(dict(found.error), made.error, ignore_unknown_fields=True)
    if found.image is not None:
        json_format.ParseDict(dict(found.image), made.image, ignore_unknown_fields=True)
    if found.figures is not None:
        json_format.ParseDict(dict(found.figures), made.figures, ignore_unknown_fields=True)
    for each in found.pods:
        json_format.ParseDict(dict(each), made.pods.add(), ignore_unknown_fields=True)
    return made


def error(exc: errors.CkptError) -> dict[str, Any]:
    """An error for a record."""
    return document(status.message(exc))


def image(found: results.Image) -> dict[str, Any]:
    """An image for a record."""
    return document(image_message(found))


def read_image(kept: Mapping[str, Any]) -> results.Image:
    """The image of a record."""
    message = json_format.ParseDict(dict(kept), node_pb2.Image(), ignore_unknown_fields=True)
    return results.image(message)


def image_message(found: results.Image) -> node_pb2.Image:
    """An image as the API tells it."""
    return node_pb2.Image(
        name=f"{found.group}@{found.epoch}",
        group=found.group,
        epoch=found.epoch,
        created_at=convert.to_timestamp(found.created_s),
        members=found.members,
        raw_bytes=found.raw_bytes,
        new_bytes=found.new_bytes,
        stored_bytes=found.stored_bytes,
        pages=found.pages,
        zero_pages=found.zero_pages,
        damage=found.damage or "",
        storage=found.storage,
    )


def figures(done: Checkpoint) -> dict[str, Any]:
    """What a record tells of a committed dump."""
    names = {each.uid: each.pod for each in done.members}
    return document(
        api.EpochFigures(
            stop_s=done.stop_s,
            durable_s=done.durable_s,
            connections=done.connections,
            members=[
                node_pb2.MemberOutcome(
                    name=each.name,
                    stop_s=each.stop_s,
                    raw_bytes=each.raw_bytes,
                    processes=each.processes,
                )
                for each in done.stops[:_MEMBERS]
            ],
            leaving=[
                f"{names.get(uid, uid)} {local} {remote}"
                for uid, local, remote in done.leaving[:_MEMBERS]
            ],
        )
    )


def pods(done: Returned) -> Sequence[dict[str, Any]]:
    """What a record tells of the pods that run again."""
    return [
        document(
            api.RestoredPod(
                identity=each.identity,
                was=_placement(each.was),
                now=_placement(each.now),
                lost=_first(each.lost),
            )
        )
        for each in done.pods[:_MEMBERS]
    ]


def _first(peers: Sequence[str]) -> list[str]:
    more = len(peers) - _PEERS
    return [*peers[:_PEERS], *([f"... and {more} more"] if more > 0 else [])]


def _placement(found: Placement) -> node_pb2.Placement:
    return node_pb2.Placement(
        pod=found.pod, pod_uid=found.pod_uid, node=found.node, addresses=found.addresses
    )
