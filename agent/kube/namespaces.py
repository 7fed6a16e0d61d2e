"""What a namespace says of itself.

Promises: as ``connection``.
Does not: keep anything: what is asked for is as the API server has it now.
"""

from __future__ import annotations

import urllib.parse

from agent.kube.connection import Connection
from agent.model import optin

# A dump waits for it.
_CALL_S = 5.0


def read_annotations(api: Connection, name: str) -> dict[str, str]:
    """The annotations of ours that the namespace ``name`` has. Raises as ``Connection.call``."""
    path = f"/api/v1/namespaces/{urllib.parse.quote(name, safe='')}"
    found = api.call("GET", path, f"namespace {name}", read_s=_CALL_S)
    metadata = found.get("metadata") or {}
    return {
        str(key): str(value)
        for key, value in (metadata.get("annotations") or {}).items()
        if str(key).startswith(f"{optin.GROUP}/")
    }
