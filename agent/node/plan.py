"""This host's look at a process tree before a dump, without touching it.

Promises: reads /proc and the kernel's socket tables, nothing else; no process is stopped.
Does not: decide (model/plan.py does).
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable, Collection, Sequence

from agent import errors
from agent.host import descriptors, kernel, proc, sockets
from agent.model import follow, plan
from agent.model.container import Container
from agent.model.hooks import RELEASE_GPU, TEARDOWN_RDMA


def plan_dump(pids: Sequence[int], *, ghost_limit_bytes: int) -> plan.Plan:
    """Say what a dump of the trees below ``pids`` would take and what stands in its way.

    Raises:
        errors.NotFound: a root does not run.
        errors.PrivilegeMissing: not allowed to look.
    """
    tree = list(dict.fromkeys(pid for root in pids for pid in proc.tree(root)))
    processes = [found for pid in tree if (found := _process(pid, required=pid in pids))]
    inodes = {d.socket for process in processes for d in process.descriptors if d.socket}
    namespaces = {process.namespaces.get("net"): process.pid for process in processes}
    connections = {one.inode: one for pid in namespaces.values() for one in sockets.of(pid, inodes)}
    return plan.decide(
        pids,
        processes,
        [plan.Connection(**vars(one)) for one in connections.values()],
        _observer(),
        ghost_limit_bytes=ghost_limit_bytes,
    )


def plan_followed(closure: follow.Closure, *, ghost_limit_bytes: int) -> plan.Plan:
    """Say what a dump of all members of ``closure`` would take; raises as ``plan_dump``."""
    found = plan_dump(closure.roots, ghost_limit_bytes=ghost_limit_bytes)
    known = {each.subject for each in found.blockers}
    divided = [
        plan.Finding("divided-socket", each.link, each.reason, follow.CURE)
        for each in closure.leaving
        if each.blocks and each.link not in known
    ]
    return dataclasses.replace(found, blockers=(*found.blockers, *divided))


def plan_containers(
    containers: Sequence[Container],
    examine: Callable[[Container], Sequence[str]],
    *,
    ghost_limit_bytes: int,
) -> plan.Plan:
    """Say what a dump of the containers would take. ``examine`` is an engine's own look at one:
    why it cannot be dumped.

    Raises:
        errors.NotFound: a container does not run any more.
        errors.PrivilegeMissing: not allowed to look.
    """
    found = plan_dump([each.pid for each in containers], ghost_limit_bytes=ghost_limit_bytes)
    refusals = [
        plan.Finding("container", f"container {each.name}", reason, "")
        for each in containers
        for reason in examine(each)
    ]
    # Namespaces of their own are what containers are made of, and no surprise.
    before = frozenset.intersection(*(each.hooks for each in containers))
    blockers = [
        each
        for each in found.blockers
        if each.code != "other-container" and not _let_go(each, before)
    ]
    return dataclasses.replace(found, blockers=(*refusals, *blockers))


def _let_go(found: plan.Finding, hooks: Collection[str]) -> bool:
    """Whether a hook lets go of what stands in the way before it does."""
    rdma = any(word in found.reason for word in ("/dev/infiniband/", "infinibandevent"))
    return (found.code == "gpu" and RELEASE_GPU in hooks) or (rdma and TEARDOWN_RDMA in hooks)


def _observer() -> plan.Observer:
    own = os.getpid()
    return plan.Observer(
        pid=own,
        ancestors=tuple(proc.ancestors(own)),
        namespaces=proc.namespaces(own),
        capabilities=kernel.capabilities(),
    )


def _process(pid: int, *, required: bool) -> plan.Process | None:
    """Read one process; None if it ended meanwhile, unless it is a ``required`` root."""
    try:
        seen = proc.stat(pid)
        memory = proc.resident(pid)
        gone = seen.kernel_thread or seen.state in "ZX"
        return plan.Process(
            pid=pid,
            parent=seen.ppid,
            program=seen.comm,
            state=seen.state,
            threads=seen.threads,
            session=seen.session,
            anonymous_bytes=memory.anon,
            shared_bytes=memory.shmem,
            file_bytes=memory.file,
            swapped_bytes=memory.swap,
            kernel_thread=seen.kernel_thread,
            tracer=proc.status(pid).tracer_pid,
            namespaces={} if gone else proc.namespaces(pid),
            descriptors=()
            if gone
            else tuple(_descriptor(pid, file) for file in proc.open_files(pid)),
            mappings=tuple(dict.fromkeys(m.path for m in proc.maps(pid) if m.path)),
            threads_apart=() if gone else tuple(descriptors.apart(pid)),
            threads_elsewhere=() if gone else tuple(descriptors.apart(pid, descriptors.KCMP_FS)),
        )
    except errors.NotFound:
        if required:
            raise
        return None


def _descriptor(pid: int, file: proc.OpenFile) -> plan.Descriptor:
    regular = stat.S_ISREG(file.mode)
    device = stat.S_ISCHR(file.mode) or stat.S_ISBLK(file.mode)
    return plan.Descriptor(
        number=file.number,
        link=file.link,
        writable=file.writable,
        regular=regular,
        device=(os.major(file.rdev), os.minor(file.rdev)) if device else None,
        socket=file.inode if stat.S_ISSOCK(file.mode) else 0,
        protocol=sockets.protocol(pid, file.number) if stat.S_ISSOCK(file.mode) else "",
        size_bytes=file.size_bytes if regular else 0,
        unlinked=regular and file.nlink == 0,
    )
