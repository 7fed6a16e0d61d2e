"""Operations of the cluster's coordinator, as one command asks for them and follows them.

Promises: the replica that serves is found by asking each; one that takes over is waited for, and
found again in the middle of an operation, whose course goes on with it; what begins an operation
is said with a key, so that a connection that breaks begins nothing twice.
Does not: do any of the work; the coordinator does.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Callable
from typing import TypeVar

from agent import errors
from agent.cluster.session import Session
from agent.host import clock
from agent.kube import objects, portforward
from agent.rpc import coordinatorclient
from agent.rpc.coordinatorclient import Asking, Coordinator, Operation

SERVICE = "ckpt-agent-coordinator"
# A standby takes over when the lease has run out, and needs a moment to read what is under way.
_TAKEOVER_S = 60.0
_AGAIN_S = 0.5

T = TypeVar("T")


class Operations:
    """The coordinator's operations in the namespace of ``session``."""

    def __init__(self, session: Session, stack: contextlib.ExitStack) -> None:
        """``stack`` closes the ways to replicas."""
        self._session = session
        self._stack = stack
        self._connected: dict[str, Coordinator] = {}
        self._served: Coordinator | None = None

    def asking(self, *, wait: bool, deadline_s: float) -> Asking:
        """What begins one operation, however often it is said."""
        return Asking(self._session.namespace, secrets.token_hex(16), wait, deadline_s)

    def ask(self, call: Callable[[Coordinator], T], asked: threading.Event | None = None) -> T:
        """``call`` the replica that serves, wait for one if none does now, unless somebody
        ``asked`` to stop.

        Raises:
            errors.NotFound: the cluster has no coordinator.
            errors.Interrupted: nobody served until somebody asked to stop.
            errors.Unreachable: none served for a minute.
        """
        deadline = clock.Deadline.after(_TAKEOVER_S)
        while True:
            problems: list[str] = []
            for _, reach in self._replicas():
                try:
                    replica = reach()
                    answer = call(replica)
                except errors.Unreachable as exc:
                    problems.append(exc.message)
                    continue
                self._served = replica
                return answer
            self._served = None
            if asked is not None and asked.is_set():
                raise errors.Interrupted(
                    "interrupted before the coordinator answered",
                    hint="ckpt-agent operations shows whether anything began",
                )
            if deadline.expired:
                raise errors.Unreachable(
                    f"the coordinator did not answer for {_TAKEOVER_S:g} s"
                    + (f": {problems[-1]}" if problems else ": no replica of it is ready"),
                    hint=f"kubectl -n {self._session.settings.agent_namespace} get pods -l"
                    f" {self._session.settings.coordinator_selector}",
                    reasons=problems,
                )
            clock.wait_until(lambda: False, clock.Deadline.after(_AGAIN_S), every_s=_AGAIN_S)

    def follow(
        self,
        found: Operation,
        show: Callable[[Operation], None],
        asked: threading.Event,
    ) -> Operation:
        """Show each change of an operation until it has ended, and return it then; when somebody
        ``asked`` to stop, the coordinator is asked to cancel it, which may take to its end.

        Raises:
            errors.Unreachable: no coordinator served for a minute; the operation goes on with the
                next.
        """
        namespace, told = found.namespace, False
        show(found)
        while not found.over:
            try:
                if asked.is_set() and not told:
                    cancel = functools.partial(_cancel, namespace=namespace, identifier=found.id)
                    found, told = self.ask(cancel), True
                else:
                    get = functools.partial(_get, namespace=namespace, identifier=found.id)
                    found = self.ask(get)
            except errors.Unreachable as exc:
                raise errors.Unreachable(
                    f"{exc.message}; operation {found.id} goes on when one does",
                    hint=f"ckpt-agent operations watch {found.id} -n {namespace}",
                    operation=found.id,
                ) from exc
            show(found)
            if found.over or self._served is None:
                continue
            # Whoever is cut off asks again; who was asked to stop says so first.
            with contextlib.suppress(errors.Unreachable, errors.Interrupted):
                watched = self._served.watch(namespace, found.id, None if told else asked)
                for found in watched:
                    show(found)
        return found

    def _replicas(self) -> list[tuple[str, Callable[[], Coordinator]]]:
        """Whoever may serve by name, with ways to them; the one that did last first."""
        settings = self._session.settings
        if settings.coordinator_address:
            address = settings.coordinator_address
            return [(address, functools.partial(self._direct, address))]
        pods = objects.agents(
            self._session.api, settings.agent_namespace, settings.coordinator_selector
        )
        if not pods:
            raise errors.NotFound(
                f"no coordinator runs in namespace {settings.agent_namespace} of"
                f" {self._session.api.name}",
                hint="install it (deploy/daemonset), or leave --coordinator away: then this"
                " command does it itself",
            )
        found = [
            (each.name, functools.partial(self._forwarded, each))
            for each in pods
            if not each.problem
        ]
        served = self._served
        return sorted(found, key=lambda each: self._connected.get(each[0]) is not served)

    def _direct(self, address: str) -> Coordinator:
        if address not in self._connected:
            self._connected[address] = self._stack.enter_context(
                coordinatorclient.connect(
                    address,
                    self._session.credentials(SERVICE),
                    peer=f"the coordinator at {address}",
                )
            )
        return self._connected[address]

    def _forwarded(self, pod: objects.AgentPod) -> Coordinator:
        if pod.name not in self._connected:
            credentials, settings = self._session.credentials(SERVICE), self._session.settings
            port = (
                settings.coordinator_certificate_port
                if credentials.key_pem
                else settings.coordinator_token_port
            )
            way = self._stack.enter_context(
                portforward.forward(self._session.api, settings.agent_namespace, pod.name, port)
            )
            self._connected[pod.name] = self._stack.enter_context(
                coordinatorclient.connect(
                    f"unix:{way.path}",
                    credentials,
                    peer=f"the coordinator in pod {pod.name}",
                    why=lambda: way.reason,
                )
            )
        return self._connected[pod.name]


def _get(replica: Coordinator, *, namespace: str, identifier: str) -> Operation:
    return replica.get(namespace, identifier)


def _cancel(replica: Coordinator, *, namespace: str, identifier: str) -> Operation:
    return replica.cancel(namespace, identifier)
