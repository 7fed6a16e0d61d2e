"""What a pod says to be checkpointed, and what it carries for it: names that the webhook, the node
agent and the policy must spell alike.

Promises: names and pure readers of them.
Does not: change a pod, or trust what one says: every annotation is the word of whoever made the
pod.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from agent import errors
from agent.model.container import AGENT_DIRECTORY, HOLD

GROUP = "ckpt-agent.dev"

LABEL = f"{GROUP}/checkpoint"
ENABLED = "enabled"

RESTORE = f"{GROUP}/restore"
"""Reserved: the pod is a placeholder and waits; the value is an image's name."""

CONTAINERS = f"{GROUP}/containers"
"""Which containers are meant, names with commas between them; absent: all ordinary ones."""

ENTRYPOINT = f"{GROUP}/entrypoint"
"""What an image runs, for containers that leave ``command`` to it: a JSON object from container
name to list of words (the image's ENTRYPOINT, and its CMD where the container has no ``args``)."""

STORAGE = f"{GROUP}/storage"
"""On a pod or a namespace: which of the agents' storages its images go to, by name
(``storage.py``)."""

HOOKS = f"{GROUP}/hooks"
"""What is done around a checkpoint (``hooks.py``)."""

COORDINATOR = f"{GROUP}/coordinator"
"""On a JobSet for a moment, so that it has changed (``kube.jobsets.fence``)."""

NOT_HELD = f"{GROUP}/not-held"
"""Written by the webhook: which containers start as ordinary ones, and why."""

VOLUME = "ckpt-agent"
INIT_CONTAINER = "ckpt-agent-hold"
DIRECTORY = AGENT_DIRECTORY
RESTORE_VARIABLE = "CKPT_AGENT_RESTORE"
CONTAINER_VARIABLE = "CKPT_AGENT_CONTAINER"

HOLD_IN_IMAGE = "/usr/local/lib/ckpt-agent/hold"
"""Where the agent's image carries it (Dockerfile)."""

HOLD_AUTO = (HOLD, "auto")
"""What stands in front of a container's own command."""

HOLD_HOOK = (HOLD, "hook")
"""What stands in front of a hook's command, so that it does nothing in a placeholder."""

HOLD_RUNNING = (HOLD, "running")
"""Succeeds when a workload runs in the container."""

# A container's name is a DNS label (RFC 1123).
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


def chosen_containers(annotations: Mapping[str, str]) -> tuple[str, ...] | None:
    """The container names of ``CONTAINERS``, or None where all ordinary containers are meant.

    Raises:
        errors.InvalidInput: a name is none, or there is no name.
    """
    text = annotations.get(CONTAINERS)
    if text is None:
        return None
    names = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names or not all(_NAME.fullmatch(name) for name in names):
        raise errors.InvalidInput(
            f"the annotation {CONTAINERS} is not a list of container names",
            hint="write names with commas between them, or remove it to mean all",
        )
    return names


def entrypoints(annotations: Mapping[str, str]) -> dict[str, list[str]]:
    """The command of each container that ``ENTRYPOINT`` names.

    Raises:
        errors.InvalidInput: it is not a JSON object of lists of words.
    """
    text = annotations.get(ENTRYPOINT)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict) or not all(_is_command(words) for words in value.values()):
        raise errors.InvalidInput(
            f"the annotation {ENTRYPOINT} is not a JSON object of commands",
            hint='write {"CONTAINER": ["/path/to/program", "argument"]}',
        )
    return value


def _is_command(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) for word in value)
