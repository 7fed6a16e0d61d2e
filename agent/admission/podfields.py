"""Reading a pod as it came over the network: what is not as the API says is told, not met later.

Promises: what is absent or null is empty.
Does not: check more of a pod than is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import errors


def mapping(parent: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the object ``parent[key]``. Raises ``errors.InvalidInput`` if it is something else."""
    value = parent.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise errors.InvalidInput(f"{key} of the pod is not an object", hint="send a v1 Pod")
    return value


def entries(parent: Mapping[str, Any], key: str, kind: type = Mapping) -> list[Any]:
    """Return the list ``parent[key]``, whose entries are of ``kind``. Raises as ``mapping``."""
    value = parent.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, kind) for entry in value):
        raise errors.InvalidInput(f"{key} of the pod is not a list", hint="send a v1 Pod")
    return value
