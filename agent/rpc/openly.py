"""What a server answers to anybody: whether it serves, and how its API is described.

Nobody shows who they are for it, so nobody may have much of it. gRPC's own servicers hold a thread
for each caller who reads descriptions slowly, remember every name whose health was ever asked for,
and wait for a watcher that leaves while they tell others, with a lock that its leaving takes: then
the whole server stands still for ever.

Promises: one address has at most ``_EACH`` such streams open, all together ``MOST``, besides
``_DESCRIPTIONS`` of descriptions, which end after ``_DESCRIBED_S``; only names that are served are
watched; whoever does not take what it is told within ``_TOLD_S`` is cut off; to change what is told
never waits for anybody.
Does not: answer anything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from agent.rpc import peers

MOST = 512
# A client watches each replica once for each of its channels; machines behind one address are few.
_EACH = 32
# Somebody looks at the API, or a tool does, which takes a second.
_DESCRIPTIONS = 4
_DESCRIBED_S = 20.0
# Two bytes: who does not take them has closed its window on purpose.
_TOLD_S = 5.0

_Answer = health_pb2.HealthCheckResponse


class Streams:
    """Counts them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}

    def let_in(self, context: grpc.ServicerContext) -> None:
        """Return if one more may be open until the call's end; else the call ends."""
        address = peers.address(context)
        with self._lock:
            there = self._open.get(address, 0)
            allowed = there < _EACH and sum(self._open.values()) < self._most
            if allowed:
                self._open[address] = there + 1
        if not allowed:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many such streams are open already"
            )
        if not context.add_callback(lambda: self._left(address)):
            self._left(address)

    def _left(self, address: str) -> None:
        with self._lock:
            self._open[address] -= 1
            if not self._open[address]:
                del self._open[address]


@dataclasses.dataclass(eq=False)
class _Watcher:
    service: str
    context: grpc.ServicerContext
    send: Callable[[Any], None]
    told: int | None = None


class Health(health_pb2_grpc.HealthServicer):
    """Says whether the server, and each of ``services``, serves: none does at first."""

    def __init__(self, services: Iterable[str], streams: Streams) -> None:
        self._streams = streams
        self._lock = threading.Lock()
        self._serving = dict.fromkeys(("", *services), False)
        self._watchers: set[_Watcher] = set()
        self._due: queue.SimpleQueue[_Watcher | None] = queue.SimpleQueue()
        self._ended = False
        threading.Thread(target=self._tell, name="health", daemon=True).start()

    def set_serving(self, *, serving: bool) -> None:
        """What is told from now on, of all of them."""
        with self._lock:
            if self._ended:
                return
            self._serving = dict.fromkeys(self._serving, serving)
            for each in self._watchers:
                self._due.put(each)

    def close(self) -> None:
        """Tell that nothing serves any more, and never anything else."""
        self.set_serving(serving=False)
        with self._lock:
            self._ended = True
            self._due.put(None)

    def Check(  # noqa: N802  as the API calls it
        self, request: Any, context: grpc.ServicerContext
    ) -> Any:
        """Tells it once."""
        return _Answer(status=self._status(request.service, context))

    def Watch(  # type: ignore[override]  # noqa: N802  as the API calls it
        self,
        request: Any,
        context: grpc.ServicerContext,
        send_response_callback: Callable[[Any], None],
    ) -> None:
        """Tells it, and again whenever it changes; holds no thread."""
        self._status(request.service, context)
        self._streams.let_in(context)
        watcher = _Watcher(request.service, context, send_response_callback)

        def left() -> None:
            with self._lock:
                self._watchers.discard(watcher)
            send_response_callback(None)

        with self._lock:
            self._watchers.add(watcher)
        if not context.add_callback(left):
            left()
        self._due.put(watcher)

    # How gRPC's server knows that an answer comes by the callback, later.
    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def _status(self, service: str, context: grpc.ServicerContext) -> int:
        with self._lock:
            serving = self._serving.get(service)
        if serving is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service is here")
        return _Answer.SERVING if serving else _Answer.NOT_SERVING

    def _tell(self) -> None:
        while (watcher := self._due.get()) is not None:
            with self._lock:
                there = watcher in self._watchers
                serving = self._serving[watcher.service]
            status = _Answer.SERVING if serving else _Answer.NOT_SERVING
            if not there or status == watcher.told:
                continue
            watcher.told = status
            timer = threading.Timer(_TOLD_S, watcher.context.cancel)
            timer.daemon = True
            timer.start()
            watcher.send(_Answer(status=status))
            timer.cancel()


class Descriptions(reflection.ReflectionServicer):
    """Describes the API."""

    def __init__(self, services: Iterable[str], streams: Streams) -> None:
        super().__init__(services)
        self._streams = streams

    def ServerReflectionInfo(  # noqa: N802  as the API calls it
        self, request_iterator: Any, context: Any
    ) -> Iterator[Any]:
        """Answers questions about it, for a while."""
        self._streams.let_in(context)
        timer = threading.Timer(_DESCRIBED_S, context.cancel)
        timer.daemon = True
        timer.start()
        try:
            with contextlib.suppress(grpc.RpcError):  # the caller left
                yield from super().ServerReflectionInfo(request_iterator, context)
        finally:
            timer.cancel()


def add(server: grpc.Server, services: Iterable[str]) -> Health:
    """Have ``server`` answer for ``services``, by their full names; what it says of them."""
    names = tuple(services)
    found = Health(names, Streams(MOST))
    health_pb2_grpc.add_HealthServicer_to_server(found, server)
    every = (*names, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
        Descriptions(every, Streams(_DESCRIPTIONS)), server
    )
    return found
