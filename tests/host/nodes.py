"""A node agent for tests: the real server, watch, access and engine, on loopback; the API server
and the container runtime around it are fakes that speak the real protocols.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agent import errors
from agent.cli import documents
from agent.cri.runtime import Runtime
from agent.engines.base import Engine
from agent.engines.kubelet import export, intake
from agent.kube import access, connection, events, namespaces
from agent.kube.pods import PodWatch
from agent.model import storage
from agent.model.container import Container
from agent.model.plan import Plan
from agent.model.pods import Pod
from agent.model.streams import MemberSource
from agent.model.values import StoreUrl
from agent.node import (
    archives,
    epochs,
    hookcalls,
    interrupted,
    plan,
    podhooks,
    podwork,
    service,
    storages,
    stores,
    transfers,
)
from agent.node.operations import Operations
from agent.node.pods import Pods, State
from agent.rpc import client
from agent.rpc.certificates import Certificates
from agent.rpc.server import Ports, Server
from agent.settings import Settings
from agent.volumes.directory import DirectoryVolume
from tests.fakes import cri, nodeapi
from tests.fakes.authority import Authority

NODE = "n1"
SERVER_NAME = "ckpt-agent-node.ckpt-agent.svc"
VERBS = ("create", "restore", "list", "get", "export", "delete")


def wait_for(predicate: Callable[[], object], seconds: float = 20) -> None:
    """Return when ``predicate`` is true; fail if it does not become so."""
    deadline = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


class Engines:
    """Gives the engine for trees of this host: a fake runtime's containers are such trees."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.wanted: list[str] = []
        self.lacking: list[str] = []

    def for_dump(self, wanted: str, pod: Pod, containers: Sequence[Container]) -> Engine:
        self.wanted.append(wanted)
        return self.engine

    def for_restore(self, pod: Pod, containers: Sequence[Container]) -> Engine:
        return self.engine

    def check_image(self, source: MemberSource) -> None:
        if self.lacking:
            raise errors.RestoreConflict("the image lacks things", reasons=self.lacking)

    def plan(self, containers: Sequence[Container]) -> Plan:
        return plan.plan_dump([each.pid for each in containers], ghost_limit_bytes=1 << 20)


@dataclasses.dataclass
class Node:
    """The agent, what is around it, and how to call it."""

    api: nodeapi.NodeApi
    cri: cri.Cri
    authority: Authority
    cluster_authority: Authority
    folder: Path
    server: Server
    watch: PodWatch
    operations: Operations
    engines: Engines
    settings: Settings
    states: dict[int, State]

    @contextlib.contextmanager
    def caller(
        self, *rights: str, namespace: str = "default", user: str = "ada", **changes: Any
    ) -> Iterator[client.Agent]:
        """A client with a token of a user who may do ``rights``."""
        token = self.api.add_user(user, *((verb, namespace) for verb in rights), **changes)
        with self.connected(token=token) as agent:
            yield agent

    @contextlib.contextmanager
    def connected(
        self, *, token: str | None = None, certificate: tuple[bytes, bytes] | None = None
    ) -> Iterator[client.Agent]:
        """A client that shows these credentials."""
        port = self.server.certificate_port if certificate else self.server.token_port
        pem, key = certificate or (None, None)
        credentials = client.Credentials(self.authority.pem, SERVER_NAME, lambda: token, pem, key)
        with client.connect(f"localhost:{port}", credentials, peer=f"node {NODE}") as agent:
            yield agent

    def add_pod(self, name: str, pid: int, *, namespace: str = "default", **more: Any) -> str:
        """A pod with one container whose first process is ``pid``; return its uid."""
        uid = self.api.put(name, NODE, namespace=namespace, **more)
        self.cri.containers.append(cri.FakeContainer(name, uid, "c", pid, namespace))
        wait_for(lambda: (found := self.watch.get(namespace, name)) and found.uid == uid)
        return uid


@contextlib.contextmanager
def running(
    folder: Path,
    engine: Engine | None,
    *,
    parallel: int = 2,
    state: Callable[[int], State] | None = None,
    engines: Any = None,
    shared: Path | None = None,
) -> Iterator[Node]:
    """Start an agent whose files are in ``folder``, and its stores there or in ``shared``, which
    several agents may share. ``engines`` gives engines in place of ``engine``.
    """
    authority, cluster_authority = Authority("ckpt-agent"), Authority("cluster")
    tls = folder / "tls"
    tls.mkdir()
    certify(tls, authority)
    root = shared or folder / "stores"
    root.mkdir(exist_ok=True)
    fast = folder / "fast"
    fast.mkdir()
    settings = Settings(
        store=StoreUrl("file", str(root)),
        stores={"fast": str(fast)},
        node_name=NODE,
        tls_dir=str(tls),
        work_dir=str(folder / "work"),
        work_kept_free_percent=1,  # the tests' disk may be nearly full
        parallel=parallel,
    )
    states: dict[int, State] = {}
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(nodeapi.running(authority, folder))
        runtime_state = stack.enter_context(cri.running(folder))
        config = api.kubeconfig(folder / "kubeconfig", authority)
        cluster = stack.enter_context(contextlib.closing(connection.connect(config)))
        runtime = stack.enter_context(contextlib.closing(Runtime(runtime_state.path)))
        watch = PodWatch(cluster, NODE)
        places = storage.configured(settings.store.path, settings.stores)
        known = storages.Storages(
            {
                name: stores.NamespaceStores(
                    path, lambda path, create: DirectoryVolume(path, create=create)
                )
                for name, path in places.items()
            },
            lambda name: namespaces.read_annotations(cluster, name),
        )
        pods = Pods(watch, runtime, state or (lambda pid: states.get(pid, "other")), NODE)
        operations = Operations(parallel)
        teller = events.Happenings(cluster, NODE)
        stack.callback(teller.close, 5.0)
        engines = engines or Engines(engine)  # type: ignore[arg-type]
        trail = interrupted.Trail(str(folder / "trail"))
        hooks_trail = interrupted.Trail(str(folder / "hooks-trail"))
        guard = access.Access(cluster)
        parts = service.Parts(
            settings=settings,
            node=NODE,
            authorize=guard.authorize,
            pods=pods,
            work=podwork.PodWork(
                *(pods, engines, known, operations, trail, teller),
                podhooks.PodHooks(hookcalls.Calls(runtime), teller, hooks_trail),
            ),
            operations=operations,
            storages=known,
            transfers=transfers.Transfers(
                archives.Formats(export.Outgoing, intake.of), settings, operations
            ),
            plan=engines.plan,
            examine=lambda: (),
            documents=documents,
        )
        server = Server(
            {"Node": service.NodeService(parts), "Epochs": epochs.EpochService(parts)},
            guard,
            NODE,
            Certificates(str(tls), lambda: cluster_authority.pem),
            Ports("127.0.0.1", 0, 0),
        )
        watch.start()
        stack.callback(watch.close)
        server.start()
        server.set_serving(serving=True)
        stack.callback(server.stop, 1.0)
        wait_for(lambda: watch.synced)
        yield Node(
            api,
            runtime_state,
            authority,
            cluster_authority,
            folder,
            server,
            watch,
            operations,
            engines,
            settings,
            states,
        )


def certify(tls: Path, authority: Authority) -> None:
    """Put a server certificate of ``authority`` into ``tls``, as a Secret's mount would hold it."""
    certificate, key = authority.issue("agent", hosts=(SERVER_NAME, "localhost", "127.0.0.1"))
    for name, content in (("tls.crt", certificate), ("tls.key", key), ("ca.crt", authority.pem)):
        (tls / name).write_bytes(content)
