"""A caller's side of the coordinator's API: its calls as plain values.

Promises: as ``channels``; a standby that says so is ``errors.Unreachable``, as one that does not
answer; what began an operation is said with a key, so that saying it again begins nothing new.
Does not: find the replica that serves, or say anything again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc

from agent import errors
from agent.model.operations import OVER, Kind, State
from agent.model.pods import Placement
from agent.rpc import channels, convert, results, status
from agent.rpc.channels import Calls, Credentials
from agent.rpc.v1 import coordinator_pb2, coordinator_pb2_grpc

# A stream's own end is the operation's; this is for a coordinator that never ends either.
_WATCH_S = 24 * 3600.0
_PAGE = 500

__all__ = [
    "Asking",
    "Coordinator",
    "EpochPlan",
    "Figures",
    "Kind",
    "MemberPlan",
    "Operation",
    "PodBack",
    "State",
    "Target",
    "connect",
    "operation",
]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of a committed dump; seconds. ``leaving`` are connections out of the cut, as texts."""

    stop_s: float
    durable_s: float
    members: tuple[results.Captured, ...]
    connections: int
    leaving: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class PodBack:
    """A pod that runs again, and the peers that its connections were reset to."""

    identity: str
    was: Placement
    now: Placement
    lost: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation as the coordinator told it; times in seconds since 1970, ``ended_s`` None until
    it has ended. ``error`` is why it failed or was cancelled.
    """

    id: str
    namespace: str
    kind: Kind
    group: str
    caller: str
    state: State
    step: str
    revision: int
    created_s: float
    ended_s: float | None
    error: errors.CkptError | None
    takeovers: int
    image: results.Image | None
    figures: Figures | None
    pods: tuple[PodBack, ...]
    cancelling: bool

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER


@dataclasses.dataclass(frozen=True)
class Asking:
    """What every request that begins an operation says. ``wait``: for its turn, if another one is
    under way with the group; ``deadline_s`` 0 is the coordinator's default.
    """

    namespace: str
    key: str
    wait: bool = False
    deadline_s: float = 0.0

    def message(self) -> coordinator_pb2.Asking:
        """As it is sent."""
        said = coordinator_pb2.Asking(
            namespace=self.namespace, idempotency_key=self.key, deadline_s=self.deadline_s
        )
        if self.wait:
            said.when_busy = coordinator_pb2.WHEN_BUSY_WAIT
        return said


@dataclasses.dataclass(frozen=True)
class Target:
    """All pods of ``jobset``, or those that are connected with the pod ``followed``, or, if both
    are "", those of ``group``: that ``labels`` mean, or for a restore, that wait for its image.
    """

    jobset: str = ""
    group: str = ""
    labels: str = ""
    followed: str = ""

    def __str__(self) -> str:
        if self.followed:
            return f"pod/{self.followed}"
        return f"jobset/{self.jobset}" if self.jobset else f"group/{self.group}"

    def message(self) -> coordinator_pb2.Target:
        """As it is sent."""
        if self.jobset:
            return coordinator_pb2.Target(jobset=self.jobset)
        if self.followed:
            return coordinator_pb2.Target(followed=self.followed)
        selector = coordinator_pb2.Selector(labels=self.labels, group=self.group)
        return coordinator_pb2.Target(selector=selector)


@dataclasses.dataclass(frozen=True)
class MemberPlan:
    """A pod of a group, and the document of what a dump of it would take."""

    identity: str
    pod: str
    node: str
    document: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """What a checkpoint of a group would take; ``obstacles`` are why it would be refused."""

    members: tuple[MemberPlan, ...]
    obstacles: tuple[str, ...]


@contextlib.contextmanager
def connect(
    target: str,
    credentials: Credentials,
    *,
    peer: str,
    why: Callable[[], str] = lambda: "",
) -> Iterator[Coordinator]:
    """A channel to the coordinator at ``target``; the rest as ``client.connect``."""
    with channels.opened(target, credentials) as channel:
        yield Coordinator(channel, credentials.token, peer, why)


class Coordinator(Calls):
    """The calls of one replica. Each raises what it raised, and ``errors.Unreachable`` if it does
    not serve, cannot be asked or the connection breaks.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        token: Callable[[], str | None],
        peer: str,
        why: Callable[[], str],
    ) -> None:
        super().__init__(token, peer, why)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(channel)

    def create_epoch(
        self, asking: Asking, target: Target, *, storage: str = "", stop: bool = False
    ) -> Operation:
        """Begin a checkpoint of a group."""
        request = coordinator_pb2.CreateEpochRequest(
            asking=asking.message(), target=target.message(), storage=storage, stop=stop
        )
        return operation(self._once(self._stub.CreateEpoch, request))

    def restore(
        self,
        asking: Asking,
        target: Target,
        *,
        epoch: str = "",
        storage: str = "",
        nodes: Sequence[str] = (),
        replace: bool = False,
    ) -> Operation:
        """Begin to bring a group back, from its newest image or that of ``epoch``."""
        request = coordinator_pb2.RestoreGroupRequest(
            asking=asking.message(),
            target=target.message(),
            epoch=epoch,
            storage=storage,
            nodes=nodes,
            replace=replace,
        )
        return operation(self._once(self._stub.Restore, request))

    def migrate(self, asking: Asking, jobset: str, nodes: Sequence[str]) -> Operation:
        """Begin to move a JobSet."""
        request = coordinator_pb2.MigrateRequest(
            asking=asking.message(), jobset=jobset, nodes=nodes
        )
        return operation(self._once(self._stub.Migrate, request))

    def get(self, namespace: str, identifier: str) -> Operation:
        """An operation as it is now."""
        request = coordinator_pb2.GetOperationRequest(namespace=namespace, id=identifier)
        return operation(self._once(self._stub.GetOperation, request))

    def watch(
        self, namespace: str, identifier: str, cancel: threading.Event | None = None
    ) -> Iterator[Operation]:
        """An operation as it is now, and again whenever it changes, until it has ended or
        ``cancel`` is set (``errors.Interrupted``); the operation goes on either way.
        """
        request = coordinator_pb2.WatchOperationRequest(namespace=namespace, id=identifier)
        call = self._stub.WatchOperation(request, timeout=_WATCH_S, metadata=self._metadata())
        for each in self._events(call, cancel):
            yield operation(each)

    def cancel(self, namespace: str, identifier: str) -> Operation:
        """Ask an operation to give up; it may still run."""
        request = coordinator_pb2.CancelOperationRequest(namespace=namespace, id=identifier)
        return operation(self._once(self._stub.CancelOperation, request))

    def operations(self, namespace: str, group: str = "") -> list[Operation]:
        """The operations of a namespace, newest first."""
        found: list[Operation] = []
        token = ""
        while True:
            request = coordinator_pb2.ListOperationsRequest(
                namespace=namespace, group=group, page_size=_PAGE, page_token=token
            )
            answer = self._once(self._stub.ListOperations, request)
            found.extend(operation(each) for each in answer.operations)
            token = answer.next_page_token
            if not token:
                return found

    def plan(self, namespace: str, target: Target) -> EpochPlan:
        """What a checkpoint of a group would take, without touching it."""
        request = coordinator_pb2.PlanEpochRequest(namespace=namespace, target=target.message())
        answer = self._once(self._stub.PlanEpoch, request)
        return EpochPlan(
            tuple(
                MemberPlan(each.identity, each.pod, each.node, convert.from_struct(each.plan))
                for each in answer.members
            ),
            tuple(answer.obstacles),
        )


def operation(found: coordinator_pb2.Operation) -> Operation:
    """An operation of its message.

    Raises:
        errors.AgentDefect: it says nothing that this program knows of what it is.
    """
    try:
        kind = Kind[coordinator_pb2.OperationKind.Name(found.kind).removeprefix("OPERATION_KIND_")]
        state = State[
            coordinator_pb2.OperationState.Name(found.state).removeprefix("OPERATION_STATE_")
        ]
    except (KeyError, ValueError) as exc:
        raise errors.AgentDefect(
            f"the coordinator told of an operation {found.id} of a kind or state that this program"
            " does not know",
            hint="is it of a later version?",
        ) from exc
    return Operation(
        id=found.id,
        namespace=found.namespace,
        kind=kind,
        group=found.group,
        caller=found.caller,
        state=state,
        step=found.step,
        revision=found.revision,
        created_s=convert.from_timestamp(found.created),
        ended_s=convert.from_timestamp(found.ended) if found.HasField("ended") else None,
        error=status.rebuilt(found.error) if found.HasField("error") else None,
        takeovers=found.takeovers,
        image=results.image(found.image) if found.HasField("image") else None,
        figures=_figures(found.figures) if found.HasField("figures") else None,
        pods=tuple(
            PodBack(
                each.identity,
                results.placement(each.was),
                results.placement(each.now),
                tuple(each.lost),
            )
            for each in found.pods
        ),
        cancelling=found.cancelling,
    )


def _figures(found: coordinator_pb2.EpochFigures) -> Figures:
    return Figures(
        found.stop_s,
        found.durable_s,
        tuple(
            results.Captured(each.name, each.stop_s, each.raw_bytes, each.processes)
            for each in found.members
        ),
        found.connections,
        tuple(found.leaving),
    )
