"""Whether a cluster can checkpoint and restore for this caller, line by line.

Promises: nothing is changed; a line that is not ok says what follows and what cures it; a part that
cannot be asked is a line, never the end of the check-up.
Does not: examine nodes itself; their agents do.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent import errors
from agent.cluster.session import Session
from agent.kube import objects
from agent.model import access, checkup

# A right and what does not work without it. The namespace is "" for the caller's own, else the
# agents'.
_OWN = (
    ("create", "images", access.API_GROUP, "", "dump and migrate"),
    ("restore", "images", access.API_GROUP, "", "restore and migrate"),
    ("list", "images", access.API_GROUP, "", "list"),
    ("get", "images", access.API_GROUP, "", "show and verify"),
    ("delete", "images", access.API_GROUP, "", "delete and prune"),
    ("get", "pods", "", "", "dump, restore and migrate"),
    ("create", "pods", "", "", "restore --node and migrate"),
    ("delete", "pods", "", "", "migrate"),
)
_AGENTS = (
    ("get", "configmaps", "", "", "every verb: the agents' authority cannot be read"),
    ("list", "pods", "", "", "every verb: no agent is found"),
    ("create", "pods", "", "portforward", "every verb: no agent is reached"),
)
_CURE = "ask for a role that allows it; docs/cli.md shows one"


def examine(session: Session) -> Iterator[checkup.Check]:
    """Yield the lines, as they become known."""
    try:
        found = objects.version(session.api)
    except errors.CkptError as exc:
        yield _failed("api-server", exc, "nothing can be asked of this cluster")
        return
    yield checkup.Check("api-server", "ok", f"{found} at {session.api.url}, {session.api.name}")
    yield from _rights(session)
    yield from _agents(session)


def _failed(name: str, exc: errors.CkptError, consequence: str) -> checkup.Check:
    return checkup.Check(name, "missing", exc.message, consequence, exc.hint or _CURE)


def _rights(session: Session) -> Iterator[checkup.Check]:
    direct = bool(session.settings.agent_address)
    rows = [(session.namespace, row) for row in _OWN]
    if not direct:
        rows += [(session.settings.agent_namespace, row) for row in _AGENTS]
    for namespace, (verb, resource, group, subresource, without) in rows:
        right = access.Right(verb, resource, namespace, group=group, subresource=subresource)
        name = f"right {right}"
        try:
            allowed = objects.may(session.api, right)
        except errors.CkptError as exc:
            yield _failed(name, exc, "whether the caller has this right is not known")
            return
        if allowed:
            yield checkup.Check(name, "ok", "allowed")
        else:
            yield checkup.Check(name, "degraded", "not allowed", f"does not work: {without}", _CURE)


def _agents(session: Session) -> Iterator[checkup.Check]:
    try:
        agents = session.agents()
    except errors.CkptError as exc:
        yield _failed("agents", exc, "nothing can be dumped or restored in this cluster")
        return
    served = {each.node for each in agents}
    try:
        bare = [each["metadata"]["name"] for each in objects.nodes(session.api)]
    except errors.CkptError as exc:
        yield checkup.Check(
            "nodes", "degraded", exc.message, "a node without an agent is not seen here", _CURE
        )
        bare = []
    for node in bare:
        if node not in served:
            yield checkup.Check(
                f"{node}/agent",
                "degraded",
                "no agent runs there",
                "pods on this node cannot be dumped, and none can be restored onto it",
                "let the DaemonSet ckpt-agent-node select and tolerate the node",
            )
    for each in agents:
        yield from _agent(session, each)


def _agent(session: Session, pod: objects.AgentPod) -> Iterator[checkup.Check]:
    name = f"{pod.node}/agent"
    if pod.problem:
        yield checkup.Check(
            name,
            "missing",
            f"pod {pod.name} {pod.problem}",
            "pods on this node cannot be dumped, and none can be restored onto it",
            f"kubectl -n {session.settings.agent_namespace} describe pod {pod.name}",
        )
        return
    try:
        _, checks = session.agent_of(pod.node).examine()
    except errors.Forbidden as exc:
        yield checkup.Check(
            name,
            "degraded",
            f"ready, but {exc.message}",
            "what the node itself lacks is not seen here",
            exc.hint or _CURE,
        )
        return
    except errors.CkptError as exc:
        yield _failed(name, exc, "pods on this node cannot be dumped or restored")
        return
    yield checkup.Check(name, "ok", f"pod {pod.name} is ready")
    for each in checks:
        yield checkup.Check(
            f"{pod.node}/{each.name}",
            _status(each.status),
            each.found,
            each.consequence,
            each.cure,
        )


def _status(text: str) -> checkup.Status:
    """What an agent of a later version might call otherwise is at least not ok."""
    return "ok" if text == "ok" else "missing" if text == "missing" else "degraded"
