"""Checkpoints of a pod, asked for by its name.

Promises: a pod that cannot be dumped is refused with the reason before any agent is asked; what
was interrupted or cut off says truthfully what became of the pod.
Does not: move pods; ``move`` does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from agent import errors
from agent.cluster.session import Session
from agent.kube import objects
from agent.kube.connection import Json
from agent.rpc import client, results


def dump(
    session: Session,
    name: str,
    *,
    containers: Sequence[str] = (),
    engine: str | None = None,
    stop: bool = False,
    cancel: threading.Event | None = None,
    progress: Callable[[str, int], None] = lambda phase, raw_bytes: None,
) -> results.DumpOutcome:
    """Dump the pod ``name`` on the node where it runs.

    Raises:
        errors.NotFound | errors.TargetUnsuitable: no such pod or container, or it does not run.
        errors.Interrupted: ``cancel`` was set.
        errors.CkptError: as the agent says.
    """
    found = running(session, name, containers)
    agent = session.agent_of(found["spec"]["nodeName"])
    return dump_running(
        session,
        agent,
        found,
        containers=containers,
        engine=engine,
        stop=stop,
        cancel=cancel,
        progress=progress,
    )


def dump_running(
    session: Session,
    agent: client.Agent,
    found: Json,
    *,
    containers: Sequence[str] = (),
    engine: str | None = None,
    stop: bool = False,
    cancel: threading.Event | None = None,
    progress: Callable[[str, int], None] = lambda phase, raw_bytes: None,
) -> results.DumpOutcome:
    """As ``dump``, of a pod that was looked at and on its agent."""
    metadata = found["metadata"]
    try:
        return agent.dump(
            session.namespace,
            metadata["name"],
            pod_uid=metadata["uid"],
            containers=tuple(containers),
            engine=engine,
            stop=stop,
            deadline_s=session.settings.dump_deadline_s,
            cancel=cancel,
            progress=progress,
        )
    except (errors.Interrupted, errors.Unreachable) as exc:
        raise _cut_off(exc, session, metadata["name"], stop=stop) from exc


def watch(
    session: Session,
    name: str,
    *,
    containers: Sequence[str] = (),
    every_s: float | None = None,
    count: int | None = None,
    cancel: threading.Event | None = None,
    done: Callable[[results.DumpOutcome], None] = lambda outcome: None,
    failed: Callable[[errors.CkptError], None] = lambda exc: None,
    late: Callable[[float, float], None] = lambda took_s, pause_s: None,
) -> results.Watched:
    """Dump the pod ``name`` again and again; as ``client.Agent.watch``, and raises as ``dump``."""
    found = running(session, name, containers)
    agent = session.agent_of(found["spec"]["nodeName"])
    return agent.watch(
        session.namespace,
        name,
        pod_uid=found["metadata"]["uid"],
        containers=tuple(containers),
        every_s=every_s,
        count=count,
        deadline_s=session.settings.dump_deadline_s,
        cancel=cancel,
        done=done,
        failed=failed,
        late=late,
    )


def _cut_off(exc: errors.CkptError, session: Session, name: str, *, stop: bool) -> errors.CkptError:
    """An agent that lost its caller gives the dump up, unless it was just committed."""
    see = f"ckpt-agent list {name} -n {session.namespace}"
    if isinstance(exc, errors.Interrupted):
        if stop:
            return errors.Interrupted(
                "interrupted: the dump is given up and the pod goes on, unless the image was"
                " committed in this very moment",
                hint=f"see {see}",
            )
        return errors.Interrupted(
            "interrupted: the dump is given up, the pod goes on", hint="run the dump again"
        )
    if not exc.facts.get("begun"):
        return exc
    return errors.Unreachable(
        f"{exc.message}; an agent that loses its caller gives a dump up and lets the pod go on,"
        " unless the image was committed by then",
        hint=f"see {see}",
        begun=True,
    )


def running(session: Session, name: str, containers: Sequence[str] = ()) -> Json:
    """A pod that runs on a node and has ``containers``."""
    found = objects.pod(session.api, session.namespace, name)
    problem = _problem(found)
    if problem:
        raise errors.TargetUnsuitable(
            f"pod {session.namespace}/{name} {problem}",
            hint=f"kubectl -n {session.namespace} describe pod {name}",
        )
    known = names_of_containers(found)
    for each in containers:
        if each not in known:
            raise errors.NotFound(
                f"pod {session.namespace}/{name} has no container {each!r}",
                hint=f"it has {', '.join(known)}",
            )
    return found


def names_of_containers(found: Json) -> list[str]:
    """The containers of a pod, then its sidecars."""
    spec = found["spec"]
    return [each["name"] for key in ("containers", "initContainers") for each in spec.get(key, ())]


def _problem(found: Json) -> str:
    if found["metadata"].get("deletionTimestamp"):
        return "is being deleted"
    phase = found.get("status", {}).get("phase")
    if phase in ("Succeeded", "Failed"):
        return f"has ended ({phase})"
    if not found["spec"].get("nodeName"):
        return "has no node yet"
    return ""


def plan(session: Session, name: str, containers: Sequence[str] = ()) -> dict[str, Any]:
    """The document of what a dump of the pod would take. Raises as ``dump``."""
    found = running(session, name, containers)
    agent = session.agent_of(found["spec"]["nodeName"])
    return agent.plan(session.namespace, name, tuple(containers))
