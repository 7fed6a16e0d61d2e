"""A node's agent for tests: the real API over real TLS, with containers that are numbers.

``Node`` holds what every agent of a cluster shares (the images) and how each call goes.
"""

# ruff: noqa: N802  a servicer's methods are called as the API calls them

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from agent import errors
from agent.rpc import convert, status
from agent.rpc.v1 import node_pb2, node_pb2_grpc
from tests.fakes.authority import Authority

SERVER_NAME = "ckpt-agent-node.ckpt-agent.svc"


@dataclasses.dataclass
class Cluster:
    """What all agents of a cluster know, and how their calls go; change it while they run."""

    tokens: set[str] = dataclasses.field(default_factory=set)
    images: list[node_pb2.Image] = dataclasses.field(default_factory=list)
    details: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    # The archives of images, by name.
    archives: dict[str, bytes] = dataclasses.field(default_factory=dict)
    template: dict[str, Any] | None = None
    # By method: an error to end with, or a call to make instead of an answer.
    fails: dict[str, errors.CkptError | Callable[[], None]] = dataclasses.field(
        default_factory=dict
    )
    calls: list[tuple[str, str, Any]] = dataclasses.field(default_factory=list)
    hold: threading.Event | None = None
    given_up: threading.Event = dataclasses.field(default_factory=threading.Event)
    blockers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    # By pod: both ends of each, its own first.
    connections: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    # Pods whose containers wait for an image, or for the next one.
    waiting: set[str] = dataclasses.field(default_factory=set)
    page: int = 500
    # Storages that cannot be read, and why.
    unread: dict[str, str] = dataclasses.field(default_factory=dict)
    hook_problems: list[str] = dataclasses.field(default_factory=list)
    # Ends the agent that runs, without a word to who it works for.
    ends: Callable[[], object] = lambda: None

    def add_image(self, group: str, number: int, storage: str = "default") -> str:
        """Add an image and return its name."""
        epoch = f"20260131-2359{number:02d}-0a1b2c"
        name = f"{group}@{epoch}"
        image = node_pb2.Image(
            name=name,
            group=group,
            epoch=epoch,
            members=["c"],
            raw_bytes=1 << 20,
            new_bytes=1 << 19,
            stored_bytes=1 << 18,
            pages=256,
            zero_pages=3,
            storage=storage,
        )
        image.created_at.FromSeconds(1_790_000_000 + number)
        self.images.append(image)
        return name


class _Servicer(node_pb2_grpc.NodeServicer):
    def __init__(self, cluster: Cluster, node: str) -> None:
        self._cluster = cluster
        self._node = node

    def _begin(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get("authorization", "")
        named = context.auth_context().get("x509_common_name")
        token = str(given).removeprefix("Bearer ")
        if token not in self._cluster.tokens and not named:
            self._abort(context, errors.Unauthenticated("the token is not known", hint="log in"))
        self._cluster.calls.append((self._node, method, request))
        failure = self._cluster.fails.get(method)
        if isinstance(failure, errors.CkptError):
            self._abort(context, failure)
        elif failure:
            failure()

    def _abort(self, context: grpc.ServicerContext, exc: errors.CkptError) -> None:
        context.set_trailing_metadata(status.metadata(exc))
        context.abort(status.code(exc), status.details(exc))

    def _named(self, name: str, context: grpc.ServicerContext, storage: str = "") -> node_pb2.Image:
        found = [
            each
            for each in self._cluster.images
            if name in (each.name, each.group) and storage in ("", each.storage)
        ]
        if not found:
            self._abort(context, errors.NotFound(f"there is no image {name}"))
        return found[-1]

    def Dump(self, request: Any, context: Any) -> Iterator[node_pb2.DumpEvent]:
        if not context.add_callback(self._cluster.given_up.set):
            self._cluster.given_up.set()  # the caller has left already
        self._begin("Dump", request, context)
        yield node_pb2.DumpEvent(progress=node_pb2.DumpProgress(phase="capture", raw_bytes=4096))
        if self._cluster.hold is not None:
            self._cluster.hold.wait(30)
        failure = self._cluster.fails.get("Dump.late")
        if isinstance(failure, errors.CkptError):
            self._abort(context, failure)
        elif failure:
            failure()
        self._cluster.add_image(request.pod, len(self._cluster.images))
        members = list(request.containers) or ["c"]
        yield node_pb2.DumpEvent(
            outcome=node_pb2.DumpOutcome(
                image=self._cluster.images[-1],
                stop_s=0.05,
                durable_s=0.5,
                engine=request.engine or node_pb2.ENGINE_CONTAINER,
                stopped=request.stop,
                members=[
                    node_pb2.MemberOutcome(name=each, stop_s=0.05, raw_bytes=1 << 20, processes=2)
                    for each in members
                ],
                pod_template_json=json.dumps(self._cluster.template)
                if self._cluster.template
                else "",
                hook_problems=self._cluster.hook_problems,
            )
        )

    def Watch(self, request: Any, context: Any) -> Iterator[node_pb2.WatchEvent]:
        """The second of the dumps fails, and the third takes long."""
        if not context.add_callback(self._cluster.given_up.set):
            self._cluster.given_up.set()
        self._begin("Watch", request, context)
        count = request.count or 2
        failure = status.message(errors.DumpFailed("no luck"))
        for number in range(1, count + 1):
            if number == 2:
                yield node_pb2.WatchEvent(failed=failure)
                continue
            if number == 3:
                yield node_pb2.WatchEvent(late=node_pb2.WatchLate(took_s=2.0, pause_s=3.0))
            self._cluster.add_image(request.pod, len(self._cluster.images))
            image = self._cluster.images[-1]
            yield node_pb2.WatchEvent(
                epoch=node_pb2.DumpOutcome(
                    image=image, stop_s=0.05, durable_s=0.5, engine=node_pb2.ENGINE_CONTAINER
                )
            )
        if self._cluster.hold is not None:
            self._cluster.hold.wait(30)
        last = failure if count == 2 else None
        outcome = node_pb2.WatchOutcome(epochs=count - 1, failures=1, last_failed=last)
        yield node_pb2.WatchEvent(outcome=outcome)

    def Restore(self, request: Any, context: Any) -> Iterator[node_pb2.RestoreEvent]:
        self._begin("Restore", request, context)
        yield node_pb2.RestoreEvent(progress=node_pb2.RestoreProgress(phase="waiting"))
        yield node_pb2.RestoreEvent(
            outcome=node_pb2.RestoreOutcome(
                image=self._named(request.image, context),
                waited_s=0.1,
                verified_s=0.2,
                running_s=0.3,
                was=node_pb2.Placement(pod="job", node="n1", addresses=["10.0.0.1"]),
                now=node_pb2.Placement(pod=request.pod, node=self._node, addresses=["10.0.0.2"]),
                hook_problems=self._cluster.hook_problems,
            )
        )

    def PlanDump(self, request: Any, context: Any) -> node_pb2.PlanDumpResponse:
        self._begin("PlanDump", request, context)
        waits = request.pod in self._cluster.waiting
        blockers = [{"code": "container", "subject": "container c", "reason": "it waits"}]
        document = {
            "apiVersion": "ckpt-agent.dev/v1",
            "kind": "Plan",
            "name": request.pod,
            "feasible": not waits and not self._cluster.blockers,
            "estimate": {
                "rawBytes": 1 << 20,
                "stopSeconds": 0.1,
                "rates": {
                    "captureBytesPerSecond": 1e9,
                    "fixedSeconds": 0.1,
                    "processSeconds": 0.01,
                },
            },
            "blockers": blockers if waits else self._cluster.blockers,
            "warnings": [],
            "processes": [{"pid": 1}] if waits else [],
            "memory": [],
            "files": [],
            "sockets": [],
        }
        ends = [
            node_pb2.Connection(local=local, remote=remote)
            for local, remote in self._cluster.connections.get(request.pod, ())
        ]
        return node_pb2.PlanDumpResponse(plan=convert.to_struct(document), connections=ends)

    def ListImages(self, request: Any, context: Any) -> node_pb2.ListImagesResponse:
        self._begin("ListImages", request, context)
        found = [
            each
            for each in self._cluster.images
            if request.group in ("", each.group) and request.storage in ("", each.storage)
        ]
        first = int(request.page_token or 0)
        last = first + self._cluster.page
        return node_pb2.ListImagesResponse(
            images=found[first:last],
            next_page_token=str(last) if last < len(found) else "",
            unread=[
                node_pb2.UnreadStorage(storage=name, problem=problem)
                for name, problem in self._cluster.unread.items()
            ],
        )

    def GetImage(self, request: Any, context: Any) -> node_pb2.GetImageResponse:
        self._begin("GetImage", request, context)
        found = self._named(request.image, context, request.storage)
        more = self._cluster.details.get(found.name, {})
        document = {
            "apiVersion": "ckpt-agent.dev/v1",
            "kind": "Image",
            "name": found.name,
            "group": found.group,
            "epoch": found.epoch,
            "createdAt": "2026-01-31T23:59:59Z",
            "members": list(found.members),
            "rawBytes": found.raw_bytes,
            "newBytes": found.new_bytes,
            "storedBytes": found.stored_bytes,
            "pages": found.pages,
            "zeroPages": found.zero_pages,
            "damage": None,
            "storage": found.storage,
            "previous": None,
            "detail": [],
        }
        return node_pb2.GetImageResponse(image=found, detail=convert.to_struct(document), **more)

    def VerifyImage(self, request: Any, context: Any) -> Iterator[node_pb2.VerifyEvent]:
        self._begin("VerifyImage", request, context)
        self._named(request.image, context, request.storage)
        yield node_pb2.VerifyEvent(done_bytes=1, total_bytes=2)
        damaged = [node_pb2.Damage(part="packs/1", problem="does not match its digest")]
        broken = "VerifyImage.damaged" in self._cluster.fails
        yield node_pb2.VerifyEvent(
            outcome=node_pb2.VerifyOutcome(
                good=not broken, read_bytes=2, damaged=damaged if broken else []
            )
        )

    def ExportImage(self, request: Any, context: Any) -> Iterator[node_pb2.ExportImageEvent]:
        self._begin("ExportImage", request, context)
        found = self._named(request.image, context)
        content = self._cluster.archives.get(found.name, b"archive " * 100)
        yield node_pb2.ExportImageEvent(
            begun=node_pb2.ExportBegun(
                image=found.name,
                member="c",
                machine="x86_64",
                expected_bytes=len(content),
                restorable=True,
            )
        )
        half = len(content) // 2
        yield node_pb2.ExportImageEvent(content=content[:half])
        failure = self._cluster.fails.get("ExportImage.late")
        if isinstance(failure, errors.CkptError):
            self._abort(context, failure)
        elif failure:
            failure()
        yield node_pb2.ExportImageEvent(content=content[half:])
        outcome = node_pb2.ExportOutcome(size_bytes=len(content), left_out=["/volume-0.tar"])
        yield node_pb2.ExportImageEvent(outcome=outcome)

    def ImportImage(self, requests: Any, context: Any) -> node_pb2.ImportImageResponse:
        first = next(requests)
        self._begin("ImportImage", first, context)
        content = b"".join(each.content for each in requests)
        failure = self._cluster.fails.get("ImportImage.late")
        if isinstance(failure, errors.CkptError):
            self._abort(context, failure)
        elif failure:
            failure()
        name = self._cluster.add_image(first.group or "pod-1", len(self._cluster.images))
        self._cluster.archives[name] = content
        return node_pb2.ImportImageResponse(image=self._cluster.images[-1])

    def DeleteImage(self, request: Any, context: Any) -> node_pb2.PruneResponse:
        self._begin("DeleteImage", request, context)
        found = self._named(request.image, context, request.storage)
        self._cluster.images.remove(found)
        return node_pb2.PruneResponse(report=convert.to_struct(_pruned([found.name], False)))

    def PruneImages(self, request: Any, context: Any) -> node_pb2.PruneResponse:
        self._begin("PruneImages", request, context)
        names = [each.name for each in self._cluster.images[: -request.keep_last or None]]
        return node_pb2.PruneResponse(report=convert.to_struct(_pruned(names, request.dry_run)))

    def Examine(self, request: Any, context: Any) -> node_pb2.ExamineResponse:
        self._begin("Examine", request, context)
        return node_pb2.ExamineResponse(
            node=self._node,
            checks=[
                node_pb2.Check(name="criu", status="ok", found="4.2"),
                node_pb2.Check(
                    name="CAP_SYS_RESOURCE",
                    status="degraded",
                    found="not held",
                    consequence="some cannot",
                    cure="add it",
                ),
            ],
        )


def _pruned(names: list[str], dry_run: bool) -> dict[str, Any]:
    action = "would remove" if dry_run else "removed"
    return {
        "apiVersion": "ckpt-agent.dev/v1",
        "kind": "PruneReport",
        "name": "file:///var/lib/ckpt-agent/store/default",
        "dryRun": dry_run,
        "freedBytes": 10,
        "leftovers": 0,
        "blocked": [],
        "kept": [],
        "items": [{"name": name, "action": action} for name in names],
    }


@contextlib.contextmanager
def running(
    cluster: Cluster,
    node: str,
    authority: Authority,
    *,
    clients: bytes | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    more: Callable[[grpc.Server], None] = lambda server: None,
) -> Iterator[str]:
    """An agent on loopback; its address. ``clients``: the authority of client certificates, which
    are then asked for. ``more`` adds services.
    """
    certificate, key = authority.issue(SERVER_NAME, hosts=(SERVER_NAME,))
    server = grpc.server(ThreadPoolExecutor(8))
    node_pb2_grpc.add_NodeServicer_to_server(_Servicer(cluster, node), server)
    more(server)
    port = server.add_secure_port(
        f"{host}:{port}",
        grpc.ssl_server_credentials(
            [(key, certificate)], clients, require_client_auth=clients is not None
        ),
    )
    server.start()
    cluster.ends = lambda: server.stop(0)
    try:
        yield f"{host}:{port}"
    finally:
        server.stop(0).wait()
