"""A cluster's coordinator for tests: its API over real TLS, with operations that end as they are
told. Each replica serves while ``Cluster.leader`` is its name.
"""

# ruff: noqa: N802  a servicer's methods are called as the API calls them

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from agent import errors
from agent.rpc import openly, status
from agent.rpc.v1 import coordinator_pb2 as api
from agent.rpc.v1 import coordinator_pb2_grpc, node_pb2
from tests.fakes.authority import Authority

SERVICE = "agent.rpc.v1.Coordinator"
SERVER_NAME = "ckpt-agent-coordinator.ckpt-agent.svc"
_OVER = {
    api.OPERATION_STATE_SUCCEEDED,
    api.OPERATION_STATE_FAILED,
    api.OPERATION_STATE_CANCELLED,
}


@dataclasses.dataclass
class Cluster:
    """What all replicas know. ``script`` are the changes that an operation runs through, the last
    of which ends it; a callable among them is called at that point. ``cancelled`` is how one ends
    that is asked to give up.
    """

    tokens: set[str] = dataclasses.field(default_factory=set)
    leader: str = "a"
    operations: dict[str, api.Operation] = dataclasses.field(default_factory=dict)
    script: list[dict[str, Any] | Callable[[], None]] = dataclasses.field(default_factory=list)
    calls: list[tuple[str, str, Any]] = dataclasses.field(default_factory=list)
    plan: api.PlanEpochResponse = dataclasses.field(default_factory=api.PlanEpochResponse)
    refuses: errors.CkptError | None = None
    # Called instead of giving an operation up that is asked to.
    deaf: Callable[[], None] | None = None
    changed: threading.Condition = dataclasses.field(default_factory=threading.Condition)
    # Set once somebody watches an operation: what made it was answered.
    watched: threading.Event = dataclasses.field(default_factory=threading.Event)
    # Of a replica, by name: ends its calls as its death would; none goes on when it returns.
    ends: dict[str, Callable[[], object]] = dataclasses.field(default_factory=dict)
    healths: dict[str, openly.Health] = dataclasses.field(default_factory=dict)

    def lead(self, name: str) -> None:
        """Let a replica serve, and only that."""
        self.leader = name
        for each, servicer in self.healths.items():
            servicer.set_serving(serving=each == name)

    def change(self, identifier: str, **fields: Any) -> None:
        """Change an operation, and tell those who watch it."""
        with self.changed:
            found = self.operations[identifier]
            found.MergeFrom(api.Operation(**fields))
            found.revision += 1
            if found.state in _OVER:
                found.ended.FromSeconds(int(time.time()))
            self.changed.notify_all()

    def play(self, identifier: str) -> None:
        """Run the script, until its end or until the operation is cancelled."""
        for each in self.script:
            if callable(each):
                each()
                continue
            with self.changed:
                if self.operations[identifier].state in _OVER:
                    return
            self.change(identifier, **each)


class _Servicer(coordinator_pb2_grpc.CoordinatorServicer):
    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._keys: dict[str, str] = {}

    def _begin(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if str(given).removeprefix("Bearer ") not in self._cluster.tokens:
            self._abort(context, errors.Unauthenticated("the token is not known", hint="log in"))
        if self._cluster.leader != self._name:
            self._abort(context, errors.Unreachable("another replica serves", hint="ask it"))
        self._cluster.calls.append((self._name, method, request))
        if self._cluster.refuses is not None:
            self._abort(context, self._cluster.refuses)

    def _abort(self, context: grpc.ServicerContext, exc: errors.CkptError) -> None:
        context.set_trailing_metadata(status.metadata(exc))
        context.abort(status.code(exc), status.details(exc))

    def _new(self, kind: str, group: str, request: Any, context: Any) -> api.Operation:
        self._begin(kind, request, context)
        key = request.asking.idempotency_key
        with self._cluster.changed:
            if key in self._cluster.operations:
                return self._cluster.operations[key]
            found = api.Operation(
                id=key or f"op-{len(self._cluster.operations)}",
                namespace=request.asking.namespace,
                kind=f"OPERATION_KIND_{kind}",
                group=group,
                caller="ada",
                state=api.OPERATION_STATE_QUEUED,
                revision=1,
            )
            found.created.FromSeconds(int(time.time()))
            self._cluster.operations[found.id] = found
        threading.Thread(target=self._cluster.play, args=(found.id,), daemon=True).start()
        return found

    def _group(self, target: api.Target) -> str:
        if target.followed:
            return f"followed.{target.followed}"
        return f"jobset.{target.jobset}" if target.jobset else target.selector.group

    def CreateEpoch(self, request: Any, context: Any) -> api.Operation:
        return self._new("EPOCH", self._group(request.target), request, context)

    def Restore(self, request: Any, context: Any) -> api.Operation:
        return self._new("RESTORE", self._group(request.target), request, context)

    def Migrate(self, request: Any, context: Any) -> api.Operation:
        return self._new("MIGRATE", f"jobset.{request.jobset}", request, context)

    def _found(self, request: Any, context: Any) -> api.Operation:
        found = self._cluster.operations.get(request.id)
        if found is None or found.namespace != request.namespace:
            self._abort(context, errors.NotFound(f"there is no operation {request.id}"))
        assert found is not None
        return found

    def GetOperation(self, request: Any, context: Any) -> api.Operation:
        self._begin("Get", request, context)
        return self._found(request, context)

    def WatchOperation(self, request: Any, context: Any) -> Iterator[api.Operation]:
        self._begin("Watch", request, context)
        self._cluster.watched.set()
        found, seen = self._found(request, context), 0
        while context.is_active():
            with self._cluster.changed:
                if found.revision == seen:
                    self._cluster.changed.wait(0.05)
                    continue
                copy = api.Operation()
                copy.CopyFrom(found)
            seen = copy.revision
            yield copy
            if copy.state in _OVER:
                return

    def CancelOperation(self, request: Any, context: Any) -> api.Operation:
        self._begin("Cancel", request, context)
        found = self._found(request, context)
        if self._cluster.deaf is not None:
            self._cluster.change(found.id, cancelling=True)
            self._cluster.deaf()
            return found
        why = errors.Interrupted("cancelled; every pod goes on", hint="ask again")
        self._cluster.change(
            found.id,
            state=api.OPERATION_STATE_CANCELLED,
            cancelling=True,
            error=status.message(why),
        )
        return found

    def ListOperations(self, request: Any, context: Any) -> api.ListOperationsResponse:
        self._begin("List", request, context)
        every = [
            each
            for each in reversed(list(self._cluster.operations.values()))
            if each.namespace == request.namespace and request.group in ("", each.group)
        ]
        at = int(request.page_token or 0)
        rest = str(at + 2) if at + 2 < len(every) else ""
        return api.ListOperationsResponse(operations=every[at : at + 2], next_page_token=rest)

    def PlanEpoch(self, request: Any, context: Any) -> api.PlanEpochResponse:
        self._begin("Plan", request, context)
        return self._cluster.plan


def image(group: str, number: int = 1) -> node_pb2.Image:
    """An image of a group."""
    epoch = f"20260131-2359{number:02d}-0a1b2c"
    found = node_pb2.Image(
        name=f"{group}@{epoch}",
        group=group,
        epoch=epoch,
        members=["worker-0-0.trainer", "worker-0-1.trainer"],
        raw_bytes=1 << 20,
        new_bytes=1 << 19,
        stored_bytes=1 << 18,
        pages=256,
        zero_pages=3,
        storage="default",
    )
    found.created_at.FromSeconds(1_790_000_000 + number)
    return found


@contextlib.contextmanager
def running(cluster: Cluster, name: str, authority: Authority) -> Iterator[str]:
    """A replica on loopback; its address."""
    certificate, key = authority.issue(SERVER_NAME, hosts=(SERVER_NAME,))
    server = grpc.server(ThreadPoolExecutor(8))
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(_Servicer(cluster, name), server)
    cluster.healths[name] = openly.add(server, [SERVICE])
    cluster.lead(cluster.leader)
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, certificate)]))
    server.start()
    cluster.ends[name] = lambda: server.stop(0).wait(30)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()
