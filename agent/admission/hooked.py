"""What a pod's owner is told of the pod's hooks when it is made: early enough to change them.

Promises: a warning where the hooks will keep the pod from being checkpointed, with the way out.
Does not: change or reject the pod.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import errors
from agent.model import hooks, pods

# An API server cuts warnings beyond 256 characters where there are several.
_CHARACTERS = 250


def warnings(pod: Mapping[str, Any]) -> tuple[str, ...]:
    """Why hooks will keep the pod from being checkpointed, if they will."""
    found = pods.read(pod)
    try:
        hooks.read(found.annotations, found.containers)
    except errors.InvalidInput as exc:
        said = f"ckpt-agent: this pod cannot be checkpointed: {exc.message}; {exc.hint}"
        return (said[:_CHARACTERS],)
    return ()
