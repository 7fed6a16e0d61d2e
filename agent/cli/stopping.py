"""How the memory of a member came into its image, for people.

Promises: pure; images of before this was noted do not tell.
Does not: say how long the member stood still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_WAYS = {
    "write-protect": "asynchronous write protection",
    "soft-dirty": "soft-dirty bits",
    "none": "comparing all of it",
}


def told(stop: Mapping[str, Any]) -> list[str]:
    """A line about the ``stop`` of a member's document, if it tells anything."""
    if stop.get("path") == "precopy":
        line = "Memory copied while it ran"
        if stop.get("heldBackSeconds"):
            line += f", held back for {stop['heldBackSeconds']:.1f} s for the job's speed"
        if stop.get("hurried"):
            line += ", in the end at full speed to be in time"
        if stop.get("unreadBecause"):
            line += f", but for what was left for the end since {stop['unreadBecause']}"
        return [line, *_tracked(stop)]
    because = f": {stop['because']}" if stop.get("because") else ""
    return [f"Memory copied while it stood still{because}"] if stop.get("path") else []


def _tracked(stop: Mapping[str, Any]) -> list[str]:
    """How it was known what they wrote meanwhile, and why not in a better way."""
    ways = sorted(stop.get("tracked", {}).items())
    if not ways:
        return []
    found = ", ".join(
        _WAYS.get(kind, kind) + (f" (processes: {processes})" if len(ways) > 1 else "")
        for kind, processes in ways
    )
    because = "; ".join(stop.get("trackedBecause", ()))
    return [f"What it wrote known by {found}" + (f": {because}" if because else "")]
