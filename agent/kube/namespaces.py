"""What a namespace says of itself.

Promises: as ``connection``.
Does not: keep anything: what is asked for is as the API server has it now.
"""

from __future__ import annotations

import urllib.parse

from agent import errors
from agent.kube.connection import Connection, Json
from agent.model import optin

# A dump waits for it.
_CALL_S = 5.0


def exists(api: Connection, name: str) -> bool:
    """Whether there is a namespace ``name``. Raises as ``Connection.call``."""
    try:
        _get(api, name)
    except errors.NotFound:
        return False
    return True


def read_annotations(api: Connection, name: str) -> dict[str, str]:
    """The annotations of ours that the namespace ``name`` has. Raises as ``Connection.call``."""
    metadata = _get(api, name).get("metadata") or {}
    return {
        str(key): str(value)
        for key, value in (metadata.get("annotations") or {}).items()
        if str(key).startswith(f"{optin.GROUP}/")
    }


def _get(api: Connection, name: str) -> Json:
    path = f"/api/v1/namespaces/{urllib.parse.quote(name, safe='')}"
    return api.call("GET", path, f"namespace {name}", read_s=_CALL_S)
