"""A caller's side of the node API: a channel to one agent and its calls as plain values.

Promises: as ``channels``; a call that is cancelled tells the agent, which then gives the operation
up.
Does not: find agents or credentials, retry, or know Kubernetes.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

import grpc

from agent import errors
from agent.model.archives import Exported, Exporting
from agent.rpc import channels, convert, epochclient, results, status
from agent.rpc.channels import Calls, Credentials
from agent.rpc.v1 import node_pb2, node_pb2_grpc

# Reading or sending every byte of an image: a terabyte at 100 MB/s.
_VERIFY_S = 3 * 3600.0
# The agent gives up by itself at its own deadline and says why; ours is only for one that hangs.
_MARGIN_S = 60.0
# Half of what an agent takes in one message.
_UPLOAD_BYTES = 128 << 10

_ENGINES = {"container": node_pb2.ENGINE_CONTAINER, "kubelet": node_pb2.ENGINE_KUBELET}
_ENGINE_NAMES = {number: name for name, number in _ENGINES.items()}

T = TypeVar("T")

__all__ = ["Agent", "Credentials", "connect"]


@contextlib.contextmanager
def connect(
    target: str,
    credentials: Credentials,
    *,
    peer: str,
    why: Callable[[], str] = lambda: "",
) -> Iterator[Agent]:
    """A channel to the agent at ``target`` (``host:port`` or ``unix:/path``). ``peer`` names it in
    messages; ``why`` may know more about a connection that cannot be made.
    """
    with channels.opened(target, credentials) as channel:
        yield Agent(channel, credentials.token, peer, why)


class Agent(Calls):
    """The calls of one agent. Each raises what the agent raised, and ``errors.Unreachable`` if it
    cannot be asked or the connection breaks.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        token: Callable[[], str | None],
        peer: str,
        why: Callable[[], str],
    ) -> None:
        super().__init__(token, peer, why)
        self._stub = node_pb2_grpc.NodeStub(channel)
        self.epochs = epochclient.Epochs(channel, self._once)

    def dump(
        self,
        namespace: str,
        pod: str,
        *,
        pod_uid: str,
        containers: tuple[str, ...] = (),
        engine: str | None = None,
        stop: bool = False,
        deadline_s: float,
        cancel: threading.Event | None = None,
        progress: Callable[[str, int], None] = lambda phase, raw_bytes: None,
    ) -> results.DumpOutcome:
        """Checkpoint a pod; ``progress`` gets phases and bytes, ``cancel`` gives it up."""
        request = node_pb2.DumpRequest(
            namespace=namespace,
            pod=pod,
            pod_uid=pod_uid,
            containers=containers,
            engine=_ENGINES[engine] if engine else node_pb2.ENGINE_UNSPECIFIED,
            stop=stop,
            deadline_s=deadline_s,
        )
        outcome = None
        call = self._stub.Dump(request, timeout=deadline_s + _MARGIN_S, metadata=self._metadata())
        for event in self._events(call, cancel):
            if event.HasField("progress"):
                progress(event.progress.phase, event.progress.raw_bytes)
            else:
                outcome = event.outcome
        return self._dumped(self._ended(outcome, "dump"))

    def _dumped(self, found: node_pb2.DumpOutcome) -> results.DumpOutcome:
        return results.DumpOutcome(
            image=results.image(found.image),
            stop_s=found.stop_s,
            durable_s=found.durable_s,
            engine=_ENGINE_NAMES.get(found.engine, ""),
            stopped=found.stopped,
            members=tuple(
                results.Captured(each.name, each.stop_s, each.raw_bytes, each.processes)
                for each in found.members
            ),
            pod_template=self._template(found.pod_template_json),
            hook_problems=tuple(found.hook_problems),
        )

    def watch(
        self,
        namespace: str,
        pod: str,
        *,
        pod_uid: str,
        containers: tuple[str, ...] = (),
        every_s: float | None = None,
        count: int | None = None,
        deadline_s: float,
        cancel: threading.Event | None = None,
        done: Callable[[results.DumpOutcome], None] = lambda outcome: None,
        failed: Callable[[errors.CkptError], None] = lambda exc: None,
        late: Callable[[float, float], None] = lambda took_s, pause_s: None,
    ) -> results.Watched:
        """Checkpoint a pod again and again, until ``cancel`` is set (``errors.Interrupted``), its
        containers are no more or ``count`` dumps were made; ``every_s`` None is as often as does it
        no harm. ``done``, ``failed`` and ``late`` are told of each, as ``node.watch`` has it.
        """
        request = node_pb2.WatchRequest(
            namespace=namespace,
            pod=pod,
            pod_uid=pod_uid,
            containers=containers,
            every_s=every_s or 0.0,
            count=count or 0,
            deadline_s=deadline_s,
        )
        outcome = None
        # Without an end of its own; pings tell of an agent that is gone.
        call = self._stub.Watch(request, metadata=self._metadata())
        for event in self._events(call, cancel):
            match event.WhichOneof("event"):
                case "epoch":
                    done(self._dumped(event.epoch))
                case "failed":
                    failed(status.rebuilt(event.failed))
                case "late":
                    late(event.late.took_s, event.late.pause_s)
                case "outcome":
                    outcome = event.outcome
        found = self._ended(outcome, "watch")
        last = status.rebuilt(found.last_failed) if found.HasField("last_failed") else None
        return results.Watched(found.epochs, found.failures, last, found.ended)

    def restore(
        self,
        namespace: str,
        image: str,
        pod: str,
        *,
        pod_uid: str,
        storage: str = "",
        again: bool = False,
        deadline_s: float,
        cancel: threading.Event | None = None,
        progress: Callable[[str], None] = lambda phase: None,
    ) -> results.RestoreOutcome:
        """Bring an image back into a placeholder; ``cancel`` gives it up and the pod waits on.
        ``storage`` is where it lies, "" wherever it does; so for the other calls on images.
        """
        request = node_pb2.RestoreRequest(
            namespace=namespace,
            image=image,
            pod=pod,
            pod_uid=pod_uid,
            again=again,
            storage=storage,
            deadline_s=deadline_s,
        )
        outcome = None
        call = self._stub.Restore(
            request, timeout=deadline_s + _MARGIN_S, metadata=self._metadata()
        )
        for event in self._events(call, cancel):
            if event.HasField("progress"):
                progress(event.progress.phase)
            else:
                outcome = event.outcome
        found = self._ended(outcome, "restore")
        return results.RestoreOutcome(
            image=results.image(found.image),
            waited_s=found.waited_s,
            verified_s=found.verified_s,
            running_s=found.running_s,
            was=results.placement(found.was),
            now=results.placement(found.now),
            hook_problems=tuple(found.hook_problems),
        )

    def plan(self, namespace: str, pod: str, containers: tuple[str, ...] = ()) -> dict[str, Any]:
        """The document of what a dump would take."""
        request = node_pb2.PlanDumpRequest(namespace=namespace, pod=pod, containers=containers)
        return convert.from_struct(self._once(self._stub.PlanDump, request).plan)

    def connections(self, namespace: str, pod: str, timeout_s: float) -> list[tuple[str, str]]:
        """Both ends of the pod's live TCP connections, its own first. An agent that has not
        answered by ``timeout_s`` counts as one that cannot be asked.
        """
        request = node_pb2.PlanDumpRequest(namespace=namespace, pod=pod)
        answer = self._once(self._stub.PlanDump, request, timeout_s)
        return [(each.local, each.remote) for each in answer.connections]

    def images(self, namespace: str, group: str = "") -> list[results.Image]:
        """The images of a namespace in the storages that can be read, by group, oldest first."""
        return self.listing(namespace, group).images

    def listing(self, namespace: str, group: str = "", storage: str = "") -> results.Listing:
        """As ``images``, of all storages or one, with those that cannot be read."""
        found = results.Listing([], {})
        token = ""
        while True:
            request = node_pb2.ListImagesRequest(
                namespace=namespace, group=group, page_token=token, storage=storage
            )
            answer = self._once(self._stub.ListImages, request)
            found.images.extend(results.image(each) for each in answer.images)
            found.unread.update({each.storage: each.problem for each in answer.unread})
            token = answer.next_page_token
            if not token:
                return found

    def image(self, namespace: str, image: str, storage: str = "") -> results.ImageDetail:
        """One image, by name or by its group for the newest."""
        request = node_pb2.GetImageRequest(namespace=namespace, image=image, storage=storage)
        answer = self._once(self._stub.GetImage, request)
        return results.ImageDetail(
            image=results.image(answer.image),
            document=convert.from_struct(answer.detail),
            pod_template=self._template(answer.pod_template_json),
            pod_uid=answer.pod_uid,
            node=answer.node,
            restored_into=answer.restored_into,
            obstacles=tuple(answer.obstacles),
            pods={each.member: results.placement(each.was) for each in answer.pods},
            jobset=self._template(answer.jobset_json),
        )

    def image_message(self, request: node_pb2.GetImageRequest) -> node_pb2.GetImageResponse:
        """As ``image``, for somebody who passes the answer on."""
        return self._once(self._stub.GetImage, request)  # type: ignore[no-any-return]

    def verify(
        self,
        namespace: str,
        image: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        storage: str = "",
    ) -> results.VerifyOutcome:
        """Read an image whole; ``progress`` gets bytes done and in all."""
        request = node_pb2.VerifyImageRequest(namespace=namespace, image=image, storage=storage)
        outcome = None
        call = self._stub.VerifyImage(request, timeout=_VERIFY_S, metadata=self._metadata())
        for event in self._events(call, None):
            if event.HasField("outcome"):
                outcome = event.outcome
            else:
                progress(event.done_bytes, event.total_bytes)
        found = self._ended(outcome, "verification")
        damaged = tuple((each.part, each.problem) for each in found.damaged)
        return results.VerifyOutcome(found.good, found.read_bytes, damaged)

    def export(
        self,
        namespace: str,
        image: str,
        member: str = "",
        *,
        storage: str = "",
        begun: Callable[[Exporting], None],
        content: Callable[[bytes], None],
        cancel: threading.Event | None = None,
    ) -> Exported:
        """Give the archive of a member to ``content``, piece by piece, after ``begun`` was told
        what comes; ``cancel`` gives it up. What ``content`` has of one that fails is worthless.
        """
        request = node_pb2.ExportImageRequest(
            namespace=namespace, image=image, member=member, storage=storage
        )
        outcome, came_bytes = None, 0
        call = self._stub.ExportImage(request, timeout=_VERIFY_S, metadata=self._metadata())
        for event in self._events(call, cancel):
            kind = event.WhichOneof("event")
            if kind == "begun":
                said = event.begun
                begun(
                    Exporting(
                        said.image, said.member, said.machine, said.expected_bytes, said.restorable
                    )
                )
            elif kind == "content":
                came_bytes += len(event.content)
                content(event.content)
            else:
                outcome = event.outcome
        found = self._ended(outcome, "export")
        if found.size_bytes != came_bytes:
            raise errors.AgentDefect(
                f"{self.peer} sent {came_bytes} bytes of an archive of {found.size_bytes}"
            )
        return Exported(found.size_bytes, tuple(found.left_out))

    def take_in(
        self,
        namespace: str,
        archive: BinaryIO,
        size_bytes: int,
        *,
        group: str = "",
        storage: str = "",
        cancel: threading.Event | None = None,
        progress: Callable[[int], None] = lambda sent_bytes: None,
    ) -> results.Image:
        """Store an archive of that length as an image; ``progress`` gets the bytes that were sent,
        ``cancel`` gives it up, and nothing is stored.

        Raises also:
            errors.Failed: the connection broke when it may just have been stored.
        """
        # gRPC takes the messages in a thread of its own, which must not read on when we are gone.
        reading, ended = threading.Lock(), threading.Event()

        def messages() -> Iterator[node_pb2.ImportImageRequest]:
            yield node_pb2.ImportImageRequest(
                namespace=namespace, group=group, size_bytes=size_bytes, storage=storage
            )
            sent_bytes = 0
            while sent_bytes < size_bytes:
                with reading:
                    wanted_bytes = min(_UPLOAD_BYTES, size_bytes - sent_bytes)
                    piece = b"" if ended.is_set() else archive.read(wanted_bytes)
                if not piece:
                    return  # the agent counts, and says that it became shorter
                yield node_pb2.ImportImageRequest(content=piece)
                sent_bytes += len(piece)
                progress(sent_bytes)

        call = self._stub.ImportImage.future(
            messages(), timeout=_VERIFY_S, metadata=self._metadata()
        )
        try:
            with self._cancelled_by(call, cancel):
                return results.image(call.result().image)
        except grpc.FutureCancelledError as exc:
            whole = archive.tell() == size_bytes
            raise errors.Interrupted(
                f"the import by {self.peer} was given up",
                hint="ckpt-agent list shows whether it was stored before"
                if whole
                else "nothing was stored",
            ) from exc
        except grpc.RpcError as exc:
            asked = cancel is not None and cancel.is_set()
            found = self._error(exc, begun=archive.tell() == size_bytes, asked=asked)
            if isinstance(found, errors.Unreachable) and found.facts.get("begun"):
                raise errors.Failed(
                    f"{found.message}; the archive may have been stored",
                    hint="ckpt-agent list shows whether it was",
                ) from exc
            raise found from exc
        finally:
            with reading:
                ended.set()
            call.cancel()

    def delete(self, namespace: str, image: str, storage: str = "") -> dict[str, Any]:
        """Remove an image, by its full name; the document of what was removed."""
        request = node_pb2.DeleteImageRequest(namespace=namespace, image=image, storage=storage)
        return convert.from_struct(self._once(self._stub.DeleteImage, request).report)

    def prune(
        self,
        namespace: str,
        *,
        group: str = "",
        keep_last: int | None,
        keep_within_s: float | None,
        dry_run: bool,
        storage: str = "",
    ) -> dict[str, Any]:
        """Remove what no rule keeps; the document of what was removed."""
        request = node_pb2.PruneImagesRequest(
            namespace=namespace,
            group=group,
            keep_last=keep_last or 0,
            keep_within_s=keep_within_s or 0.0,
            dry_run=dry_run,
            storage=storage,
        )
        return convert.from_struct(self._once(self._stub.PruneImages, request).report)

    def examine(self) -> tuple[str, list[results.Check]]:
        """The node's name and its check-up."""
        answer = self._once(self._stub.Examine, node_pb2.ExamineRequest())
        return answer.node, [
            results.Check(each.name, each.status, each.found, each.consequence, each.cure)
            for each in answer.checks
        ]

    def _ended(self, outcome: T | None, what: str) -> T:
        if outcome is None:
            raise errors.AgentDefect(
                f"{self.peer} ended the {what} without an outcome", hint="its log says more"
            )
        return outcome

    def _template(self, text: str) -> dict[str, Any] | None:
        if not text:
            return None
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise errors.AgentDefect(f"{self.peer} sent an object that is not JSON")
        return found
