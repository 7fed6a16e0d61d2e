"""A placeholder as the site of a restore: CRIU makes the tree inside the container, below hold.

Promises: what ``restore.Site`` asks for; whatever fails, nothing of the tree is left in the
container and hold waits on.
Does not: decide when anything happens; ``restore`` does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent import errors
from agent.engines.base import RestoredTree
from agent.engines.container import conflicts, connections, holding, inside
from agent.engines.container.adopted import Adopted
from agent.engines.container.bundle import Bundle
from agent.engines.criu import journal, recovery, rpc
from agent.host import addresses, cgroups, clock, hold, namespaces, proc
from agent.model.container import Container

_DEATH_S = 10.0
_SETTLE_S = 10.0
# In place of a parent's number.
_REAPED = 0


class Placeholder:
    """The container ``container``, for the tree of these facts."""

    def __init__(
        self,
        bundle: Bundle,
        container: Container,
        init: proc.Identity,
        known: dict[str, Any],
        deadline: clock.Deadline,
        moved: Mapping[str, str],
        halves: frozenset[str],
    ) -> None:
        """``moved`` and ``halves`` as in ``engines.base.RestoreOptions``."""
        self._bundle = bundle
        self._container = container
        self._init = init
        self._known = known
        self._deadline = deadline
        self._numbers = conflicts.numbers(known)
        self._began_ticks = int(clock.boottime_s() * proc.TICKS_PER_S)
        self._host_pids: dict[int, int] = {}
        self._tree: Adopted | None = None
        self._hold: hold.Held | None = None
        self._moved = connections.Moved(
            known["container"]["addresses"], addresses.of(init.pid), moved, halves
        )

    def entry(self) -> journal.About:
        """The container, and the numbers in there that come from this restore."""
        return journal.About(
            container=self._init,
            network=proc.namespaces(self._init.pid)["net"],
            numbers=tuple(sorted(self._numbers)),
            began_ticks=self._began_ticks,
        )

    @contextlib.contextmanager
    def wired(self, images: str) -> Iterator[Mapping[str, int]]:
        """The pipes to the runtime are the placeholder's own, whose other ends are its log; the
        pod's address is the new one.
        """
        self._moved.rewrite(images)
        with contextlib.ExitStack() as owned:
            keys: dict[str, int] = {}
            for number, link in enumerate(self._known["container"]["stdio"]):
                if str(link).startswith("pipe:") and link not in keys:
                    keys[link] = _opened_stream(self._init.pid, number)
                    owned.callback(os.close, keys[link])
            yield keys

    @contextlib.contextmanager
    def held(self, operation: journal.Operation) -> Iterator[None]:
        """Hold the tree's connections in the pod's network namespace."""
        name = recovery.hold_name(operation.entry)
        live = self._moved.connections(self._known)
        with (
            namespaces.opened(self._init, "net") as network,
            hold.held(name, live, network=network, limit_s=self._deadline.remaining_s) as made,
        ):
            self._hold = made
            yield

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], operation: journal.Operation
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start CRIU in the container and in its control groups."""
        groups = cgroups.directories(self._init.pid)
        with inside.worker(self._bundle, self._init, images, pass_fds, groups=groups) as (
            worker,
            folder,
        ):
            operation.note_criu(worker.child.pid)
            yield worker, folder

    def configure(self, opts: rpc.Request) -> None:
        """Nothing besides the common."""

    def namespaces_made(self) -> None:
        """Nothing to do: the tree lives in the container's."""

    def host_pid(self, number: int) -> int:
        """By the container's pid namespace."""
        if not self._host_pids:
            self._host_pids = self._found()
        try:
            return self._host_pids[number]
        except KeyError:
            raise errors.NotFound(f"no process {number} in the restored tree", pid=number) from None

    def complete(self, images: str) -> None:
        """Reset the connections whose peers know another address; know the root while it cannot
        end.
        """
        root = self.host_pid(int(self._known["root"]))
        self._tree = Adopted(root, self._init, inside.number_for(self._init.pid, root))
        for each in self._moved.lost(self._known):
            connections.reset(self.host_pid(each.pid), each.fd)
        if self._hold is not None:
            self._hold.check()

    def settled(
        self, response: rpc.Response, worker: rpc.Worker, deadline: clock.Deadline
    ) -> RestoredTree:
        """Let go of CRIU, whose children hold inherits, and tell hold which one to follow."""
        tree = self._tree
        if tree is None:
            raise errors.RestoreFailed("CRIU did not say when the tree stood complete")
        # The restored processes are in sessions of their own or in none of ours: they stay.
        worker.end(alone=False)
        # A root that ended may be reaped already: hold knows its status by its number.
        clock.wait_until(
            lambda: not proc.alive(self._init) or _parent(tree.pid) in (self._init.pid, _REAPED),
            deadline.sooner(_SETTLE_S),
        )
        try:
            holding.adopt(self._init, tree.number)
        except BaseException:
            tree.kill()
            raise
        return tree

    def undo(self, places: journal.Places, operation: journal.Operation) -> None:
        """End what came to be; hold reaps it."""
        recovery.undo_restore(places, operation.entry)
        clock.wait_until(
            lambda: not proc.alive(self._init) or not self._remaining(),
            clock.Deadline.after(_DEATH_S),
        )
        self._host_pids = {}

    def _remaining(self) -> dict[int, int]:
        with contextlib.suppress(errors.NotFound):
            return self._found()
        return {}

    def _found(self) -> dict[int, int]:
        """The numbers on this host of the tree's processes, by their numbers in the image."""
        return inside.host_pids(self._init, self._numbers)


def _opened_stream(pid: int, number: int) -> int:
    """The placeholder's end of a standard stream, with an open file of its own."""
    flags = (os.O_WRONLY if number else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(f"/proc/{pid}/fd/{number}", flags)
    except OSError as exc:
        raise errors.RestoreFailed(
            f"nobody is at the other end of the placeholder's stream {number}: {exc.strerror}",
            hint="the runtime's process for this container may have ended; start the pod anew",
            pid=pid,
        ) from exc
    # Only opening it must not wait.
    os.set_blocking(fd, True)
    return fd


def _parent(pid: int) -> int:
    try:
        return proc.stat(pid).ppid
    except errors.NotFound:
        return _REAPED
