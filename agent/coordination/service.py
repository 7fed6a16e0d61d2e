"""The coordinator's API as methods.

Promises: nothing begins before its caller was found to have every right that it takes; a call that
begins an operation answers when that is recorded; a replica that does not lead answers nothing.
Does not: know gRPC, or who the caller is; whoever calls these methods has been let in.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from agent import errors
from agent.cluster import objections
from agent.cluster.session import Session
from agent.coordination import asked, looking, messages
from agent.coordination.book import Book
from agent.coordination.runner import Runner
from agent.coordination.work import Work
from agent.coordinator import jobsetchecks
from agent.host import clock
from agent.model import access, ids
from agent.model.operations import Kind, Operation
from agent.rpc.calls import Call
from agent.rpc.v1 import coordinator_pb2 as api
from agent.rpc.v1 import node_pb2

_ID_BYTES = 10
# A time that is longer in digits than any other, from which they are counted backwards.
_FAR_S = 1e11
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Lead:
    """What a replica has while it leads."""

    book: Book
    runner: Runner
    work: Work


class CoordinatorService:
    """One method for each of the API's (agent.rpc.server). ``lead`` is None where another replica
    leads; ``longest_s`` is what operations may take whose caller does not say.
    """

    def __init__(self, lead: Callable[[], Lead | None], longest_s: float) -> None:
        self._lead, self._longest_s = lead, longest_s

    def create_epoch(self, request: api.CreateEpochRequest, call: Call) -> api.Operation:
        """Begin a checkpoint."""
        return self._begin(request, call)

    def restore(self, request: api.RestoreGroupRequest, call: Call) -> api.Operation:
        """Begin a restore."""
        return self._begin(request, call)

    def migrate(self, request: api.MigrateRequest, call: Call) -> api.Operation:
        """Begin a move."""
        return self._begin(request, call)

    def _begin(self, request: asked.Request, call: Call) -> api.Operation:
        lead = self._leading()
        wanted = asked.operation(
            request,
            call.caller,
            now_s=clock.wall_s(),
            longest_s=self._longest_s,
            fresh=secrets.token_hex(_ID_BYTES),
        )
        self._check_rights(lead, wanted, call.caller)
        wait = request.asking.when_busy == api.WHEN_BUSY_WAIT
        return messages.operation(lead.book.begin(wanted, wait=wait))

    def _check_rights(self, lead: Lead, wanted: Operation, caller: access.Caller) -> None:
        with lead.work.session(wanted.namespace, caller) as session:
            if wanted.kind is Kind.EPOCH or not wanted.jobset:
                verb = "create" if wanted.kind is Kind.EPOCH else "restore"
                right = access.Right(verb, "images", wanted.namespace)
                objections.check_rights(session, [right])
                return
            what = "dump" if wanted.kind is Kind.MIGRATE else ""
            jobsetchecks.check_rights(session, what)
            # Last: who may not look at JobSets does not learn whether there is one.
            if wanted.kind is Kind.RESTORE and not jobsetchecks.existing(session, wanted.jobset):
                jobsetchecks.check_rights(session, "create")

    def get_operation(self, request: api.GetOperationRequest, call: Call) -> api.Operation:
        """One operation."""
        del call
        namespace = ids.namespace_name(request.namespace)
        return messages.operation(self._leading().book.get(namespace, request.id))

    def watch_operation(
        self, request: api.WatchOperationRequest, call: Call
    ) -> Iterator[api.Operation]:
        """One operation and its changes."""
        gone = threading.Event()
        call.on_gone(gone.set)
        book = self._leading().book
        namespace = ids.namespace_name(request.namespace)
        last = None
        for each in book.watch(namespace, request.id):
            if gone.is_set():
                return
            if each is not None:
                last = each
                yield messages.operation(each)
        if last is None or not last.over:
            raise _elsewhere()

    def cancel_operation(self, request: api.CancelOperationRequest, call: Call) -> api.Operation:
        """Ask for an end."""
        lead = self._leading()
        namespace = ids.namespace_name(request.namespace)
        self._check_rights(lead, lead.book.get(namespace, request.id), call.caller)
        return messages.operation(lead.runner.cancel(namespace, request.id))

    def list_operations(
        self, request: api.ListOperationsRequest, call: Call
    ) -> api.ListOperationsResponse:
        """The operations of a namespace."""
        del call
        namespace = ids.namespace_name(request.namespace)
        known = [
            each
            for each in self._leading().book.all()
            if each.namespace == namespace and request.group in ("", each.group)
        ]
        page, token = looking.page(known, _newest_first, request.page_size, request.page_token)
        return api.ListOperationsResponse(
            operations=[messages.operation(each) for each in page], next_page_token=token
        )

    def plan_epoch(self, request: api.PlanEpochRequest, call: Call) -> api.PlanEpochResponse:
        """What a checkpoint would take."""
        namespace = ids.namespace_name(request.namespace)
        target = asked.target(request.target)
        return self._look(namespace, call, lambda session: looking.plan(session, target))

    def list_images(
        self, request: api.ListGroupImagesRequest, call: Call
    ) -> api.ListGroupImagesResponse:
        """The images of a namespace."""
        namespace = ids.namespace_name(request.namespace)
        return self._look(namespace, call, lambda session: looking.images(session, request))

    def get_image(self, request: node_pb2.GetImageRequest, call: Call) -> node_pb2.GetImageResponse:
        """One image."""
        namespace = ids.namespace_name(request.namespace)
        return self._look(namespace, call, lambda session: looking.image(session, request))

    def _look(self, namespace: str, call: Call, look: Callable[[Session], T]) -> T:
        with self._leading().work.session(namespace, call.caller) as session:
            return look(session)

    def _leading(self) -> Lead:
        lead = self._lead()
        if lead is None:
            raise _elsewhere()
        return lead


def _elsewhere() -> errors.Unreachable:
    return errors.Unreachable(
        "another replica of the coordinator answers, or will in a moment", hint="ask again"
    )


def _newest_first(operation: Operation) -> tuple[str, ...]:
    return f"{_FAR_S - operation.created_s:.6f}", operation.id
