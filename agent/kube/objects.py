"""The objects of a cluster that a caller looks at or moves: pods, nodes, agents, own rights.

Promises: as ``connection``; a deletion names the uid, so that a pod of the same name that came
later is never deleted.
Does not: decide anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import urllib.parse
from collections.abc import Callable

from agent import errors
from agent.host import clock
from agent.kube.connection import Connection, Json
from agent.model.access import Right
from agent.model.pods import unscheduled

# How often a pod is looked at while something is awaited: short against the seconds it takes.
_LOOK_S = 0.25
# The kubelet needs this long beyond a pod's own grace to tell the API server that it is gone.
_GONE_S = 30.0


@dataclasses.dataclass(frozen=True)
class AgentPod:
    """A pod of the agent's DaemonSet. ``problem`` says why it cannot be asked, "" if it can;
    ``address`` is its own, "" if it has none yet.
    """

    name: str
    node: str
    problem: str
    address: str = ""


def _pods(namespace: str, name: str = "") -> str:
    path = f"/api/v1/namespaces/{urllib.parse.quote(namespace, safe='')}/pods"
    return f"{path}/{urllib.parse.quote(name, safe='')}" if name else path


def pod(api: Connection, namespace: str, name: str) -> Json:
    """A pod. Raises ``errors.NotFound`` naming it, and as ``Connection.call``."""
    return api.call("GET", _pods(namespace, name), f"pod {namespace}/{name}")


def pods(api: Connection, namespace: str, *, selector: str = "", name: str = "") -> list[Json]:
    """The pods of a namespace whose labels match; with ``name`` the one of that name."""
    query = {"labelSelector": selector} if selector else {}
    query |= {"fieldSelector": f"metadata.name={name}"} if name else {}
    what = f"list of pods in {namespace}"
    found = api.call("GET", _pods(namespace), what, query=query or None)
    return list(found.get("items") or ())


def create_pod(api: Connection, namespace: str, body: Json, *, dry_run: bool = False) -> Json:
    """Create a pod; with ``dry_run`` only let every admission and quota look at it."""
    name = body["metadata"]["name"]
    query = {"dryRun": "All"} if dry_run else None
    return api.call("POST", _pods(namespace), f"pod {namespace}/{name}", query=query, body=body)


def delete_pod(api: Connection, namespace: str, name: str, uid: str, grace_s: int | None) -> None:
    """Ask for a pod's deletion; one that is gone, or of another uid, is left as it is."""
    body: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
    if grace_s is not None:
        body["gracePeriodSeconds"] = grace_s
    try:
        api.call("DELETE", _pods(namespace, name), f"pod {namespace}/{name}", body=body)
    except errors.NotFound:
        return
    except errors.Conflict:
        # The precondition: a pod of this name that is not the one meant.
        if _uid(api, namespace, name) == uid:
            raise


def await_gone(
    api: Connection,
    namespace: str,
    name: str,
    uid: str,
    grace_s: float,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Wait until no pod has this name and uid; ``check`` may raise to stop waiting.

    Raises:
        errors.DeadlineExceeded: it was still there after its grace and half a minute.
    """

    def gone() -> bool:
        check()
        with contextlib.suppress(errors.Unreachable):  # it may answer again in time
            return _uid(api, namespace, name) != uid
        return False

    deadline = clock.Deadline.after(grace_s + _GONE_S)
    if not clock.wait_until(gone, deadline, every_s=_LOOK_S):
        raise errors.DeadlineExceeded(
            f"pod {namespace}/{name} was asked to go and is still there",
            hint="its node may not answer; see kubectl describe pod",
        )


def _uid(api: Connection, namespace: str, name: str) -> str | None:
    try:
        return str(pod(api, namespace, name)["metadata"]["uid"])
    except errors.NotFound:
        return None


def await_scheduled(
    api: Connection,
    namespace: str,
    name: str,
    uid: str,
    deadline: clock.Deadline,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Wait until a pod has a node and return it; ``check`` may raise to stop waiting.

    Raises:
        errors.DeadlineExceeded: it has none; the message says why, as the scheduler tells.
        errors.NotFound: it was deleted, or replaced by another.
    """
    found: Json = {}

    def scheduled() -> bool:
        nonlocal found
        check()
        try:
            found = pod(api, namespace, name)
        except errors.Unreachable:  # it may answer again in time
            return False
        if found["metadata"]["uid"] != uid:
            raise errors.NotFound(
                f"pod {namespace}/{name} was replaced by another", hint="see kubectl get pods"
            )
        return bool(found["spec"].get("nodeName"))

    if not clock.wait_until(scheduled, deadline, every_s=_LOOK_S):
        raise errors.DeadlineExceeded(
            f"pod {namespace}/{name} was not scheduled: {unscheduled(found)}",
            hint="make room on the node, or choose another",
        )
    return str(found["spec"]["nodeName"])


def node(api: Connection, name: str) -> Json:
    """A node. Raises ``errors.NotFound`` naming it, and as ``Connection.call``."""
    return api.call("GET", f"/api/v1/nodes/{urllib.parse.quote(name, safe='')}", f"node {name}")


def nodes(api: Connection) -> list[Json]:
    """All nodes."""
    return list(api.call("GET", "/api/v1/nodes", "list of nodes").get("items") or ())


def agents(api: Connection, namespace: str, selector: str) -> list[AgentPod]:
    """The agents' pods that have a node, by node; one that is ready before one that is not, where
    an update has both.
    """
    found = [
        AgentPod(
            each["metadata"]["name"],
            str(each["spec"]["nodeName"]),
            _problem(each),
            str((each.get("status") or {}).get("podIP") or ""),
        )
        for each in pods(api, namespace, selector=selector)
        if each["spec"].get("nodeName")
    ]
    return sorted(found, key=lambda each: (each.node, each.problem != "", each.name))


def _problem(found: Json) -> str:
    if found["metadata"].get("deletionTimestamp"):
        return "is being deleted"
    status = found.get("status", {})
    if any(
        each.get("type") == "Ready" and each.get("status") == "True"
        for each in status.get("conditions") or ()
    ):
        return ""
    for each in status.get("containerStatuses") or ():
        waiting = each.get("state", {}).get("waiting")
        if waiting:
            return f"is not ready: {waiting.get('reason', 'waiting')}"
    return f"is not ready ({status.get('phase', 'unknown')})"


def config_map(api: Connection, namespace: str, name: str) -> dict[str, str]:
    """The data of a ConfigMap."""
    path = f"/api/v1/namespaces/{namespace}/configmaps/{name}"
    found = api.call("GET", path, f"ConfigMap {namespace}/{name}").get("data") or {}
    return {str(key): str(value) for key, value in found.items()}


def may(api: Connection, right: Right) -> bool:
    """Whether the caller has a right, as the API server's own review says."""
    body = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": right.attributes()},
    }
    path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
    answer = api.call("POST", path, "review of the caller's rights", body=body)
    return bool(answer.get("status", {}).get("allowed"))


def version(api: Connection) -> str:
    """What the API server calls itself."""
    return str(api.call("GET", "/version", "version of the API server").get("gitVersion", ""))
