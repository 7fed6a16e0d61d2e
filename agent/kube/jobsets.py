"""JobSets of a cluster, and their pods.

Promises: as ``connection``.
Does not: decide what belongs together; ``model.jobset`` does.
"""

from __future__ import annotations

import urllib.parse

from agent.kube import objects
from agent.kube.connection import Connection, Json
from agent.model import jobset


def read(api: Connection, namespace: str, name: str) -> Json:
    """A JobSet. Raises ``errors.NotFound`` naming it, also where the cluster knows no JobSets."""
    quoted = [urllib.parse.quote(part, safe="") for part in (namespace, name)]
    path = f"/apis/{jobset.API}/namespaces/{quoted[0]}/jobsets/{quoted[1]}"
    return api.call("GET", path, f"JobSet {namespace}/{name}")


def pods(api: Connection, namespace: str, name: str) -> list[Json]:
    """Its pods, whatever became of them."""
    return objects.pods(api, namespace, selector=f"{jobset.NAME_LABEL}={name}")
