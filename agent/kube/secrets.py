"""Small objects that carry certificates: Secrets, ConfigMaps, and the webhook's authority.

Promises: a write says which version it is based on, so that of two writers one is told
(``errors.Conflict``) instead of undoing the other's; labels and fields that are not ours are kept;
no content is ever in a message or a ``repr``.
Does not: list or watch: every object is read by its name, so that rights can be granted by name.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping

from agent import errors
from agent.kube.connection import Connection, Json

# These calls are made in the background, and again soon: no reason to wait long for one.
_READ_S = 10.0


@dataclasses.dataclass(frozen=True)
class Stored:
    """A Secret or ConfigMap as it was read: ``data`` by key, decoded."""

    data: Mapping[str, bytes] = dataclasses.field(repr=False)
    found: Json = dataclasses.field(repr=False)


def read_secret(connection: Connection, namespace: str, name: str) -> Stored | None:
    """Return the Secret, or None if there is none. Raises what ``Connection.call`` does."""
    found = _get(connection, _path("secrets", namespace, name), f"secret {namespace}/{name}")
    if found is None:
        return None
    return Stored({key: _decoded(text) for key, text in (found.get("data") or {}).items()}, found)


def write_secret(
    connection: Connection,
    namespace: str,
    name: str,
    data: Mapping[str, bytes],
    before: Stored | None,
) -> None:
    """Make the Secret (of the type for TLS) hold ``data``, if it still is as ``before``.

    Raises:
        errors.Conflict: somebody else changed or made it meanwhile.
    """
    encoded = {key: base64.b64encode(value).decode() for key, value in data.items()}
    kind = {"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls"}
    _put(connection, "secrets", namespace, name, before, kind, encoded)


def read_config_map(connection: Connection, namespace: str, name: str) -> Stored | None:
    """Return the ConfigMap, or None if there is none. Raises what ``Connection.call`` does."""
    found = _get(connection, _path("configmaps", namespace, name), f"configmap {namespace}/{name}")
    if found is None:
        return None
    return Stored({key: text.encode() for key, text in (found.get("data") or {}).items()}, found)


def write_config_map(
    connection: Connection,
    namespace: str,
    name: str,
    data: Mapping[str, bytes],
    before: Stored | None,
) -> None:
    """Make the ConfigMap hold ``data`` (UTF-8), if it still is as ``before``.

    Raises:
        errors.Conflict: somebody else changed or made it meanwhile.
    """
    texts = {key: value.decode() for key, value in data.items()}
    kind = {"apiVersion": "v1", "kind": "ConfigMap"}
    _put(connection, "configmaps", namespace, name, before, kind, texts)


def trust(connection: Connection, name: str, authorities: bytes) -> bool:
    """Make the API server trust ``authorities`` (PEM) when it calls the webhooks of the
    MutatingWebhookConfiguration ``name``. Return whether that is new.

    Raises:
        errors.NotFound: there is no such configuration.
        errors.Conflict: somebody else changed it meanwhile.
    """
    path = f"/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations/{name}"
    what = f"mutatingwebhookconfiguration {name}"
    found = connection.call("GET", path, what, read_s=_READ_S)
    wanted = base64.b64encode(authorities).decode()
    old = [webhook for webhook in found.get("webhooks") or [] if not _trusts(webhook, wanted)]
    if not old:
        return False
    for webhook in old:
        webhook.setdefault("clientConfig", {})["caBundle"] = wanted
    connection.call("PUT", path, what, body=found, read_s=_READ_S)
    return True


def _trusts(webhook: Json, wanted: str) -> bool:
    return bool((webhook.get("clientConfig") or {}).get("caBundle") == wanted)


def _path(kind: str, namespace: str, name: str = "") -> str:
    return f"/api/v1/namespaces/{namespace}/{kind}" + (f"/{name}" if name else "")


def _get(connection: Connection, path: str, what: str) -> Json | None:
    try:
        return connection.call("GET", path, what, read_s=_READ_S)
    except errors.NotFound:
        return None


def _put(
    connection: Connection,
    plural: str,
    namespace: str,
    name: str,
    before: Stored | None,
    kind: Json,
    data: Mapping[str, str],
) -> None:
    what = f"{plural} {namespace}/{name}"
    if before is None:
        labels = {"app.kubernetes.io/part-of": "ckpt-agent"}
        body = kind | {"metadata": {"name": name, "labels": labels}, "data": dict(data)}
        connection.call("POST", _path(plural, namespace), what, body=body, read_s=_READ_S)
    else:
        body = before.found | {"data": dict(data)}
        path = _path(plural, namespace, name)
        connection.call("PUT", path, what, body=body, read_s=_READ_S)


def _decoded(text: str) -> bytes:
    """What the API server encoded; nothing if somebody managed to store something else."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
