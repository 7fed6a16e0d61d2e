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


def _asked(verb: str) -> Callable[[Any, str], Right]:
    """Of a request that begins an operation. What else it takes the service asks for itself."""

    def needed(request: Any, node: str) -> Right:
        return Right(verb, IMAGES, ids.namespace_name(request.asking.namespace))

    return needed


_RIGHTS: dict[tuple[str, str], Callable[[Any, str], Right]] = {
    ("Node", "Dump"): _images("create"),
    ("Node", "Watch"): _images("create"),
    ("Node", "PlanDump"): _images("create"),
    ("Node", "Restore"): _images("restore"),
    ("Node", "ListImages"): _images("list"),
    ("Node", "GetImage"): _images("get"),
    ("Node", "VerifyImage"): _images("get"),
    # Neither "get", which shows no memory, nor "restore", which puts memory to use where the
    # namespace's rules hold: an archive takes all secrets out of the cluster.
    ("Node", "ExportImage"): _images("export"),
    ("Node", "ImportImage"): _images("create"),
    ("Node", "DeleteImage"): _images("delete"),
    ("Node", "PruneImages"): _images("delete"),
    ("Epochs", "NewEpoch"): _images("create"),
    ("Epochs", "TakePart"): _taking_part,
    ("Epochs", "DecideEpoch"): _images("create"),
    ("Epochs", "DecideRestore"): _of_epoch("restore"),
    ("Node", "Examine"): lambda request, node: Right("get", NODES, name=node),
    ("Coordinator", "CreateEpoch"): _asked("create"),
    ("Coordinator", "Restore"): _asked("restore"),
    ("Coordinator", "Migrate"): _asked("restore"),
    ("Coordinator", "GetOperation"): _images("get"),
    ("Coordinator", "WatchOperation"): _images("get"),
    # And what the operation needed, which the service asks for.
    ("Coordinator", "CancelOperation"): _images("get"),
    ("Coordinator", "ListOperations"): _images("list"),
    ("Coordinator", "PlanEpoch"): _images("create"),
    ("Coordinator", "ListImages"): _images("list"),
    ("Coordinator", "GetImage"): _images("get"),
}


def needed(service: str, method: str, request: Any, node: str) -> Right:
    """The right that ``request`` to a method of the API needs, of the agent on ``node`` or of the
    coordinator.

    Raises:
        errors.InvalidInput: it names no namespace, or none that can be.
        errors.Forbidden: there is no right for that method.
    """
    find = _RIGHTS.get((service, method))
    if find is None:
        raise errors.Forbidden(f"nobody may call {method}", hint="use a method of the API")
    return find(request, node)
