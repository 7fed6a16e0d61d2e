"""A placeholder as the site of a restore of a whole container, its first process included.

That process must be number 1, which hold is already: CRIU makes the tree in a pid namespace of its
own below the container's, and everything else is the container's own, as for any other tree. Only
/proc shows processes, and by the wrong numbers: the tree gets a copy of the container's mounts in
which /proc is of its own namespace, with the same paths hidden and read-only as before. Whoever is
executed into the container still sees the container's.

Promises: as ``placeholder``; nothing of the container's own mounts changes.
Does not: restore mounts, or namespaces besides: an image that has them is not for here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from agent import errors
from agent.engines.container import inside, newproc
from agent.engines.container.placeholder import Placeholder
from agent.engines.criu import images, journal, rpc
from agent.host import cgroups, namespaces, proc, subprocesses

_PROC_S = 20.0


class NestedPlaceholder(Placeholder):
    """The container ``container``, for the tree of these facts, whose root is number 1."""

    _mounts = -1
    _criu = 0
    _root: proc.Identity | None = None

    def entry(self) -> journal.About:
        """The container, and that what is made in there has a namespace of its own."""
        return dataclasses.replace(super().entry(), numbers=(), nested=True)

    @contextlib.contextmanager
    def wired(self, images: str) -> Iterator[Mapping[str, int]]:
        """As for any tree; and its pid namespace is not CRIU's."""
        _own_numbers(images)
        with super().wired(images) as keys:
            yield keys

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], operation: journal.Operation
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start CRIU in the container but for its mounts, of which it gets a copy."""
        groups = cgroups.directories(self._init.pid)
        with (
            namespaces.copied_mounts(self._init) as self._mounts,
            inside.worker(
                self._bundle, self._init, images, pass_fds, groups=groups, mounts=self._mounts
            ) as (worker, folder),
        ):
            self._criu = worker.child.pid
            operation.note_criu(self._criu)
            yield worker, folder

    def namespaces_made(self) -> None:
        """Find the root, and give it a /proc that shows it as number 1."""
        made = [
            pid for pid in namespaces.firsts_below(self._init) if self._criu in proc.ancestors(pid)
        ]
        if len(made) != 1:
            raise errors.RestoreFailed("CRIU did not make the pid namespace of the tree")
        self._root = proc.identity(made[0])
        argv = [sys.executable, "-I", "-S", newproc.__file__, str(self._mounts)]
        done = namespaces.inside(
            self._root,
            ("pid",),
            lambda: subprocesses.run(argv, timeout_s=_PROC_S, pass_fds=[self._mounts]),
        )
        if done.status != 0:
            raise errors.RestoreFailed(
                "cannot give the restored tree its /proc: "
                + done.stderr.decode(errors="replace").strip()[-300:],
                hint="the agent needs CAP_SYS_ADMIN",
            )

    def _found(self) -> dict[int, int]:
        if self._root is None or not proc.alive(self._root):
            return {}
        return inside.host_pids(self._root, self._numbers)


def _own_numbers(folder: str) -> None:
    """Let CRIU make a pid namespace for the tree whose images are in ``folder``."""
    path = os.path.join(folder, "inventory.img")
    with open(path, "rb") as file:
        inventory = images.load_inventory(file.read())
    (ids, *_) = images.read(folder, "ids", "ids-1.img", images.messages.task_kobj_ids_entry) or [
        None
    ]
    if ids is None or not ids.HasField("pid_ns_id"):
        raise errors.Corrupt("the image does not tell the tree's namespaces", part="ids-1.img")
    inventory.root_ids.pid_ns_id = ids.pid_ns_id + 1
    with open(path, "wb") as file:
        file.write(images.dump_inventory(inventory))
