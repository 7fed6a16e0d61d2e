"""What stands against a pod on another node, as far as it can be seen while the old one still runs.

Promises: nothing is touched; whatever is refused is refused with every reason that was found.
Does not: decide what counts; ``model.move`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from agent import errors
from agent.cluster.session import Session
from agent.kube import objects
from agent.kube.connection import Json
from agent.model import access, move
from agent.model import pods as model_pods
from agent.rpc import client

_RIGHTS = (
    ("create", "images", access.API_GROUP),
    ("restore", "images", access.API_GROUP),
    ("get", "pods", ""),
    ("create", "pods", ""),
    ("delete", "pods", ""),
)


def check(session: Session, found: Json, node: str, agent: client.Agent) -> None:
    """Refuse, with every reason, what could not end well; the pod runs and is only looked at."""
    name = str(found["metadata"]["name"])
    if node == found["spec"]["nodeName"]:
        raise errors.InvalidInput(
            f"pod {session.namespace}/{name} already runs on {node}",
            hint="ckpt-agent dump takes an image without moving it",
        )
    reasons = move.objections(found)
    if reasons:
        raise errors.TargetUnsuitable(
            f"pod {session.namespace}/{name} cannot be moved",
            hint="nothing was touched; ckpt-agent dump works without a move",
            reasons=reasons,
        )
    template = model_pods.template(found)
    check_node(session, template, node)
    blockers = agent.plan(session.namespace, name).get("blockers") or []
    if blockers:
        raise errors.TargetUnsuitable(
            f"pod {session.namespace}/{name} cannot be dumped",
            hint=f"see ckpt-agent plan pod/{name} -n {session.namespace}",
            reasons=[f"{each.get('subject')}: {each.get('reason')}" for each in blockers],
        )
    check_admitted(session, template, move.members(found), node, name)


def check_node(session: Session, template: move.Json, node: str) -> None:
    """Return if a pod of ``template`` may run on ``node``, as far as the caller can see.

    Raises:
        errors.TargetUnsuitable: it could not; every reason is told.
    """
    # Looking at nodes is not everybody's right; the scheduler will tell.
    if session.for_another and not session.may(access.Right("get", "nodes", group="")):
        return
    try:
        target = objects.node(session.api, node)
    except errors.Forbidden:
        return
    reasons = move.node_objections(template, target)
    if reasons:
        raise errors.TargetUnsuitable(
            f"the pod could not run on node {node}",
            hint="choose another node, or change what stands against this one",
            reasons=reasons,
        )


def check_own_rights(session: Session, *, dump: bool) -> None:
    """Return if the caller may restore pods here, and dump them if ``dump``. Raises what
    ``check_rights`` does.
    """
    check_rights(
        session,
        [
            access.Right(verb, resource, session.namespace, group=group)
            for verb, resource, group in _RIGHTS
            if dump or (verb, group) != ("create", access.API_GROUP)
        ],
    )


def check_rights(session: Session, wanted: Sequence[access.Right]) -> None:
    """Return if the caller has all of these rights.

    Raises:
        errors.Forbidden: one is missing; every one that is, is named.
    """
    missing = [str(right) for right in wanted if not session.may(right)]
    if missing:
        raise errors.Forbidden(
            "the caller may not do all that a move takes",
            hint="ask for a role that allows it; docs/cli.md shows one",
            reasons=[f"not allowed: {each}" for each in missing],
        )


def check_admitted(
    session: Session, template: Json, members: Collection[str], node: str, name: str
) -> None:
    """Let admission and quota look at the replacement while the pod still runs. A quota that has
    no room for both is no objection: the old pod goes before the new one comes.
    """
    trial = move.trial(
        move.replacement(
            template,
            image=f"{name}@{move.TRIAL_EPOCH}",
            members=members,
            node=node,
            name=move.trial_name(name),
        )
    )
    try:
        made = objects.create_pod(session.api, session.namespace, trial, dry_run=True)
    except errors.Forbidden as exc:
        if "exceeded quota" not in exc.message:
            raise
        return
    reasons = move.not_waiting(made, members)
    if reasons:
        raise errors.TargetUnsuitable(
            f"a replacement of pod {session.namespace}/{name} would not wait for the image",
            hint="nothing was touched; ckpt-agent dump works without a move",
            reasons=reasons,
        )
