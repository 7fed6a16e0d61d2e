"""JobSets of a cluster, and their pods.

Promises: as ``connection``; a change names the uid, so that a JobSet of the same name that came
later is never changed, and the version that was looked at right before: what was sent by somebody
who was stopped meanwhile changes nothing if the JobSet has changed since.
Does not: decide what belongs together; ``model.jobset`` does.
"""

from __future__ import annotations

import secrets
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
# A JobSet's status changes a few times when its pods come or go, milliseconds apart.
_TRIES = 8


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
    """Suspend or resume a JobSet, and set its annotations (None removes one), in one go. If it
    changes in this moment (its controller tells its status, say) it is looked at again, and whoever
    guards ``api`` is asked again.

    Raises:
        errors.NotFound: there is none.
        errors.Conflict: the one of this uid is no more, or it changes all the time.
    """
    metadata: dict[str, Any] = {"uid": uid}
    if annotations:
        metadata["annotations"] = annotations
    body: Json = {"metadata": metadata}
    if suspend is not None:
        body["spec"] = {"suspend": suspend}
    what, tries = f"JobSet {namespace}/{name}", 0
    while True:
        tries += 1
        seen = read(api, namespace, name)["metadata"]
        metadata["resourceVersion"] = seen["resourceVersion"]
        try:
            return api.call("PATCH", _path(namespace, name), what, body=body)
        except errors.Conflict:
            if tries == _TRIES or seen["uid"] != uid:
                raise


def fence(api: Connection, namespace: str, name: str, uid: str) -> None:
    """Have every ``change`` fail that somebody else looked at before now and whose request is still
    under way. Leaves nothing on the JobSet. Raises as ``change``.
    """
    mark = {optin.COORDINATOR: secrets.token_hex(8)}
    change(api, namespace, name, uid, annotations={**mark})
    change(api, namespace, name, uid, annotations=dict.fromkeys(mark))


def pods(api: Connection, namespace: str, name: str) -> list[Json]:
    """The pods that its Jobs made, whatever became of them."""
    found = objects.pods(api, namespace, selector=f"{jobset.NAME_LABEL}={name}")
    return [each for each in found if jobset.made_by_job(each)]


def right(verb: str, namespace: str) -> access.Right:
    """The right to do ``verb`` to JobSets of a namespace."""
    return access.Right(verb, "jobsets", namespace, group=jobset.API_GROUP)
