"""The node agent from its start to its end.

Promises: what a killed predecessor left is undone before anything new begins, and is told in the
log and on the pods concerned; told to end, it takes no new work, gives captures up (their pods go
on) and is gone within the grace period; an idle agent keeps no memory of what it did.
Does not: know what its parts are made of; the wiring does.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from agent import errors
from agent.host import clock, memory
from agent.kube.events import Reason
from agent.model.pods import Pod
from agent.node import interrupted
from agent.node.operations import Operations
from agent.node.readiness import Readiness

_log = logging.getLogger(__name__)

_TICK_S = 1.0
# What the end takes once no operation runs: answers on their way out, the last events.
_LAST_S = 2.0
# While nothing is being done. It takes milliseconds, and what answers and watches took in the
# meantime goes too.
_TIDY_S = 30.0


class Server(Protocol):
    """The gRPC server (agent.rpc.server)."""

    def start(self) -> None:
        """Take calls."""

    def stop(self, grace_s: float) -> None:
        """End."""


class Probes(Protocol):
    """Answers to the kubelet (agent.host.probes)."""

    def start(self) -> None:
        """Answer."""

    def close(self) -> None:
        """Answer no more."""


class Watch(Protocol):
    """The pods of this node (agent.kube.pods)."""

    def start(self) -> None:
        """Begin."""

    def close(self) -> None:
        """End."""

    def get(self, namespace: str, name: str) -> Pod | None:
        """One pod."""


class Teller(Protocol):
    """Events on pods (agent.kube.events)."""

    def tell(self, pod: Pod, reason: Reason, note: str) -> None:
        """Tell one."""

    def close(self, timeout_s: float) -> None:
        """Tell the rest and end."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an agent is made of. ``recover`` undoes what killed agents left and says what that
    was, a line each; ``follow_up`` does what they owe to pods that are known by then.
    """

    node: str
    server: Server
    probes: Probes
    watch: Watch
    readiness: Readiness
    operations: Operations
    trail: interrupted.Trail
    teller: Teller
    recover: Callable[[], Sequence[str]]
    follow_up: Callable[[], None]
    grace_s: float


def run(parts: Parts, stop: threading.Event) -> None:
    """Serve until ``stop`` is set."""
    try:
        for line in parts.recover():
            _log.warning("a killed agent's work was undone: %s", line)
    except errors.CkptError as exc:
        # Each dump and restore begins with the same; the agent stays to say what is wrong.
        _log.error("what a killed agent left cannot be undone now: %s", exc.message)
    left: Sequence[interrupted.Left] = parts.trail.take()
    parts.watch.start()
    parts.server.start()
    parts.probes.start()
    parts.readiness.start()
    _log.info("serving", extra={"facts": {"node": parts.node}})
    tidy = clock.Deadline.after(_TIDY_S)
    try:
        while not stop.wait(_TICK_S):
            parts.readiness.watch()
            left = _tell_left(parts, left) if left else left
            if tidy.expired and not parts.operations.running():
                memory.give_back()
                tidy = clock.Deadline.after(_TIDY_S)
    finally:
        _end(parts)


def _tell_left(parts: Parts, left: Sequence[interrupted.Left]) -> list[interrupted.Left]:
    """Tell the people of the pods that the watch knows by now; return the rest."""
    if parts.readiness.reason:
        return list(left)
    for each in left:
        facts = {"pod": f"{each.namespace}/{each.pod}", "uid": each.uid}
        if each.kind == "dump":
            reason: Reason = "CheckpointFailed"
            note = "the agent was killed in the middle of a dump; it was given up, the pod goes on"
        else:
            reason = "RestoreFailed"
            note = (
                "the agent was killed in the middle of a restore; it was undone, and the"
                " placeholder waits"
            )
        _log.warning(note, extra={"facts": facts})
        pod = parts.watch.get(each.namespace, each.pod)
        if pod is not None and pod.uid == each.uid:
            parts.teller.tell(pod, reason, note)
    parts.follow_up()
    return []


def _end(parts: Parts) -> None:
    deadline = clock.Deadline.after(parts.grace_s)
    _log.info("shutting down")
    parts.readiness.close()
    parts.operations.close()
    if not parts.operations.wait_empty(deadline):
        names = ", ".join(f"{each.kind} of {each.what}" for each in parts.operations.running())
        _log.error("still running at the end of the grace period: %s", names)
    parts.server.stop(min(_LAST_S, max(deadline.remaining_s, _TICK_S)))
    parts.probes.close()
    parts.watch.close()
    parts.teller.close(_LAST_S)
    _log.info("ended")
