"""Which processes of a container are dumped, and whether they can be: known before anything stops.

Where the container's pid 1 is ``hold``, its child is the root of the dumped tree; in a container
that was never opted in, pid 1 itself is. Everything else in the container is either somebody's exec
(its parent is outside of the container: it stays out of the image, like a debugger's shell) or an
orphan that nobody would ever restore.

Promises: whatever is refused is refused with what it is and the way out, and nothing was touched.
Does not: predict everything; CRIU looks closer once the tree is frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence

from agent import errors
from agent.engines.container import holding, inside, mountpoints, rights
from agent.engines.criu import preflight
from agent.host import cgroups, clock, proc
from agent.model.container import Container

_JOINED = ("ipc", "mnt", "net", "pid", "uts")
# Probes and short commands come and go; an orphan stays.
_SETTLE_S = 1.0


@dataclasses.dataclass(frozen=True)
class Target:
    """A container that can be dumped: its pid 1, the tree, root first, and its groups. ``inner`` is
    the first process of the tree's own pid namespace: the container's pid 1, or the root itself
    where that is number 1 again, below ``hold``.
    """

    container: Container
    init: proc.Identity
    inner: proc.Identity
    tree: tuple[proc.Identity, ...]
    groups: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether the container's pid 1 is hold."""
        return self.tree[0] != self.init


def find(container: Container) -> Target:
    """Look at a container.

    Raises:
        errors.NotFound: it does not run.
        errors.TargetUnsuitable: it can never be dumped as it is.
        errors.TargetBusy: somebody traces one of its processes.
    """
    init = proc.identity(container.pid)
    groups = tuple(cgroups.directories(init.pid))
    _refuse_surroundings(container)
    if cgroups.frozen(groups):
        raise _unsuitable(
            f"container {container.name} is frozen: by a dump that was to stop it, or by others",
            "restore its newest image with --node and --replace, or let its runtime thaw it",
        )
    root = _root(container)
    inner = proc.identity(root) if inside.number(root) == 1 else init
    mountpoints.look(container)
    _refuse_orphans(init, root, groups)
    tree = []
    for pid in proc.tree(root):
        with contextlib.suppress(errors.NotFound):
            _refuse_process(pid, inner)
            preflight.refuse_devices(pid, container.hooks)
            tree.append(proc.identity(pid))
    if not tree:
        raise errors.TargetExited(f"the workload of container {container.name} has ended")
    return Target(container, init, inner, tuple(tree), groups)


def _refuse_surroundings(container: Container) -> None:
    name = container.name
    theirs, ours = proc.namespaces(container.pid), proc.namespaces(os.getpid())
    if theirs["user"] != ours["user"]:
        raise _unsuitable(
            f"container {name} has a user namespace of its own",
            "set hostUsers to true (its default) in the pod",
        )
    if len(proc.status(container.pid).ns_pids) < 2 or proc.status(container.pid).ns_pids[-1] != 1:
        raise _unsuitable(
            f"container {name} has no pid namespace of its own",
            "do not set hostPID or shareProcessNamespace in the pod",
        )
    with contextlib.suppress(errors.PrivilegeMissing):
        if theirs["net"] == proc.namespaces(1)["net"]:
            raise _unsuitable(
                f"container {name} uses the node's own network",
                "do not set hostNetwork in the pod: its connections and ports cannot move",
            )
    if theirs["net"] == ours["net"]:
        raise _unsuitable(
            f"container {name} uses the agent's own network",
            "do not set hostNetwork in the pod: its connections and ports cannot move",
        )
    if container.terminal:
        raise _unsuitable(
            f"container {name} has a terminal, whose other end cannot move",
            "do not set tty in the container",
        )


def _root(container: Container) -> int:
    if not holding.is_hold(container.pid):
        return container.pid
    if holding.waits(container.pid):
        raise _unsuitable(
            f"container {container.name} is a placeholder that waits for a restore",
            "restore an image into it first",
        )
    number = holding.follows(container.pid)
    for pid in proc.children(container.pid):
        with contextlib.suppress(errors.NotFound):
            if inside.number_for(container.pid, pid) == number:
                return pid
    raise errors.TargetExited(
        f"the workload of container {container.name} has ended", hint="there is nothing to dump"
    )


def _refuse_orphans(init: proc.Identity, root: int, groups: Sequence[str]) -> None:
    left: list[int] = []

    def settled() -> bool:
        left[:] = strays(init, proc.tree(root), groups)
        return not left

    if not clock.wait_until(settled, clock.Deadline.after(_SETTLE_S), every_s=0.05):
        raise _unsuitable(
            f"processes of the container are not below its main one: {described(left)}; they "
            "would be lost",
            "end them, or start them so that they stay children of the main process",
            pids=left,
        )


def strays(init: proc.Identity, tree: Iterable[int], groups: Sequence[str]) -> list[int]:
    """The container's processes that are neither its pid 1, nor in the tree, nor somebody's exec
    from outside: orphans, which are dumped by nobody.
    """
    known = {init.pid, *tree}
    found = []
    for pid in _members(groups):
        if pid not in known:
            with contextlib.suppress(errors.NotFound):
                if not executed(pid):
                    found.append(pid)
    return found


def _members(groups: Sequence[str]) -> list[int]:
    # Every process of the container is in all of its groups, but a hierarchy that the runtime does
    # not manage has others' in the same one.
    return min(
        (found for group in groups if (found := cgroups.members(group))), key=len, default=[]
    )


def executed(pid: int) -> bool:
    """Whether the process was started into the container from outside, or by one that was."""
    while proc.stat(pid).state not in "ZX":
        own = proc.namespaces(pid)["pid"]
        parent = proc.stat(pid).ppid
        if parent == 0 or proc.namespaces(parent)["pid"] != own:
            return len(proc.status(pid).ns_pids) > 1 and proc.status(pid).ns_pids[-1] != 1
        pid = parent
    return True  # it has ended, and there is nothing of it to lose


def described(pids: Iterable[int]) -> str:
    """Numbers and names of processes, for people."""
    parts = []
    for pid in pids:
        try:
            parts.append(f"{pid} ({proc.stat(pid).comm})")
        except errors.NotFound:
            parts.append(f"{pid} (ended)")
    return ", ".join(parts)


def _refuse_process(pid: int, inner: proc.Identity) -> None:
    stat = proc.stat(pid)
    preflight.refuse_headless(stat)
    if stat.state in "ZX":
        return
    status = proc.status(pid)
    if status.tracer_pid:
        raise errors.TargetBusy(
            f"process {pid} ({stat.comm}) is traced by process {status.tracer_pid}",
            hint="detach the debugger or wait for the other dump",
            pid=pid,
            tracer=status.tracer_pid,
        )
    theirs, pod = proc.namespaces(pid), proc.namespaces(inner.pid)
    # CRIU restores into a time namespace, in which the monotonic clock goes on as before.
    other = [kind for kind in (*_JOINED, "user") if theirs[kind] != pod[kind]]
    if other:
        raise _unsuitable(
            f"process {pid} ({stat.comm}) has made a {other[0]} namespace of its own",
            "containers inside of the container cannot be checkpointed",
            pid=pid,
        )
    preflight.refuse_multicast(pid)
    preflight.refuse_userfaultfds(pid)
    preflight.refuse_apart(pid)
    lacking = rights.missing([status.uid], status.caps_held)
    if lacking:
        raise _unsuitable(
            f"process {pid} ({stat.comm}) of user {status.uid} could not be restored: the agent "
            f"lacks {', '.join(lacking)}",
            "give the agent these capabilities, or run the workload as root without them",
            pid=pid,
        )
    for file in proc.open_files(pid):
        if file.link == "anon_inode:[io_uring]":
            raise _unsuitable(
                f"process {pid} ({stat.comm}) uses io_uring, which CRIU cannot dump",
                "run it without (Node.js: UV_USE_IO_URING=0; PostgreSQL: io_method=worker)",
                pid=pid,
            )
    if any(mapping.path.startswith("/SYSV") for mapping in proc.maps(pid)):
        raise _unsuitable(
            f"process {pid} ({stat.comm}) uses System V shared memory, which cannot be dumped from "
            "a container's shared IPC namespace",
            "use POSIX shared memory (/dev/shm) or mmap instead",
            pid=pid,
        )


def _unsuitable(message: str, hint: str, **facts: object) -> errors.TargetUnsuitable:
    return errors.TargetUnsuitable(message, hint=hint, **facts)
