"""Checkpoints of a pod and of all pods that are connected with it.

Promises: as ``checkpoint``; who takes part, who is connected and does not, and who could not be
asked, is told before any pod is stopped. Connections are looked at once: what is made after that
and leaves the cut is named by its outcome.
Does not: decide who belongs together; ``model.podfollow`` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint
from agent.coordinator.machine import State
from agent.host import clock
from agent.kube import objects
from agent.model import jobset, optin, podfollow, selection
from agent.model import storage as model_storage
from agent.model.podfollow import Closure, Connection, Party, group
from agent.model.protocol import EVACUATE, LEAVE_RUNNING
from agent.rpc import client, epochclient

# For all who are asked: what is known of the first is old when the last has answered.
_ASKING_S = 20.0
# An agent lets in more calls of one caller; each reads what the sockets of a pod's processes are.
_AT_ONCE = 16
_LOOK_S = 0.2


def members(session: Session, pod: str) -> list[checkpoint.Member]:
    """The pods that are connected with ``pod`` now, and itself. Raises as ``dump``, before any of
    them is told anything.
    """
    return _taking(session, pod, checkpoint.Control()).members


def dump(
    session: Session,
    pod: str,
    *,
    now_s: float,
    storage: str = "",
    stop: bool = False,
    control: checkpoint.Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    named: Callable[[epochclient.Epoch], None] = lambda epoch: None,
    found: Callable[[Closure], None] = lambda closure: None,
) -> checkpoint.Checkpoint:
    """Checkpoint ``pod``, and whoever is connected with it, at one instant. ``found`` is told who
    that is before any of them is told anything; ``named`` as ``checkpoint.run`` has it.

    Raises:
        errors.NotFound | errors.TargetUnsuitable: the pod does not run, or not all of them can take
            part.
        errors.InvalidInput: they ask for different storages, and ``storage`` is "".
        errors.CkptError: as ``checkpoint.run``.
    """
    control = control or checkpoint.Control()
    taking = _taking(session, pod, control)
    found(taking.closure)
    return checkpoint.run(
        session,
        group(pod),
        taking.members,
        EVACUATE if stop else LEAVE_RUNNING,
        facts={
            "followed": pod,
            "outside": [*taking.closure.leaving, *taking.closure.unasked],
        },
        now_s=now_s,
        storage=storage or model_storage.agreed(taking.said),
        control=control,
        watch=watch,
        named=named,
    )


@dataclasses.dataclass(frozen=True)
class _Taking:
    """Who takes part, why, and the annotations of their pods by name."""

    members: list[checkpoint.Member]
    closure: Closure
    said: dict[str, dict[str, str]]


def _taking(session: Session, pod: str, control: checkpoint.Control) -> _Taking:
    pods = {
        str(each["metadata"]["name"]): each for each in objects.pods(session.api, session.namespace)
    }
    closure = _closure(session, pod, pods, control)
    meant = [pods[each] for each in closure.members]
    of_jobsets = {
        name: [each for each in pods.values() if _label(each, jobset.NAME_LABEL) == name]
        for name in selection.owned(meant)
    }
    made = selection.together(f"connected with pod {pod}", meant, of_jobsets)
    said = {
        str(each["metadata"]["name"]): each["metadata"].get("annotations") or {} for each in meant
    }
    return _Taking([checkpoint.member(each) for each in made], closure, said)


def _closure(
    session: Session, named: str, pods: Mapping[str, jobset.Json], control: checkpoint.Control
) -> Closure:
    parties = [
        _party(each)
        for each in pods.values()
        if (each.get("status") or {}).get("phase") == "Running" or each["metadata"]["name"] == named
    ]
    known: dict[str, list[Connection]] = {}
    unasked: list[str] = []
    deadline = clock.Deadline.after(_ASKING_S)
    while True:
        closure = podfollow.close(named, parties, known)
        if not closure.ask:
            return dataclasses.replace(closure, unasked=tuple(unasked))
        answers = _asked(session, [pods[each] for each in closure.ask], deadline, control)
        for name, answer in answers.items():
            if not isinstance(answer, errors.CkptError):
                known[name] = answer
            elif name in closure.members:
                raise answer
            else:
                # Only asked whether it hears somebody.
                known[name] = []
                unasked.append(f"pod {name} could not be asked: {answer.message}")


def _party(pod: jobset.Json) -> Party:
    metadata, spec = pod["metadata"], pod.get("spec") or {}
    opted_in = _label(pod, optin.LABEL) == optin.ENABLED
    of_jobset = jobset.made_by_job(pod)
    return Party(
        name=str(metadata["name"]),
        addresses=() if spec.get("hostNetwork") else tuple(jobset.addresses(pod)),
        together=f"JobSet {_label(pod, jobset.NAME_LABEL)}" if of_jobset else "",
        refused="" if opted_in else f"is not opted in ({optin.LABEL}={optin.ENABLED})",
    )


def _label(pod: jobset.Json, key: str) -> str:
    return str((pod["metadata"].get("labels") or {}).get(key, ""))


def _asked(
    session: Session,
    pods: Sequence[jobset.Json],
    deadline: clock.Deadline,
    control: checkpoint.Control,
) -> dict[str, list[Connection] | errors.CkptError]:
    """The connections of each of ``pods``, several of which are asked at once; or why it could not
    be.

    Raises:
        errors.Interrupted: ``control`` was asked to give up.
    """
    found: dict[str, list[Connection] | errors.CkptError] = {}
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="follow")
    try:
        asked: dict[str, Future[list[Connection]]] = {}
        for pod in pods:
            name, node = str(pod["metadata"]["name"]), (pod.get("spec") or {}).get("nodeName")
            try:
                agent = session.agent_of(str(node or ""))
            except (errors.Unreachable, errors.NotFound) as exc:
                found[name] = exc
            else:
                asked[name] = pool.submit(_connections, agent, session.namespace, name, deadline)
        while wait(asked.values(), _LOOK_S).not_done:
            control.check()
        for name, each in asked.items():
            problem = each.exception()
            if problem is not None and not isinstance(problem, errors.CkptError):
                raise problem
            found[name] = problem or each.result()
    finally:
        # Nobody waits for whom is asked in vain: its call ends with the session.
        pool.shutdown(wait=False, cancel_futures=True)
    return found


def _connections(
    agent: client.Agent, namespace: str, pod: str, deadline: clock.Deadline
) -> list[Connection]:
    deadline.check("asking pods who they are connected with")
    return agent.connections(namespace, pod, timeout_s=deadline.remaining_s)
