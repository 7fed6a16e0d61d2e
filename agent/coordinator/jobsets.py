"""Checkpoints of JobSets: who belongs to one, and what its image tells of it.

Promises: as ``checkpoint``.
Does not: restore; ``jobsetrestore`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint
from agent.coordinator.machine import State
from agent.kube import jobsets
from agent.model import jobset
from agent.model import storage as model_storage
from agent.model.protocol import EVACUATE, LEAVE_RUNNING
from agent.rpc import epochclient


def dump(
    session: Session,
    name: str,
    *,
    now_s: float,
    storage: str = "",
    stop: bool = False,
    control: checkpoint.Control | None = None,
    watch: Callable[[State], None] = lambda state: None,
    named: Callable[[epochclient.Epoch], None] = lambda epoch: None,
    engine: str = "",
) -> checkpoint.Checkpoint:
    """Checkpoint all pods of the JobSet ``name`` at one instant. ``stop``: they are ended once that
    is committed, and wait where they are. ``named`` and ``engine`` as ``checkpoint.run`` has them.

    Raises:
        errors.NotFound | errors.TargetUnsuitable: there is none, or not all of its pods run.
        errors.InvalidInput: its pods ask for different storages, and ``storage`` is "".
        errors.CkptError: as ``checkpoint.run``.
    """
    api, namespace = session.api, session.namespace
    found = jobsets.read(api, namespace, name)
    pods = jobsets.pods(api, namespace, name)
    made = jobset.membership(found, pods)
    members = members_of(made)
    if not members:
        raise errors.TargetUnsuitable(f"JobSet {namespace}/{name} has no pods")
    taking = {each.uid for each in members}
    said = {
        str(each["metadata"]["name"]): each["metadata"].get("annotations") or {}
        for each in pods
        if each["metadata"]["uid"] in taking
    }
    facts: dict[str, Any] = {"jobset": name, **made.facts}
    # The agents ask it of their caller, which may be more than whom this is done for.
    if not session.for_another or session.may(jobsets.right("create", namespace)):
        facts[jobset.TEMPLATE] = jobset.template(found)
    return checkpoint.run(
        session,
        jobset.group(name),
        members,
        EVACUATE if stop else LEAVE_RUNNING,
        facts=facts,
        now_s=now_s,
        storage=storage or model_storage.agreed(said),
        control=control,
        watch=watch,
        named=named,
        engine=engine,
    )


def members_of(made: jobset.Membership) -> list[checkpoint.Member]:
    """Those who take part."""
    return [checkpoint.member(each) for each in made.members]
