"""A group for tests: pods in network namespaces of their own, each with a node agent, one store,
and a coordinator that reaches the agents by the real API.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from agent.cluster.session import Session
from agent.coordinator import checkpoint, restore
from agent.engines.base import Engine
from agent.engines.container.engine import ContainerEngine
from agent.engines.kubelet import inner
from agent.model import ids, optin
from agent.model.container import Container
from agent.model.plan import Plan
from agent.model.pods import Pod
from agent.model.protocol import EVACUATE, Course
from agent.model.streams import MemberSource
from agent.node import plan
from agent.podengines import hold_state
from agent.rpc import client
from agent.settings import Settings
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.fakes import cri, nodeapi
from tests.fakes.authority import Authority
from tests.host import nodes
from tests.host.boxes import Box, Boxes
from tests.host.nodes import Node, wait_for
from tests.host.test_container_network import pod_network
from tests.host.test_node_process import Agent, agent_in

GROUP = "jobset.train"
T = TypeVar("T")

# Both ends of a TCP connection send numbers and check those they get; every 20 ms of the arriving
# stream a line says how many there were, and when.
PROGRAM = """
import json, socket, struct, sys, threading, time
role, address, *outside = sys.argv[1:]
if role == 'serve':
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    sock = socket.create_server((address, 7000), family=family).accept()[0]
else:
    while True:
        try:
            sock = socket.create_connection((address, 7000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
other = socket.create_connection((outside[0], int(outside[1]))) if outside else None
number = struct.Struct('<Q')
def send():
    n = 0
    while True:
        sock.sendall(b''.join(number.pack(n + i) for i in range(1000)))
        n += 1000
        time.sleep(0.001)
threading.Thread(target=send, daemon=True).start()
got, pending, last = 0, b'', 0.0
while True:
    data = sock.recv(1 << 16)
    if not data:
        sys.exit('the peer is gone after %d' % got)
    pending += data
    whole = len(pending) // 8 * 8
    for (found,) in number.iter_unpack(pending[:whole]):
        if found != got:
            sys.exit('got %d in place of %d' % (found, got))
        got += 1
    pending = pending[whole:]
    now = time.time()
    if now - last > 0.02:
        last = now
        print(json.dumps({'got': got, 'at': now}), flush=True)
"""


class BoxEngines:
    """The container engine for containers by runc, with directories of its own for each agent."""

    def __init__(self, boxes: Boxes, folder: Path) -> None:
        self._boxes = boxes
        self._folder = folder

    def for_dump(self, wanted: str, pod: Pod, containers: Sequence[Container]) -> Engine:
        del wanted, pod
        return self._engine(containers)

    def for_restore(self, pod: Pod, containers: Sequence[Container]) -> Engine:
        del pod
        return inner.RestoresInner(self._engine(containers))

    def check_image(self, source: MemberSource) -> None:
        inner.of(source)

    def plan(self, containers: Sequence[Container]) -> Plan:
        return plan.plan_dump([each.pid for each in containers], ghost_limit_bytes=1 << 20)

    def _engine(self, containers: Sequence[Container]) -> ContainerEngine:
        return ContainerEngine(
            containers,
            bundle=str(self._boxes.bundle),
            work_dir=str(self._folder / "work"),
            runtime_dir=str(self._folder / "run"),
        )


@dataclasses.dataclass
class Member:
    """A pod of the group: its container, its agent, its address."""

    name: str
    box: Box
    agent: str
    uid: str
    address: str
    network: contextlib.ExitStack

    @property
    def lines(self) -> list[dict[str, float]]:
        """What its program said."""
        return [json.loads(line) for line in self.box.log.read_text().splitlines()]

    def flows(self, since: int = 3) -> None:
        """Numbers go on arriving."""
        before = len(self.lines)
        deadline = time.monotonic() + 20
        while len(self.lines) < before + since:
            assert self.box.popen.poll() is None, self.box.log.read_text()[-300:]
            assert time.monotonic() < deadline, f"{self.name}: the stream stands still"
            time.sleep(0.02)


class Group:
    """Pods, and the coordinator's way to their agents; stands in for a ``cluster.session``."""

    namespace = "default"
    settings = Settings(restore_deadline_s=60.0, dump_deadline_s=60.0)

    def __init__(self, boxes: Boxes, folder: Path, owned: contextlib.ExitStack) -> None:
        self.boxes = boxes
        self.folder = folder
        self._owned = owned
        self.nodes: dict[str, Node] = {}
        self.around: dict[str, tuple[nodeapi.NodeApi, cri.Cri]] = {}
        self.clients: dict[str, client.Agent] = {}
        self.hooks: dict[str, Any] = {}
        """Of the pods that are added (``model.hooks``)."""

    # What a coordinator asks a session.

    def agent_of(self, node: str) -> client.Agent:
        return self.clients[node]

    def any_agent(self, ask: Callable[[client.Agent], T]) -> T:
        return ask(next(iter(self.clients.values())))

    @property
    def session(self) -> Session:
        return cast("Session", self)

    def start_agent(self, name: str) -> None:
        """An agent with the group's one store."""
        folder = self.folder / f"agent-{name}"
        folder.mkdir()
        node = self._owned.enter_context(
            nodes.running(
                folder,
                None,
                state=hold_state,
                engines=BoxEngines(self.boxes, folder),
                shared=self.folder / "stores",
            )
        )
        self.nodes[name] = node
        self.around[name] = node.api, node.cri
        self.clients[name] = self._owned.enter_context(node.caller("create", "restore", "get"))

    def agent_process(self, name: str) -> Agent:
        """An agent that is a process of its own, and still to be started: when it is, it sees the
        containers that are there.
        """
        folder = self.folder / f"agent-{name}"
        folder.mkdir()
        authority = Authority("ckpt-agent")
        found = self._owned.enter_context(
            agent_in(
                folder,
                authority,
                CKPT_AGENT_STORE=str(self.folder / "stores"),
                CKPT_AGENT_CRIU_BUNDLE=str(self.boxes.bundle),
                CKPT_AGENT_WORK_KEPT_FREE="1",
            )
        )
        self.around[name] = found.api, found.runtime
        token = found.api.add_user("ada", *((verb, "default") for verb in ("create", "restore")))
        credentials = client.Credentials(authority.pem, nodes.SERVER_NAME, lambda: token)
        self.clients[name] = self._owned.enter_context(
            client.connect("localhost:17443", credentials, peer=f"node {name}")
        )
        return found

    def add(self, name: str, agent: str, address: str, *argv: str) -> Member:
        """A pod of the group that runs a program, or is a placeholder if there is none."""
        network = self._owned.enter_context(contextlib.ExitStack())
        path = network.enter_context(pod_network(address))
        options = {"namespaces": {"network": {"path": path}}}
        pod = f"{name}-{re.split(r'[.:]', address)[-1]}"
        box = (
            self.boxes.start(pod, *argv, **options)
            if argv
            else self.boxes.placeholder(pod, **options)
        )
        api, runtime = self.around[agent]
        metadata = {"annotations": {optin.HOOKS: json.dumps(self.hooks)}}
        uid = api.put(pod, nodes.NODE, containers=("main",), metadata=metadata)
        config = json.loads((box.folder / "config.json").read_text())
        config["root"]["path"] = str(box.rootfs)
        info = {"sandboxID": uid, "pid": box.pid, "runtimeSpec": config}
        runtime.containers.append(
            cri.FakeContainer(pod, uid, "main", box.pid, info=info, execute=box.execute)
        )
        if agent in self.nodes:
            watch = self.nodes[agent].watch
            wait_for(lambda: (found := watch.get("default", pod)) and found.uid == uid)
        return Member(name, box, agent, uid, address, network)

    def remove(self, member: Member) -> None:
        """End the pod; its address is free then."""
        member.box.close()
        self.boxes.all.remove(member.box)
        member.network.close()

    def dump(
        self, members: Sequence[Member], course: Course = EVACUATE, **more: Any
    ) -> checkpoint.Checkpoint:
        return checkpoint.run(
            self.session, GROUP, told(members), course, facts={}, now_s=time.time(), **more
        )

    def epochs(self) -> list[str]:
        """Those that can be restored, oldest first."""
        root = str(self.folder / "stores/default")
        store = Store.open(DirectoryVolume(root, create=False), create=False)
        return [str(each.epoch) for each in store.epochs(ids.group_name(GROUP))]

    def restore(
        self, epoch: str, members: Sequence[Member], moved: Mapping[str, str], **more: Any
    ) -> restore.Restored:
        return restore.run(
            self.session, GROUP, epoch, told(members), moved, now_s=time.time(), **more
        )


def told(members: Sequence[Member]) -> list[checkpoint.Member]:
    return [
        checkpoint.Member(each.name, each.box.name, each.uid, each.agent, (each.address,))
        for each in members
    ]


@contextlib.contextmanager
def group_in(boxes: Boxes, folder: Path) -> Iterator[Group]:
    """Two agents, called a and b."""
    (folder / "stores").mkdir()
    with contextlib.ExitStack() as owned:
        made = Group(boxes, folder, owned)
        for name in ("a", "b"):
            made.start_agent(name)
        yield made
