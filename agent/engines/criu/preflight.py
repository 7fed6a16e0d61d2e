"""What can be known to be wrong with a target before anything is touched.

Promises: refuses what CRIU would refuse late or obscurely, naming the process and the reason.
Does not: predict everything; CRIU looks closer once the tree is frozen.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection

from agent import errors
from agent.host import cgroups, clock, descriptors, layouts, multicast, pagemap, proc
from agent.model import gpus
from agent.model.hooks import RELEASE_GPU, TEARDOWN_RDMA

# The kernel's names for verbs (uverbs0) and the connection manager (rdma_cm).
RDMA_DEVICES = "/dev/infiniband/"
# How long the threads of a process may take that ends.
_ENDING_S = 0.2
# As an object, and as the device that makes one.
_USERFAULTFDS = ("anon_inode:[userfaultfd]", "/dev/userfaultfd")
# include/uapi/linux/capability.h. CRIU reads and writes other processes (SYS_PTRACE), their files
# (DAC_OVERRIDE), their connections and the packet filter (NET_ADMIN), and much else (SYS_ADMIN).
_NEEDED = {"CAP_DAC_OVERRIDE": 1, "CAP_NET_ADMIN": 12, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21}


def privileges() -> None:
    """Refuse unless this process may do what a dump or a restore needs.

    Raises:
        errors.PrivilegeMissing: not root, or a capability is missing; all of them are named.
    """
    if os.geteuid() != 0:
        raise errors.PrivilegeMissing("this needs root", hint="run it with sudo")
    held = proc.status(os.getpid()).caps_effective
    missing = [name for name, bit in _NEEDED.items() if not held >> bit & 1]
    if missing:
        raise errors.PrivilegeMissing(
            f"root lacks {', '.join(missing)}",
            hint="run outside a restricted container, or grant the capabilities",
            missing=missing,
        )


def target(pid: int) -> list[proc.Identity]:
    """Return the tree below ``pid``, root first, if it can be dumped from here.

    Raises:
        errors.NotFound: there is no such process.
        errors.TargetUnsuitable: it can never be dumped from here.
        errors.TargetBusy: somebody traces it, or has frozen it.
    """
    root = proc.stat(pid)
    if root.kernel_thread:
        raise errors.TargetUnsuitable(
            f"process {pid} ({root.comm}) is a kernel thread",
            hint="only programs can be dumped",
            pid=pid,
        )
    refuse_headless(root)
    if root.state in "ZX":
        raise errors.TargetUnsuitable(
            f"process {pid} ({root.comm}) has ended and waits for its parent",
            hint="there is nothing left to dump",
            pid=pid,
        )
    me = os.getpid()
    if pid == me or pid in proc.ancestors(me):
        raise errors.TargetUnsuitable(
            f"process {pid} ({root.comm}) is this agent or one of its ancestors: it cannot be "
            "stopped by its own descendant",
            hint="start the agent from outside of the tree, for example from another session",
            pid=pid,
        )
    ours = proc.namespaces(me)
    found: list[proc.Identity] = []
    running = set[bytes]()
    for each in proc.tree(pid):
        try:
            _suitable(each, ours)
            _refuse_frozen(each, running)
            found.append(proc.identity(each))
        except errors.NotFound:
            if each == pid:
                raise
    return found


def _suitable(pid: int, ours: dict[str, int]) -> None:
    stat = proc.stat(pid)
    refuse_headless(stat)
    if stat.state in "ZX":
        return  # its parent has not asked for its status yet; CRIU keeps it as it is
    status = proc.status(pid)
    if status.tracer_pid:
        tracer = _comm(status.tracer_pid)
        raise errors.TargetBusy(
            f"process {pid} ({stat.comm}) is traced by process {status.tracer_pid} ({tracer})",
            hint="detach the debugger or wait for the other dump",
            pid=pid,
            tracer=status.tracer_pid,
        )
    theirs = proc.namespaces(pid)
    for kind in ("pid", "mnt"):
        if theirs[kind] != ours[kind]:
            raise errors.TargetUnsuitable(
                f"process {pid} ({stat.comm}) lives in another {kind} namespace: it belongs to a "
                "container",
                hint="this engine dumps processes of the host; use one for containers",
                pid=pid,
                namespace=kind,
            )
    refuse_gpus(pid)
    refuse_multicast(pid)
    refuse_userfaultfds(pid)
    refuse_apart(pid)


def _refuse_frozen(pid: int, running: set[bytes]) -> None:
    """Refuse a process whose control group stands still: it makes none of the system calls that are
    put into it, whoever waits for them is killed in the end, and then it is lost when it goes on.
    ``running`` are the memberships that were looked at.
    """
    groups = proc.text(pid, "cgroup")
    if groups in running:
        return
    with contextlib.suppress(errors.EnvironmentUnfit):  # not to be seen from here
        if cgroups.frozen(cgroups.directories(pid)):
            raise errors.TargetBusy(
                f"process {pid} ({_comm(pid)}) is frozen by its control group",
                hint="let it go on first (systemctl thaw, docker unpause)",
                pid=pid,
            )
    running.add(groups)


def refuse_headless(stat: proc.Stat) -> None:
    """Refuse a process whose main thread has ended while others go on: CRIU would when all stand
    still, and what the process has is not to be seen by its number.

    Raises:
        errors.NotFound: the process has ended.
        errors.TargetUnsuitable: it is one.
    """
    if stat.state not in "ZX":
        return
    # One that is just ending looks like that for a moment.
    if not clock.wait_until(
        lambda: proc.stat(stat.pid).threads <= 1, clock.Deadline.after(_ENDING_S)
    ):
        raise errors.TargetUnsuitable(
            f"the main thread of process {stat.pid} ({stat.comm}) has ended while others go on,"
            " which CRIU cannot capture",
            hint="let the main thread wait for the others",
            pid=stat.pid,
        )


def refuse_userfaultfds(pid: int) -> None:
    """Refuse a process that fills memory of its own by userfaultfd: what it is asked for, and by
    whom, is in the kernel, and CRIU would refuse it when all stand still.

    Raises:
        errors.NotFound: the process has ended.
        errors.TargetUnsuitable: it has such a descriptor; all are named.
    """
    numbers = []
    for number in proc.descriptors(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed since
            if proc.descriptor_link(pid, number) not in _USERFAULTFDS:
                continue
            # One that notes writes is, nearly always, what a dump puts into a process for an
            # instant (``host.injection``), or a child that was forked then has for a little longer.
            if not pagemap.notes_writes(pid, number):
                numbers.append(number)
    if numbers:
        raise errors.TargetUnsuitable(
            f"process {pid} ({_comm(pid)}) uses userfaultfd (descriptor"
            f" {', '.join(map(str, numbers))}), which CRIU cannot capture",
            hint="let it close that before the dump, or switch off what it needs it for (filling"
            " memory on demand, post-copy migration)",
            pid=pid,
            descriptors=numbers,
        )


def refuse_filled(pid: int, flags: Collection[bytes]) -> None:
    """Refuse a process with mappings of these ``flags`` (``host.layouts``) if somebody outside of
    it fills its memory: what has not come yet would be taken for zero.

    Raises:
        errors.TargetUnsuitable: somebody does.
    """
    if not layouts.FILLED.isdisjoint(flags):
        raise errors.TargetUnsuitable(
            f"memory of process {pid} ({_comm(pid)}) is filled by another process (userfaultfd),"
            " which CRIU cannot capture",
            hint="let that end before the dump, or switch off what it is needed for (filling"
            " memory on demand, post-copy migration)",
            pid=pid,
        )


def refuse_apart(pid: int) -> None:
    """Refuse a process whose threads do not all share its descriptors, its working directory, root
    and umask: CRIU looks at those of the main thread only, and gives them to all.

    Raises:
        errors.NotFound: the process has ended.
        errors.TargetUnsuitable: some do not; they are named.
    """
    for kind, own, flag in (
        (descriptors.KCMP_FILES, "descriptors", "CLONE_FILES"),
        (descriptors.KCMP_FS, "a working directory and umask", "CLONE_FS"),
    ):
        threads = descriptors.apart(pid, kind)
        if threads:
            raise errors.TargetUnsuitable(
                f"thread {', '.join(map(str, threads[:3]))} of process {pid} ({_comm(pid)}) has"
                f" {own} of its own, which CRIU does not capture",
                hint=f"let it share those of its process (no unshare({flag}) in a thread)",
                pid=pid,
                threads=threads,
            )


def refuse_multicast(pid: int) -> None:
    """Refuse a process that has joined a group of multicast: CRIU keeps no membership, and the
    restored program would wait for ever, without any error, for what is sent to the group.

    Raises:
        errors.NotFound: the process has ended.
        errors.TargetUnsuitable: it has joined some; they are named.
    """
    groups = multicast.joined(pid)
    if groups:
        raise errors.TargetUnsuitable(
            f"process {pid} ({_comm(pid)}) has joined the multicast group {', '.join(groups)},"
            " which no restored socket would be in",
            hint="let it leave the group before the dump and join it again afterwards, or send to"
            " each receiver's own address",
            pid=pid,
            groups=groups,
        )


def refuse_gpus(pid: int) -> None:
    """Refuse a process that uses a GPU: what it holds there is in no page of its own.

    Raises:
        errors.NotFound: the process has ended.
        errors.TargetUnsuitable: it uses one; the device files are named.
    """
    links = _links(pid)
    if devices := gpus.used(links):
        raise errors.TargetUnsuitable(
            f"process {pid} ({_comm(pid)}) {gpus.reason(devices)}",
            hint=gpus.CURE,
            pid=pid,
            devices=list(devices),
        )


def refuse_devices(pid: int, hooks: Collection[str]) -> None:
    """Refuse a process that uses devices which none of these hooks lets go of; raises as the
    functions for each kind.
    """
    if RELEASE_GPU not in hooks:
        refuse_gpus(pid)
    if TEARDOWN_RDMA not in hooks:
        refuse_rdma(pid)


def refuse_rdma(pid: int) -> None:
    """Refuse a process that uses RDMA: its adapter writes to its memory, and knows it by numbers
    that no other adapter has.

    Raises:
        errors.NotFound: the process has ended.
        errors.TargetUnsuitable: it has a device open; the device files are named.
    """
    devices = sorted({link for link in _links(pid) if link.startswith(RDMA_DEVICES)})
    if devices:
        raise errors.TargetUnsuitable(
            f"process {pid} ({_comm(pid)}) uses RDMA ({', '.join(devices)}), which cannot be"
            " captured",
            hint=f"give the pod a pre hook called {TEARDOWN_RDMA} that lets go of these files"
            " (docs/hooks.md)",
            pid=pid,
            devices=devices,
        )


def _links(pid: int) -> list[str]:
    """Paths and the like of all that a process has open or maps."""
    links = [each.path for each in proc.maps(pid)]
    for number in proc.descriptors(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed since
            links.append(proc.descriptor_link(pid, number))
    return links


def _comm(pid: int) -> str:
    try:
        return proc.stat(pid).comm
    except errors.NotFound:
        return "gone"
