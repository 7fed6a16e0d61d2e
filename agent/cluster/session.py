"""One command's work in one cluster: the caller, its namespace, and the agents it can ask.

Promises: an agent is reached by a port-forward with the caller's own rights, or at the address that
the settings name, or, by a service inside the cluster, at its pod's; its certificate is checked
against the authority that the cluster publishes; who cannot be asked is told by name with the
reason and the way out; leaving the context closes all.
Does not: decide what to do with pods.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

from agent import errors
from agent.kube import connection, objects, portforward
from agent.model import access
from agent.rpc import client
from agent.settings import Settings

# What the admission service publishes beside the certificates that it makes.
_CA_NAME, _CA_KEY = "ckpt-agent-ca", "ca.crt"
_SERVICE = "ckpt-agent-node"

T = TypeVar("T")
May = Callable[[access.Right], bool]
"""Whether somebody has a right. Raises ``errors.Unreachable`` if that cannot be told now."""


@contextlib.contextmanager
def session(settings: Settings) -> Iterator[Session]:
    """Connect to the cluster that ``settings`` mean. Raises as ``connection.connect``."""
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(
            contextlib.closing(connection.connect(settings.kubeconfig, settings.context))
        )
        yield Session(api, settings, stack)


@contextlib.contextmanager
def acting_for(
    api: connection.Connection, settings: Settings, namespace: str, may: May
) -> Iterator[Session]:
    """A session of a service in the cluster, which acts with its own identity for somebody else
    of whom ``may`` tells the rights.
    """
    with contextlib.ExitStack() as stack:
        yield Session(api, dataclasses.replace(settings, namespace=namespace), stack, may)


class Session:
    """What verbs against a cluster share. ``for_another``: it is not the caller's own rights that
    ``may`` tells, and calls are made with.
    """

    def __init__(
        self,
        api: connection.Connection,
        settings: Settings,
        stack: contextlib.ExitStack,
        may: May | None = None,
    ) -> None:
        self.api = api
        self.settings = settings
        self.namespace = settings.namespace or api.namespace
        self.for_another = may is not None
        self._may = may or functools.partial(objects.may, api)
        self._stack = stack
        self._agents: list[objects.AgentPod] | None = None
        self._connected: dict[str, client.Agent] = {}
        self._made_credentials: client.Credentials | None = None

    def may(self, right: access.Right) -> bool:
        """Whether whom this is done for has a right, as the API server's review says."""
        return self._may(right)

    def pod_names(self) -> list[str]:
        """The pods of the namespace, by name."""
        return sorted(
            str(each["metadata"]["name"]) for each in objects.pods(self.api, self.namespace)
        )

    def look_again(self) -> None:
        """Look the agents up anew when they are asked next: some may have been replaced."""
        self._agents = None

    def agents(self) -> list[objects.AgentPod]:
        """The agents' pods, ready or not; looked up once.

        Raises:
            errors.NotFound: there is none at all.
        """
        if self._agents is None:
            settings = self.settings
            self._agents = objects.agents(
                self.api, settings.agent_namespace, settings.agent_selector
            )
            if not self._agents:
                raise errors.NotFound(
                    f"no agent runs in namespace {settings.agent_namespace} of {self.api.name}",
                    hint="install it (deploy/daemonset), or correct agent_namespace and --context",
                )
        return self._agents

    def agent_of(self, node: str) -> client.Agent:
        """The agent that serves ``node``.

        Raises:
            errors.Unreachable: it is not ready; the message says why.
            errors.NotFound: none runs there.
        """
        if self.settings.agent_address:
            return self._direct(self.settings.agent_address)
        here = [each for each in self.agents() if each.node == node]
        if not here:
            raise errors.NotFound(
                f"no agent runs on node {node}",
                hint="the DaemonSet ckpt-agent-node does not select or tolerate it: see"
                " ckpt-agent doctor",
                node=node,
            )
        if here[0].problem:
            raise errors.Unreachable(
                f"the agent on node {node} (pod {here[0].name}) {here[0].problem}",
                hint=f"kubectl -n {self.settings.agent_namespace} describe pod {here[0].name}",
                node=node,
            )
        return self._reached(here[0])

    def any_agent(self, ask: Callable[[client.Agent], T]) -> T:
        """``ask`` an agent that is ready; where one cannot be reached or has too much to do, the
        next. For what any agent answers alike, such as the images of the shared store.

        Raises:
            errors.Unreachable: none is ready, or none answered.
            errors.Overloaded: the last one has too much to do, and no other answered.
        """
        if self.settings.agent_address:
            return ask(self._direct(self.settings.agent_address))
        ready = [each for each in self.agents() if not each.problem]
        if not ready:
            problems = [f"{each.node}: pod {each.name} {each.problem}" for each in self.agents()]
            raise errors.Unreachable(
                "no agent is ready",
                hint=f"kubectl -n {self.settings.agent_namespace} get pods, or ckpt-agent doctor",
                reasons=problems,
            )
        for each in ready[:-1]:
            with contextlib.suppress(errors.Unreachable, errors.Overloaded):
                return ask(self._reached(each))
        return ask(self._reached(ready[-1]))

    def credentials(self, service: str = _SERVICE) -> client.Credentials:
        """How the servers behind a Service of the project are trusted, and told who calls."""
        name = f"{service}.{self.settings.agent_namespace}.svc"
        return dataclasses.replace(self._credentials(), server_name=name)

    def _direct(self, address: str) -> client.Agent:
        if address not in self._connected:
            self._connected[address] = self._stack.enter_context(
                client.connect(address, self._credentials(), peer=f"the agent at {address}")
            )
        return self._connected[address]

    def _reached(self, pod: objects.AgentPod) -> client.Agent:
        if not self.for_another:
            return self._forwarded(pod)
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        target = f"{host}:{self.settings.token_port}"
        # A pod that was made anew may have the address of another.
        key = f"{pod.name} {target}"
        if key not in self._connected:
            self._connected[key] = self._stack.enter_context(
                client.connect(target, self._credentials(), peer=f"the agent on {pod.node}")
            )
        return self._connected[key]

    def _forwarded(self, pod: objects.AgentPod) -> client.Agent:
        if pod.name not in self._connected:
            found = self._credentials()
            settings = self.settings
            port = settings.certificate_port if found.key_pem else settings.token_port
            made = self._stack.enter_context(
                portforward.forward(self.api, settings.agent_namespace, pod.name, port)
            )
            self._connected[pod.name] = self._stack.enter_context(
                client.connect(
                    f"unix:{made.path}",
                    found,
                    peer=f"the agent on {pod.node}",
                    why=lambda: made.reason,
                )
            )
        return self._connected[pod.name]

    def _credentials(self) -> client.Credentials:
        """What agents are trusted by and told."""
        if self._made_credentials is None:
            shown = self.api.identity()
            self._made_credentials = client.Credentials(
                ca_pem=self._authority(),
                server_name=f"{_SERVICE}.{self.settings.agent_namespace}.svc",
                token=lambda: self.api.identity().token,
                certificate_pem=_content(shown.certificate_file),
                key_pem=_content(shown.key_file),
            )
        return self._made_credentials

    def _authority(self) -> bytes:
        if self.settings.agent_ca:
            return _content(self.settings.agent_ca) or b""
        namespace = self.settings.agent_namespace
        try:
            found = objects.config_map(self.api, namespace, _CA_NAME)
        except errors.NotFound as exc:
            raise errors.NotFound(
                f"{self.api.name} publishes no authority for agents: there is no ConfigMap"
                f" {namespace}/{_CA_NAME}",
                hint="is ckpt-agent installed there? Its Deployment ckpt-agent-admission makes it",
            ) from exc
        if not found.get(_CA_KEY, "").strip():
            raise errors.NotFound(
                f"the ConfigMap {namespace}/{_CA_NAME} has no {_CA_KEY}",
                hint="the Deployment ckpt-agent-admission writes it: look at its log",
            )
        return found[_CA_KEY].encode()


def _content(path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as exc:
        raise errors.InvalidInput(
            f"cannot read {path}: {exc.strerror}", hint="name a file you may read", path=path
        ) from exc
