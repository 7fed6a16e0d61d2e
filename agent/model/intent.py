"""What a JobSet shall come back as: an annotation on the JobSet itself, never in its pod templates.

While it is there, every opted-in pod that a Job of the JobSet makes waits for one image, and each
may be meant for a node. A template cannot say that: JobSet's restarts use it unchanged, and it has
no place for what differs between pods.

Promises: pure; what does not make sense is told, never guessed.
Does not: trust it: nothing is restored into a pod that waits but by somebody who may restore.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from agent import errors
from agent.model import ids, jobset, optin

# The API server takes 256 KiB of annotations; this leaves room for those of others.
_CHARACTERS = 192 << 10


@dataclasses.dataclass(frozen=True)
class Intent:
    """``image`` is GROUP@EPOCH, ``storage`` where it lies ("" wherever it does), ``nodes`` the node
    of each pod by its identity; one that is not there goes where the scheduler likes. ``only`` is
    the name of the one pod that is meant, one that is just tried: JobSet's own pods start as usual.
    """

    image: str
    storage: str = ""
    nodes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    only: str = ""

    def means(self, pod: Mapping[str, Any]) -> bool:
        """Whether ``pod``, which has the JobSet's label, shall wait."""
        if self.only:
            return bool(pod["metadata"].get("name") == self.only)
        return jobset.made_by_job(pod)

    def text(self) -> str:
        """The annotation's value.

        Raises:
            errors.InvalidInput: it has no room for so many pods.
        """
        value = {"image": self.image, "storage": self.storage, "nodes": dict(self.nodes)}
        value |= {"only": self.only} if self.only else {}
        made = json.dumps(value, sort_keys=True, separators=(",", ":"))
        if len(made) > _CHARACTERS:
            raise errors.InvalidInput(
                f"an annotation has no room for the nodes of {len(self.nodes)} pods",
                hint="name no nodes: the scheduler chooses",
            )
        return made


def read(text: str) -> Intent:
    """The intent that an annotation says.

    Raises:
        errors.InvalidInput: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _unusable("it is not JSON") from exc
    if not isinstance(value, dict):
        raise _unusable("it is not an object")
    image, storage, only = (value.get(key, "") for key in ("image", "storage", "only"))
    nodes = value.get("nodes") or {}
    words = (image, storage, only)
    if not all(isinstance(each, str) for each in words) or not isinstance(nodes, dict):
        raise _unusable("image, storage, nodes or only is of another kind")
    if not all(isinstance(node, str) and node for node in nodes.values()):
        raise _unusable("a node is not a name")
    group, at, epoch = image.rpartition("@")
    if not at:
        raise _unusable(f"{image!r} is not an image")
    return Intent(ids.image_name(ids.group_name(group), ids.epoch_id(epoch)), storage, nodes, only)


def _unusable(problem: str) -> errors.InvalidInput:
    return errors.InvalidInput(
        f"the JobSet does not say what it shall come back as: {problem}",
        hint=f"run ckpt-agent restore again, or remove the annotation {optin.RESTORE} from it",
    )
