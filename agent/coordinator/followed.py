"""Checkpoints of a pod and of all pods that are connected with it.

Promises: as ``checkpoint``; who takes part, and who is connected and does not, is told before any
pod is stopped. Connections are looked at once: what is made after that and leaves the cut is named
by its outcome.
Does not: decide who belongs together; ``model.podfollow`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint
from agent.coordinator.machine import State
from agent.kube import objects
from agent.model import jobset, optin, podfollow, selection
from agent.model import storage as model_storage
from agent.model.podfollow import Closure, Connection, Party
from agent.model.protocol import EVACUATE, LEAVE_RUNNING


def group(pod: str) -> str:
    """What the images of the pods are called that are connected with ``pod``."""
    return f"followed.{pod}"


def dump(
    session: Session,
    pod: str,
    *,
    now_s: float,
    stop: bool = False,
    control: checkpoint.Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    found: Callable[[Closure], None] = lambda closure: None,
) -> checkpoint.Checkpoint:
    """Checkpoint ``pod``, and whoever is connected with it, at one instant. ``found`` is told who
    that is before any of them is told anything.

    Raises:
        errors.NotFound | errors.TargetUnsuitable: the pod does not run, or not all of them can take
            part.
        errors.CkptError: as ``checkpoint.run``.
    """
    control = control or checkpoint.Control()
    pods = {
        str(each["metadata"]["name"]): each for each in objects.pods(session.api, session.namespace)
    }
    closure = _closure(session, pod, pods, control)
    found(closure)
    meant = [pods[each] for each in closure.members]
    of_jobsets = {
        name: [each for each in pods.values() if _label(each, jobset.NAME_LABEL) == name]
        for name in selection.owned(meant)
    }
    made = selection.together(f"connected with pod {pod}", meant, of_jobsets)
    said = {
        str(each["metadata"]["name"]): each["metadata"].get("annotations") or {} for each in meant
    }
    return checkpoint.run(
        session,
        group(pod),
        [checkpoint.member(each) for each in made],
        EVACUATE if stop else LEAVE_RUNNING,
        facts={"followed": pod, "outside": list(closure.leaving)},
        now_s=now_s,
        storage=model_storage.agreed(said),
        control=control,
        watch=watch,
    )


def _closure(
    session: Session, named: str, pods: Mapping[str, jobset.Json], control: checkpoint.Control
) -> Closure:
    parties = [
        _party(each)
        for each in pods.values()
        if (each.get("status") or {}).get("phase") == "Running" or each["metadata"]["name"] == named
    ]
    known: dict[str, list[Connection]] = {}
    while True:
        closure = podfollow.close(named, parties, known)
        if not closure.ask:
            return closure
        for name in closure.ask:
            control.check()
            known[name] = _connections(session, pods[name], needed=name in closure.members)


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


def _connections(session: Session, pod: jobset.Json, *, needed: bool) -> list[Connection]:
    """The pod's; none of one that is only asked whether it hears somebody, and cannot be."""
    node = str((pod.get("spec") or {}).get("nodeName") or "")
    try:
        agent = session.agent_of(node)
        return agent.connections(session.namespace, str(pod["metadata"]["name"]))
    except (errors.Refused, errors.Unreachable, errors.NotFound):
        if needed:
            raise
        return []
