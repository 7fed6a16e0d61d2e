"""A cluster for tests of the coordinator as a service: its API server, two agents whose processes
are words, a JobSet controller of a few lines, and replicas that are the program itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from agent import services, settings
from agent.coordination import leading
from agent.model import jobset
from agent.rpc import coordinatorclient
from agent.rpc.channels import Credentials
from agent.rpc.v1 import coordinator_pb2_grpc
from tests.fakes import apiserver, coordinatorapi, epochs, nodeagent
from tests.fakes.authority import Authority
from tests.unit import test_cli_jobset

SERVER_NAME = "ckpt-agent-coordinator.ckpt-agent.svc"
ADA, BOB = "token-of-ada", "token-of-bob"
LEASE = ("leases", "ckpt-agent", leading.LEASE_NAME)
_HOSTS = {"n1": "127.0.0.2", "n2": "127.0.0.3"}
_LABELS = {"app.kubernetes.io/name": "ckpt-agent-node"}


class Controller(test_cli_jobset.Controller):
    """With restores that are the real ones."""

    def __init__(self, api: apiserver.ApiServer, group: epochs.Group) -> None:
        self.api = api
        self.webhook = True
        self.no_room: set[str] = set()
        self._made = 0
        api.admit = self._admit
        api.on_jobset = self._changed
        # Called with the JobSet whenever it was changed, before its controller sees it.
        self.before: Callable[[Any], None] = lambda found: None
        # What the processes did of pods that were ended with the JobSet.
        self.ended: list[str] = []
        self.group = group

    def _changed(self, found: Any) -> None:
        self.before(found)
        if found["spec"].get("suspend"):
            uids = [each["metadata"]["uid"] for each in self.pods().values()]
            self.ended += [self.group.processes.get(each, "absent") for each in uids]
        super()._changed(found)


@dataclasses.dataclass
class Cluster:
    """All of it."""

    api: apiserver.ApiServer
    extra: coordinatorapi.Extra
    agents: nodeagent.Cluster
    group: epochs.Group
    jobsets: Controller
    ca_pem: bytes
    environ: dict[str, str]

    def processes(self) -> dict[str, str]:
        """What the processes of the pods do that are there, by the pods' identities."""
        return {
            identity: self.group.processes.get(pod["metadata"]["uid"], "absent")
            for identity, pod in self.jobsets.pods().items()
        }

    def records(self) -> list[dict[str, Any]]:
        """The ConfigMaps of operations."""
        stored = list(self.extra.stored.items())
        return [each for (kind, *_), each in stored if kind == "configmaps"]

    def outlive(self) -> None:
        """What time does when a coordinator is gone: its lease is free, and members go on."""
        self.extra.change(LEASE, holderIdentity="")
        self.group.hear_nothing()


@contextlib.contextmanager
def running(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Everything but replicas."""
    for name in [name for name in os.environ if name.startswith("CKPT_AGENT_")]:
        monkeypatch.delenv(name)
    authority, ours = Authority("cluster"), Authority("ckpt-agent")
    extra = coordinatorapi.Extra()
    extra.callers = {ADA: "ada", BOB: "bob"}

    class Handler(coordinatorapi.Handler):
        pass

    Handler.extra = extra
    agents = nodeagent.Cluster(tokens={apiserver.TOKEN})
    group = epochs.Group(agents)
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        api = stack.enter_context(apiserver.running(authority, folder, Handler))
        for node, host in _HOSTS.items():
            api.add_node(node)
            api.add_pod(
                f"agent-{node}",
                node,
                namespace="ckpt-agent",
                metadata={"labels": _LABELS},
                status={"podIP": host},
            )
            more = epochs.add(group, agents.tokens, node)
            stack.enter_context(
                nodeagent.running(agents, node, ours, host=host, port=port, more=more)
            )
        api.config_maps["ckpt-agent", "ckpt-agent-ca"] = {"ca.crt": ours.pem.decode()}
        tls = folder / "tls"
        tls.mkdir()
        certificate, key = ours.issue(SERVER_NAME, hosts=(SERVER_NAME,))
        for name, content in (("tls.crt", certificate), ("tls.key", key), ("ca.crt", ours.pem)):
            (tls / name).write_bytes(content)
        environ = {
            "KUBECONFIG": api.kubeconfig(folder / "kubeconfig", authority),
            "CKPT_AGENT_TLS_DIR": str(tls),
            "CKPT_AGENT_TOKEN_PORT": str(port),
            "CKPT_AGENT_COORDINATOR_CERTIFICATE_PORT": "0",
            "CKPT_AGENT_PROBE_PORT": "0",
            # Nobody here is slow but for the machine.
            "CKPT_AGENT_AGENT_SILENCE": "20s",
            "CKPT_AGENT_SCHEDULE_DEADLINE": "60s",
            "CKPT_AGENT_SHUTDOWN_GRACE": "3s",
            "XDG_CONFIG_HOME": str(folder / "none"),
            "XDG_CONFIG_DIRS": str(folder / "none"),
        }
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        yield Cluster(api, extra, agents, group, Controller(api, group), ours.pem, environ)


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody has on any address, and nobody gets who does not ask for it by number."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("0.0.0.0", 0))
        yield int(held.getsockname()[1])


def wait_for(predicate: Callable[[], object]) -> None:
    """Return when ``predicate`` is true; fail if it does not become so on the busiest machine."""
    deadline = time.monotonic() + 60
    while not predicate():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)


@contextlib.contextmanager
def client(
    cluster: Cluster, port: int, token: str = ADA
) -> Iterator[coordinatorclient.Coordinator]:
    """A caller."""
    credentials = Credentials(cluster.ca_pem, SERVER_NAME, lambda: token)
    target = f"localhost:{port}"
    with coordinatorclient.connect(target, credentials, peer="the coordinator") as made:
        yield made


@contextlib.contextmanager
def stub(cluster: Cluster, port: int) -> Iterator[Any]:
    """The API as its messages have it."""
    secret = grpc.ssl_channel_credentials(cluster.ca_pem)
    options = (("grpc.ssl_target_name_override", SERVER_NAME),)
    token = grpc.access_token_call_credentials(ADA)
    both = grpc.composite_channel_credentials(secret, token)
    with grpc.secure_channel(f"localhost:{port}", both, options) as channel:
        yield coordinator_pb2_grpc.CoordinatorStub(channel)


@contextlib.contextmanager
def replica(cluster: Cluster) -> Iterator[int]:
    """A replica in this process that leads; the port of its callers."""
    stop = threading.Event()
    with reserved_port() as port:
        chosen = settings.load({"coordinator_token_port": str(port)}, None, os.environ)
        thread = threading.Thread(target=services.coordinator, args=(chosen, stop), name="replica")
        thread.start()
        try:
            wait_for(lambda: _leads(cluster))
            yield port
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


def _leads(cluster: Cluster) -> bool:
    found = cluster.extra.stored.get(LEASE)
    return bool(found and found["spec"]["holderIdentity"])


class Process:
    """A replica of its own, which can be killed."""

    def __init__(self, cluster: Cluster) -> None:
        self._reserved = contextlib.ExitStack()
        self.port = self._reserved.enter_context(reserved_port())
        environ = {**os.environ, "CKPT_AGENT_COORDINATOR_TOKEN_PORT": str(self.port)}
        self._process = subprocess.Popen(
            [str(pathlib.Path(sys.executable).with_name("ckpt-agent")), "coordinator"],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )

    def kill(self) -> None:
        """As a node that is gone."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._reserved.close()

    def end(self) -> str:
        """As a kubelet; what it had logged."""
        self._process.terminate()
        _, log = self._process.communicate(timeout=60)
        self._reserved.close()
        return log


GROUP = jobset.group("train")
