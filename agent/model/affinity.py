"""Where a pod may run: its required node affinity, narrowed to one node for the scheduler.

Promises: pure; whatever else the pod requires or prefers stays, and what pinned it before goes.
Does not: know whether the node has room.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = Mapping[str, Any]

# The one field of a node that an affinity can name.
_PIN = "metadata.name"
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def terms(spec: Json) -> list[Json]:
    """The alternatives of a pod's required node affinity."""
    required = ((spec.get("affinity") or {}).get("nodeAffinity") or {}).get(_REQUIRED) or {}
    return list(required.get("nodeSelectorTerms") or ())


def pinned(spec: Json, node: str) -> dict[str, Any]:
    """The affinity of a pod with ``spec`` that may run on ``node`` only."""
    affinity = spec.get("affinity") or {}
    node_affinity = affinity.get("nodeAffinity") or {}
    required = node_affinity.get(_REQUIRED) or {}
    alternatives = [
        {**term, "matchFields": _with_pin(term.get("matchFields") or (), node)}
        for term in terms(spec) or [{}]
    ]
    narrowed = {**required, "nodeSelectorTerms": alternatives}
    return {**affinity, "nodeAffinity": {**node_affinity, _REQUIRED: narrowed}}


def _with_pin(fields: Any, node: str) -> list[Json]:
    kept = [each for each in fields if each.get("key") != _PIN]
    return [*kept, {"key": _PIN, "operator": "In", "values": [node]}]
