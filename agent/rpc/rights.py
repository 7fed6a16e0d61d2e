"""Which right each method of the API needs.

Promises: a method that is not listed here is refused; names are checked before anybody is asked
about them, so that none can mean more than one namespace.
Does not: ask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from agent import errors
from agent.model import ids
from agent.model.access import Right
from agent.rpc.v1 import epochs_pb2

IMAGES = "images"
NODES = "nodes"


def _images(verb: str) -> Callable[[Any, str], Right]:
    def needed(request: Any, node: str) -> Right:
        namespace = ids.namespace_name(request.namespace)
        # A role may name single images, but only where the whole name is asked for.
        image = getattr(request, "image", "")
        return Right(verb, IMAGES, namespace, image)

    return needed


def _taking_part(request: Any, node: str) -> Right:
    restores = request.course == epochs_pb2.COURSE_RESTORE
    return _of_epoch("restore")(request, node) if restores else _images("create")(request, node)


def _of_epoch(verb: str) -> Callable[[Any, str], Right]:
    def needed(request: Any, node: str) -> Right:
        namespace = ids.namespace_name(request.namespace)
        group, epoch = ids.group_name(request.group), ids.epoch_id(request.epoch)
        return Right(verb, IMAGES, namespace, ids.image_name(group, epoch))

    return needed


_RIGHTS: dict[str, Callable[[Any, str], Right]] = {
    "Dump": _images("create"),
    "PlanDump": _images("create"),
    "Restore": _images("restore"),
    "ListImages": _images("list"),
    "GetImage": _images("get"),
    "VerifyImage": _images("get"),
    # Neither "get", which shows no memory, nor "restore", which puts memory to use where the
    # namespace's rules hold: an archive takes all secrets out of the cluster.
    "ExportImage": _images("export"),
    "ImportImage": _images("create"),
    "DeleteImage": _images("delete"),
    "PruneImages": _images("delete"),
    "NewEpoch": _images("create"),
    "TakePart": _taking_part,
    "DecideEpoch": _images("create"),
    "DecideRestore": _of_epoch("restore"),
    "Examine": lambda request, node: Right("get", NODES, name=node),
}


def needed(method: str, request: Any, node: str) -> Right:
    """The right that ``request`` to a method of the agent on ``node`` needs.

    Raises:
        errors.InvalidInput: it names no namespace, or none that can be.
        errors.Forbidden: there is no right for that method.
    """
    find = _RIGHTS.get(method)
    if find is None:
        raise errors.Forbidden(f"nobody may call {method}", hint="use a method of the API")
    return find(request, node)
