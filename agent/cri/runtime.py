"""The container runtime of this node: what it runs, and what its containers are made of.

Promises: what a runtime says in its own words (JSON in ``info``) is read here and nowhere else;
containerd 1.7 and 2.x and CRI-O are understood; a field that a runtime does not tell is an error
that names it, not a guess.
Does not: look into /proc.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grpc

from agent import errors
from agent.cri.v1 import api_pb2, api_pb2_grpc
from agent.model.container import Container, Mount

# The kubelet's labels on every container it makes (k8s.io/kubernetes/pkg/kubelet/types/labels.go).
_POD_UID = "io.kubernetes.pod.uid"
_CONTAINER_NAME = "io.kubernetes.container.name"

# The kubelet itself gives a runtime two minutes; a listing that takes ten seconds is a hang.
_CALL_S = 10.0
# Specifications with many mounts; the kubelet allows 16 MiB as well.
_ANSWER_BYTES = 16 << 20
# Beyond a command's own time: for the runtime to start it, and to tell how it ended.
_AROUND_S = 5.0
# A runtime that restarts is back within seconds; gRPC would wait for up to two minutes.
_RECONNECT_MS = 2000

_TOLD_CHARACTERS = 500

# Where containerd's shim keeps what it runs, below its state directory; the last part is the
# containerd namespace of everything that comes through the CRI.
_CONTAINERD_TASKS = "io.containerd.runtime.v2.task/k8s.io"


@dataclasses.dataclass(frozen=True)
class Listed:
    """A container that runs now, by whose it is. ``attempt`` counts its restarts."""

    id: str
    name: str
    attempt: int
    pod_uid: str


@dataclasses.dataclass(frozen=True)
class Version:
    """Which runtime answers."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclasses.dataclass(frozen=True)
class Executed:
    """How a command in a container ended: exit status (128 + N if signal N ended it), output."""

    status: int
    stdout: bytes
    stderr: bytes


class Runtime:
    """The runtime that listens on the Unix socket ``path``. Every call raises
    ``errors.Unreachable`` if it does not answer.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # The socket lies in a directory of root's; there is nobody to encrypt against.
        self._channel = grpc.insecure_channel(
            f"unix:{path}",
            options=[
                ("grpc.default_authority", "localhost"),
                ("grpc.max_receive_message_length", _ANSWER_BYTES),
                ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS),
            ],
        )
        self._stub = api_pb2_grpc.RuntimeServiceStub(self._channel)

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()

    def version(self) -> Version:
        """Which runtime it is; the cheapest question."""
        with self._answering():
            found = self._stub.Version(api_pb2.VersionRequest(), timeout=_CALL_S)
        return Version(found.runtime_name, found.runtime_version)

    def ready(self) -> Version:
        """Return if the runtime says of itself that it is ready for containers.

        Raises:
            errors.Unreachable: it is not, and why.
        """
        with self._answering():
            found = self._stub.Status(api_pb2.StatusRequest(), timeout=_CALL_S).status
        for condition in found.conditions:
            if condition.type == "RuntimeReady" and not condition.status:
                raise errors.Unreachable(
                    f"the container runtime is not ready: {condition.message or condition.reason}",
                    hint="look at the runtime's log on this node",
                    socket=self.path,
                )
        return self.version()

    def running(self, pod_uid: str = "") -> list[Listed]:
        """The containers that run, of one pod or all."""
        wanted = api_pb2.ContainerFilter(
            state=api_pb2.ContainerStateValue(state=api_pb2.CONTAINER_RUNNING),
            label_selector={_POD_UID: pod_uid} if pod_uid else {},
        )
        with self._answering():
            found = self._stub.ListContainers(
                api_pb2.ListContainersRequest(filter=wanted), timeout=_CALL_S
            )
        return [_listed(each) for each in found.containers]

    def container(self, listed: Listed) -> Container:
        """What a running container is made of.

        Raises:
            errors.NotFound: it is gone, or does not run any more.
            errors.EnvironmentUnfit: the runtime does not tell what is needed.
        """
        with self._answering(what=f"container {listed.name}"):
            found = self._stub.ContainerStatus(
                api_pb2.ContainerStatusRequest(container_id=listed.id, verbose=True),
                timeout=_CALL_S,
            )
        if found.status.state != api_pb2.CONTAINER_RUNNING:
            raise errors.NotFound(
                f"container {listed.name} does not run any more",
                hint="wait until the pod is running again",
                container=listed.name,
            )
        info = self._info(found.info)
        spec = info.mapping("runtimeSpec")
        pid = info.number("pid")
        if pid <= 0:
            raise errors.NotFound(
                f"container {listed.name} has no process", hint="try again", container=listed.name
            )
        return Container(
            id=listed.id,
            name=listed.name,
            pid=pid,
            rootfs=self._rootfs(listed.id, spec),
            mounts=tuple(_mount(each) for each in spec.objects("mounts")),
            image_digest=_digest(found.status.image_id or found.status.image_ref),
            terminal=spec.mapping("process").flag("terminal"),
            args=spec.mapping("process").words("args"),
        )

    def execute(self, container_id: str, argv: Sequence[str], timeout_s: float) -> Executed:
        """Run a command in a container to its end, as the runtime starts a probe's: with the
        user, rights, environment and limits that the container was given, and no more.

        Raises:
            errors.NotFound: the container is gone.
            errors.DeadlineExceeded: it was killed; what it started itself may run on.
            errors.DumpFailed: it could not be started.
        """
        request = api_pb2.ExecSyncRequest(
            container_id=container_id, cmd=argv, timeout=math.ceil(timeout_s)
        )
        with self._answering("the container"):
            try:
                done = self._stub.ExecSync(request, timeout=timeout_s + _AROUND_S)
            except grpc.RpcError as exc:
                code = exc.code() if isinstance(exc, grpc.Call) else None
                if code is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise errors.DeadlineExceeded(
                        f"{argv[0]} did not end in time", hint="allow more time"
                    ) from exc
                if code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
                    # The runtime's words, in which an OCI runtime tells why it started nothing.
                    raise errors.DumpFailed(
                        "the container runtime could not run the command",
                        hint="is there such a program in the container, and a shell's env?",
                        output=(exc.details() or "")[-_TOLD_CHARACTERS:],
                    ) from exc
                raise
        return Executed(done.exit_code, done.stdout, done.stderr)

    def _info(self, info: Mapping[str, str]) -> _Said:
        try:
            found = json.loads(info["info"])
        except (KeyError, ValueError) as exc:
            raise self._untold("info") from exc
        return _Said(found if isinstance(found, dict) else {}, self._untold)

    def _untold(self, field: str) -> errors.EnvironmentUnfit:
        return errors.EnvironmentUnfit(
            f"the container runtime does not tell {field!r} of a container",
            hint="use containerd >= 1.7 or CRI-O >= 1.28",
            socket=self.path,
        )

    def _rootfs(self, container_id: str, spec: _Said) -> str:
        path = spec.mapping("root").text("path")
        if os.path.isabs(path):  # CRI-O: the merged overlay
            return path
        # containerd: relative to the bundle of its shim.
        state = os.path.dirname(self.path)
        return os.path.join(state, _CONTAINERD_TASKS, container_id, path)

    @contextlib.contextmanager
    def _answering(self, what: str = "the container runtime") -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as exc:
            if not isinstance(exc, grpc.Call):
                raise
            code, said = exc.code(), exc.details() or ""
            if code is grpc.StatusCode.NOT_FOUND:
                raise errors.NotFound(f"{what} is gone", hint="look at the pod again") from exc
            raise errors.Unreachable(
                f"the container runtime at {self.path} does not answer: {code.name}: {said}",
                hint="is the runtime running, and its socket mounted here (runtime_socket)?",
                socket=self.path,
            ) from exc


class _Said:
    """An object of a runtime's JSON, whose fields must be there and of their type."""

    def __init__(self, value: Mapping[str, Any], untold: Any) -> None:
        self._value = value
        self._untold = untold

    def mapping(self, field: str) -> _Said:
        value = self._value.get(field)
        if not isinstance(value, dict):
            raise self._untold(field)
        return _Said(value, self._untold)

    def objects(self, field: str) -> list[_Said]:
        value = self._value.get(field) or []
        if not isinstance(value, list):
            raise self._untold(field)
        return [_Said(each, self._untold) for each in value if isinstance(each, dict)]

    def number(self, field: str) -> int:
        value = self._value.get(field)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._untold(field)
        return value

    def text(self, field: str) -> str:
        value = self._value.get(field)
        if not isinstance(value, str):
            raise self._untold(field)
        return value

    def optional(self, field: str) -> str:
        value = self._value.get(field)
        return value if isinstance(value, str) else ""

    def words(self, field: str) -> tuple[str, ...]:
        value = self._value.get(field)
        return tuple(map(str, value)) if isinstance(value, list) else ()

    def flag(self, field: str) -> bool:
        return self._value.get(field) is True


def _listed(found: api_pb2.Container) -> Listed:
    labels = found.labels
    return Listed(
        id=found.id,
        name=labels.get(_CONTAINER_NAME) or found.metadata.name,
        attempt=found.metadata.attempt,
        pod_uid=labels.get(_POD_UID, ""),
    )


def _mount(said: _Said) -> Mount:
    return Mount(
        destination=said.text("destination"),
        source=said.optional("source"),
        type=said.optional("type"),
        options=said.words("options"),
    )


def _digest(reference: str) -> str:
    """``sha256:...`` of an image's id, or of a reference that ends in one; "" if neither."""
    digest = reference.rpartition("@")[2]
    return digest if digest.startswith("sha256:") else ""
