"""A container runtime for tests: the real CRI over a real Unix socket, with containers that are
ordinary processes of this host.
"""

# ruff: noqa: N802  a servicer's methods are called as the interface calls them

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from agent.cri.v1 import api_pb2, api_pb2_grpc

DIGEST = "sha256:" + "0" * 64


@dataclasses.dataclass
class FakeContainer:
    """One container of a pod."""

    pod: str
    uid: str
    name: str
    pid: int
    namespace: str = "default"
    attempt: int = 0
    state: api_pb2.ContainerState = api_pb2.CONTAINER_RUNNING
    root: str = "rootfs"
    mounts: tuple[dict[str, Any], ...] = ()
    info: dict[str, Any] | None = None
    execute: Callable[[list[str], int], tuple[int, bytes, bytes]] | None = None
    """Runs a command in it, for at most some seconds: status, output and errors. Raises
    ``TimeoutError`` after these, ``ChildProcessError`` if it cannot be started.
    """

    @property
    def id(self) -> str:
        """As a runtime would make one."""
        return f"{self.uid}-{self.name}-{self.attempt}"

    def said(self) -> dict[str, Any]:
        """What containerd tells in its own words."""
        return {
            "sandboxID": self.uid,
            "pid": self.pid,
            "snapshotter": "overlayfs",
            "runtimeSpec": {
                "root": {"path": self.root},
                "process": {"terminal": False},
                "mounts": list(self.mounts),
            },
        }


class Cri(api_pb2_grpc.RuntimeServiceServicer):
    """What the runtime knows; change it while it runs."""

    def __init__(self) -> None:
        self.containers: list[FakeContainer] = []
        self.ready = True
        self.path = ""

    def Version(self, request: Any, context: Any) -> api_pb2.VersionResponse:
        """As containerd answers."""
        return api_pb2.VersionResponse(
            version="0.1.0",
            runtime_name="containerd",
            runtime_version="v2.1.9",
            runtime_api_version="v1",
        )

    def Status(self, request: Any, context: Any) -> api_pb2.StatusResponse:
        """Ready unless ``ready`` says otherwise."""
        condition = api_pb2.RuntimeCondition(
            type="RuntimeReady", status=self.ready, message="" if self.ready else "out of sorts"
        )
        return api_pb2.StatusResponse(status=api_pb2.RuntimeStatus(conditions=[condition]))

    def ListContainers(
        self, request: api_pb2.ListContainersRequest, context: Any
    ) -> api_pb2.ListContainersResponse:
        """Those that the filter asks for."""
        wanted = request.filter
        found = []
        for each in self.containers:
            labels = {
                "io.kubernetes.pod.name": each.pod,
                "io.kubernetes.pod.namespace": each.namespace,
                "io.kubernetes.pod.uid": each.uid,
                "io.kubernetes.container.name": each.name,
            }
            if wanted.HasField("state") and wanted.state.state != each.state:
                continue
            if not dict(wanted.label_selector).items() <= labels.items():
                continue
            metadata = api_pb2.ContainerMetadata(name=each.name, attempt=each.attempt)
            found.append(
                api_pb2.Container(
                    id=each.id,
                    pod_sandbox_id=each.uid,
                    metadata=metadata,
                    state=each.state,
                    labels=labels,
                )
            )
        return api_pb2.ListContainersResponse(containers=found)

    def ContainerStatus(
        self, request: api_pb2.ContainerStatusRequest, context: grpc.ServicerContext
    ) -> api_pb2.ContainerStatusResponse:
        """One of them, with what containerd says in its own words if asked to."""
        for each in self.containers:
            if each.id == request.container_id:
                said = each.said() if each.info is None else each.info
                return api_pb2.ContainerStatusResponse(
                    status=api_pb2.ContainerStatus(
                        id=each.id, state=each.state, image_ref=DIGEST, image_id=DIGEST
                    ),
                    info={"info": json.dumps(said)} if request.verbose else {},
                )
        context.abort(grpc.StatusCode.NOT_FOUND, f"container {request.container_id} not found")
        raise AssertionError

    def ExecSync(
        self, request: api_pb2.ExecSyncRequest, context: grpc.ServicerContext
    ) -> api_pb2.ExecSyncResponse:
        """Run a command, with containerd's codes where it does not end or begin."""
        for each in self.containers:
            if each.id == request.container_id and each.execute is not None:
                try:
                    status, out, err = each.execute(list(request.cmd), request.timeout)
                except TimeoutError:
                    context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "timeout exceeded")
                except ChildProcessError as exc:
                    context.abort(grpc.StatusCode.UNKNOWN, f"failed to exec in container: {exc}")
                return api_pb2.ExecSyncResponse(stdout=out, stderr=err, exit_code=status)
        context.abort(grpc.StatusCode.NOT_FOUND, f"container {request.container_id} not found")
        raise AssertionError


@contextlib.contextmanager
def running(folder: pathlib.Path) -> Iterator[Cri]:
    """A runtime that listens on a socket in ``folder``."""
    state = Cri()
    state.path = str(folder / "containerd.sock")
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        api_pb2_grpc.add_RuntimeServiceServicer_to_server(state, server)
        server.add_insecure_port(f"unix:{state.path}")
        server.start()
        try:
            yield state
        finally:
            server.stop(None).wait(5)
