"""Images whose namespace is gone: a line of the check-up.

They are never removed by themselves: a namespace may be gone by mistake, and its images are then
what is left of its jobs. But they take room, and whoever makes a namespace of that name anew may
read them, so an administrator has to hear of them.

Promises: nothing is changed; what cannot be found out is a line as well.
Does not: remove anything; ``ckpt-agent delete`` and ``prune`` do, in a namespace that is gone too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from agent import errors
from agent.model import ids
from agent.model.checkup import Check
from agent.node.stores import NamespaceStores

_NAME = "namespaces"


def examine(storages: Mapping[str, NamespaceStores], exists: Callable[[str], bool]) -> Check:
    """Look for stores that hold images of namespaces that do not exist."""
    try:
        held = {name for stores in storages.values() for name in stores.namespaces()}
        gone = sorted(name for name in held if not exists(name))
        left = [name for name in gone if any(_images(each, name) for each in storages.values())]
    except errors.CkptError as exc:
        return Check(_NAME, "degraded", exc.message, "images of none may be there", exc.hint)
    if not left:
        return Check(_NAME, "ok", f"{len(held)} have a store")
    return Check(
        _NAME,
        "degraded",
        f"images of namespaces that do not exist: {', '.join(left)}",
        "they take room, and whoever makes a namespace of that name may read and restore them",
        f"ckpt-agent list -n {left[0]}, then ckpt-agent delete each of them",
    )


def _images(stores: NamespaceStores, name: ids.Namespace) -> bool:
    try:
        return bool(stores.open(name, create=False).epochs())
    except errors.NotFound:
        return False
