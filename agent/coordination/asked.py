"""What a request asks for: which operation it is, and which rights that takes.

Promises: names are checked before anything is looked up by them.
Does not: ask who has a right.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format

from agent import errors
from agent.coordination import messages
from agent.model import ids, jobset, podfollow, selection
from agent.model.access import Caller
from agent.model.operations import Kind, Operation, identity
from agent.rpc.v1 import coordinator_pb2 as api

Request = api.CreateEpochRequest | api.RestoreGroupRequest | api.MigrateRequest

# Hundreds of operations lie in the API server's database and in memory; a thousand nodes by name
# fit.
_REQUEST_BYTES = 64 << 10

_KINDS: dict[Kind, type[Request]] = {
    Kind.EPOCH: api.CreateEpochRequest,
    Kind.RESTORE: api.RestoreGroupRequest,
    Kind.MIGRATE: api.MigrateRequest,
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Which pods: of ``jobset``, that ``selector`` means, or that are connected with the pod
    ``followed``; the others are "". ``group`` is what their images are called.
    """

    group: str
    jobset: str = ""
    selector: str = ""
    followed: str = ""


def target(said: api.Target) -> Target:
    """What a request means.

    Raises:
        errors.InvalidInput: nothing, or what cannot be.
    """
    match said.WhichOneof("target"):
        case "jobset":
            return _of_jobset(said.jobset)
        case "selector":
            return Target(selection.group(said.selector.group), selector=said.selector.labels)
        case "followed" if said.followed:
            group = ids.group_name(podfollow.group(said.followed))
            return Target(group, followed=said.followed)
    raise errors.InvalidInput(
        "the request names no target", hint="set target.jobset, target.selector or target.followed"
    )


def target_of(operation: Operation) -> Target:
    """What an operation is about."""
    if operation.jobset:
        return _of_jobset(operation.jobset)
    said = request(operation)
    if isinstance(said, api.MigrateRequest):
        return _of_jobset(said.jobset)
    return target(said.target)


def operation(
    said: Request, caller: Caller, *, now_s: float, longest_s: float, fresh: str
) -> Operation:
    """The operation that ``said`` asks for; ``fresh`` is its id if it has no idempotency key,
    ``now_s`` wall time, ``longest_s`` what it may take if the request does not say.

    Raises:
        errors.InvalidInput: what it says cannot be.
    """
    asking = said.asking
    namespace = ids.namespace_name(asking.namespace)
    meant = _of_jobset(said.jobset) if isinstance(said, api.MigrateRequest) else target(said.target)
    if isinstance(said, api.MigrateRequest) and not said.nodes:
        raise errors.InvalidInput("the request names no nodes", hint="say where it is to go")
    if isinstance(said, api.RestoreGroupRequest):
        if said.epoch:
            ids.epoch_id(said.epoch)
        if not meant.jobset and (said.nodes or said.replace):
            raise errors.InvalidInput(
                "nodes and replace are for JobSets: a selector's pods are made by somebody else",
                hint="make pods that wait for the image, then restore",
            )
    if not (math.isfinite(asking.deadline_s) and asking.deadline_s >= 0):
        raise errors.InvalidInput("deadline_s is no number of seconds")
    key, document = asking.idempotency_key, messages.document(said)
    if len(json.dumps(document)) > _REQUEST_BYTES:
        raise errors.InvalidInput(
            f"the request takes more than {_REQUEST_BYTES >> 10} KiB as it is recorded",
            hint="name fewer nodes, or a shorter selector",
        )
    return Operation(
        id=identity(caller, namespace, key) if key else fresh,
        namespace=namespace,
        kind=next(kind for kind, each in _KINDS.items() if isinstance(said, each)),
        group=meant.group,
        jobset=meant.jobset,
        request=document,
        caller=caller,
        created_s=now_s,
        deadline_s=now_s + (asking.deadline_s or longest_s),
    )


def request(operation: Operation) -> Request:
    """What was asked."""
    kept: Mapping[str, Any] = operation.request
    made = _KINDS[operation.kind]()
    return json_format.ParseDict(dict(kept), made, ignore_unknown_fields=True)


def _of_jobset(name: str) -> Target:
    return Target(ids.group_name(jobset.group(ids.group_name(name))), jobset=name)
