"""JobSets of a cluster, and their pods.

Promises: as ``connection``; a change names the uid, so that a JobSet of the same name that came
later is never changed.
Does not: decide what belongs together; ``model.jobset`` does.
"""

from __future__ import annotations

import urllib.parse
from typing import Any

from agent import errors
from agent.kube import objects
from agent.kube.connection import Connection, Json
from agent.model import access, jobset, optin
from agent.model import intent as model_intent
from agent.model.intent import Intent

# A webhook is waited for 3 s by its API server (deploy/), and a request that broke is sent again.
_WEBHOOK_S = 1.2


def _path(namespace: str, name: str = "") -> str:
    path = f"/apis/{jobset.API}/namespaces/{urllib.parse.quote(namespace, safe='')}/jobsets"
    return f"{path}/{urllib.parse.quote(name, safe='')}" if name else path


def read(api: Connection, namespace: str, name: str) -> Json:
    """A JobSet. Raises ``errors.NotFound`` naming it, also where the cluster knows no JobSets."""
    return api.call("GET", _path(namespace, name), f"JobSet {namespace}/{name}")


def intent(api: Connection, namespace: str, name: str) -> Intent | None:
    """What a JobSet shall come back as, for a webhook that is waited for: None if it just runs, or
    is not there.

    Raises:
        errors.InvalidInput: its annotation does not make sense.
        errors.Forbidden | errors.Unreachable: it cannot be looked at.
    """
    what = f"JobSet {namespace}/{name}"
    try:
        found = api.call("GET", _path(namespace, name), what, read_s=_WEBHOOK_S)
    except errors.NotFound:
        return None
    text = (found["metadata"].get("annotations") or {}).get(optin.RESTORE)
    return None if text is None else model_intent.read(str(text))


def create(api: Connection, namespace: str, body: Json) -> Json:
    """Create a JobSet. Raises ``errors.Conflict`` if there is one of its name."""
    what = f"JobSet {namespace}/{body['metadata']['name']}"
    return api.call("POST", _path(namespace), what, body=body)


def delete(api: Connection, namespace: str, name: str, uid: str) -> None:
    """Ask for a JobSet's deletion, with all that it made."""
    body = {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "preconditions": {"uid": uid},
        "propagationPolicy": "Background",
    }
    api.call("DELETE", _path(namespace, name), f"JobSet {namespace}/{name}", body=body)


def change(
    api: Connection,
    namespace: str,
    name: str,
    uid: str,
    *,
    suspend: bool | None = None,
    annotations: dict[str, str | None] | None = None,
) -> Json:
    """Suspend or resume a JobSet, and set its annotations (None removes one), in one go.

    Raises:
        errors.Conflict: the one of this uid is no more.
    """
    metadata: dict[str, Any] = {"uid": uid}
    if annotations:
        metadata["annotations"] = annotations
    body: Json = {"metadata": metadata}
    if suspend is not None:
        body["spec"] = {"suspend": suspend}
    return api.call("PATCH", _path(namespace, name), f"JobSet {namespace}/{name}", body=body)


def pods(api: Connection, namespace: str, name: str) -> list[Json]:
    """The pods that its Jobs made, whatever became of them."""
    found = objects.pods(api, namespace, selector=f"{jobset.NAME_LABEL}={name}")
    return [each for each in found if jobset.made_by_job(each)]


def right(verb: str, namespace: str) -> access.Right:
    """The right to do ``verb`` to JobSets of a namespace."""
    return access.Right(verb, "jobsets", namespace, group=jobset.API_GROUP)
