"""This host's facts for a check-up: what is there, what can be used, what was left behind.

Promises: changes nothing that outlives it; what cannot be found out is reported as found, not
raised.
Does not: judge (model/checkup.py does), or mend.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from agent import errors
from agent.host import kernel
from agent.model import checkup
from agent.store.repository import Store
from agent.volumes.base import Space

# The API server sends at least a bookmark a minute.
_STALE_S = 150.0


@dataclasses.dataclass(frozen=True)
class Place:
    """A place for images. ``store`` is None where each namespace has one of its own; ``name`` is
    "" for the one that is used where nothing is said.
    """

    url: str
    space: Callable[[], Space]
    store: Callable[[], Store] | None
    name: str = ""


def examine(
    *,
    criu: Callable[[], checkup.Criu],
    places: Sequence[Place],
    work_dir: str,
    leftovers: Callable[[], Sequence[str]],
) -> tuple[checkup.Check, ...]:
    """Look at everything and judge it. The callables open what is named; each may raise any
    ``errors.CkptError``, which becomes a line of the check-up.
    """
    found: checkup.Criu | errors.CkptError
    try:
        found = criu()
    except errors.CkptError as exc:
        found = exc
    return checkup.judge(
        checkup.Host(
            kernel=kernel.probe(),
            criu=found,
            root=os.geteuid() == 0,
            work_dir=_folder(work_dir),
            stores=tuple(_store(place) for place in places),
            leftovers=_leftovers(leftovers),
        )
    )


class Watch(Protocol):
    """This node's pods (agent.kube.pods)."""

    @property
    def stale_s(self) -> float:
        """Seconds since the API server was last heard."""

    def check_synced(self) -> None:
        """Raise unless it has told all pods once."""


def examine_cluster(runtime: Callable[[], object], watch: Watch) -> tuple[checkup.Check, ...]:
    """Look at what a node of a cluster needs besides: its container runtime and the API server."""
    return (_runtime(runtime), _api_server(watch))


def _runtime(runtime: Callable[[], object]) -> checkup.Check:
    name = "container-runtime"
    try:
        return checkup.Check(name, "ok", str(runtime()))
    except errors.CkptError as exc:
        return checkup.Check(
            name, "missing", exc.message, "no container of this node is found", exc.hint
        )


def _api_server(watch: Watch) -> checkup.Check:
    name = "api-server"
    try:
        watch.check_synced()
    except errors.CkptError as exc:
        return checkup.Check(name, "missing", exc.message, "no pod is known", exc.hint)
    stale_s = watch.stale_s
    if stale_s > _STALE_S:
        return checkup.Check(
            name,
            "degraded",
            f"not heard for {stale_s:.0f} s",
            "callers with a token are refused, and new pods are not known",
            "look at the network between this node and the API server",
        )
    return checkup.Check(name, "ok", f"last heard {stale_s:.0f} s ago")


def _folder(path: str) -> checkup.Folder:
    """The scratch directory, or the nearest one above it while it is not made yet."""
    near = path
    while not os.path.lexists(near) and near != "/":
        near = os.path.dirname(near)
    try:
        space = os.statvfs(near)
    except OSError as exc:
        return checkup.Folder(path, exc.strerror or "cannot be used", 0)
    problem = ""
    if not os.path.isdir(near):
        problem = f"{near} is not a directory"
    elif not os.access(near, os.W_OK | os.X_OK) or space.f_flag & os.ST_RDONLY:
        problem = "not writable"
    return checkup.Folder(path, problem, space.f_bavail * space.f_frsize)


def _store(place: Place) -> checkup.StoreState:
    exists, images, damaged, free_bytes = True, None, 0, None
    problem: errors.CkptError | None = None
    try:
        free_bytes = place.space().free_bytes
        if place.store is not None:
            epochs = place.store().epochs()
            images = len(epochs)
            damaged = sum(epoch.damage is not None for epoch in epochs)
    except errors.NotFound:
        exists = False
    except errors.CkptError as exc:
        # A directory that is not there yet is made by the first dump; all else is in its way.
        exists = place.store is None or not isinstance(exc.__cause__, FileNotFoundError)
        problem = exc if exists else None
    return checkup.StoreState(
        place.url, exists, images, damaged, free_bytes, problem, name=place.name
    )


def _leftovers(look: Callable[[], Sequence[str]]) -> tuple[str, ...]:
    try:
        return tuple(look())
    except (errors.CkptError, OSError) as exc:
        return (f"cannot look: {exc}",)
