"""Who on this host is connected with a process tree and must be cut with it.

Promises: reads /proc and the kernel's socket tables, nothing else; no process is stopped. What it
never follows: pid 1 and the kernel, this program and its ancestors, containers, logins, and the
services of the system, unless the named tree belongs to the same one.
Does not: decide (model/follow.py does), or see connections that are made after it looked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from agent import errors
from agent.host import cgroups, proc, sockets
from agent.model import follow

# What carries others' connections: cutting it would cut everybody's. All of systemd's programs too.
_SHARED = frozenset(("dbus-broker", "dbus-broker-lau", "dbus-daemon", "sshd", "sshd-session"))
_STREAMS = ("unix-stream", "unix-seqpacket")


def close(pids: Sequence[int]) -> follow.Closure:
    """Follow the connections of the trees below ``pids`` until the set is closed.

    Raises:
        errors.NotFound: a root does not run.
        errors.TargetUnsuitable: the set is too large.
    """
    parties = {each.pid: each for each in _parties(pids)}
    for pid in pids:
        proc.stat(pid)
        if pid not in parties:
            raise errors.NotFound(f"process {pid} has just begun", hint="ask again", pid=pid)
    return follow.close(pids, parties, _links(parties))


def _parties(named: Sequence[int]) -> Iterator[follow.Party]:
    own = os.getpid()
    above = {own, *proc.ancestors(own)}
    ours = proc.namespaces(own)
    units = {cgroups.system_unit(pid) for pid in named}  # raises if there is no such process
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound):
            seen = proc.stat(pid)
            if pid not in named and (seen.kernel_thread or seen.state in "ZX"):
                continue
            yield follow.Party(
                pid=pid,
                parent=seen.ppid,
                group=seen.pgid,
                program=seen.comm,
                terminal=bool(seen.terminal) and seen.session == pid,
                refused=_refused(seen, above, ours, units),
            )


def _refused(
    seen: proc.Stat, above: Collection[int], ours: Mapping[str, int], units: Collection[str]
) -> str:
    """Why a process is never followed; "" if it may be."""
    if seen.pid == 1:
        return "is the first process of this host"
    if seen.pid in above:
        return "is this program or one of its ancestors"
    if seen.comm in _SHARED or seen.comm.startswith("systemd"):
        return "is shared by everybody here"
    try:
        theirs = {} if seen.state in "ZX" else proc.namespaces(seen.pid)
    except errors.PrivilegeMissing:
        return "may not be looked into"
    if any(theirs.get(kind, ours[kind]) != ours[kind] for kind in ("pid", "mnt")):
        return "belongs to a container"
    unit = cgroups.system_unit(seen.pid)
    return f"belongs to the system's service {unit}" if unit and unit not in units else ""


def _links(parties: Iterable[int]) -> Iterator[follow.Link]:
    """The connections that the processes hold, by the network namespace they are in."""
    holders: dict[int, set[int]] = {}
    networks: dict[int, int] = {}
    for pid in parties:
        # One that may not be looked into counts as nobody: it could not be dumped either.
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            held = _sockets(pid)
            if held:
                networks[proc.namespaces(pid)["net"]] = pid
            for inode in held:
                holders.setdefault(inode, set()).add(pid)
    for pid in networks.values():
        yield from _of_network(sockets.of(pid, holders), holders)


def _sockets(pid: int) -> set[int]:
    """The inodes of the sockets that a process holds."""
    found = set()
    for number in proc.descriptors(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            link = proc.descriptor_link(pid, number)
            if link.startswith("socket:["):
                found.add(int(link[len("socket:[") : -1]))
    return found


def _of_network(
    known: Sequence[sockets.Socket], holders: Mapping[int, Collection[int]]
) -> Iterator[follow.Link]:
    ends = {one.connection: one.inode for one in known if one.connection}
    for one in known:
        here = frozenset(holders[one.inode])
        if one.connection:
            local, peer = one.connection
            name = f"{one.kind} {local} -> {peer}"
            far = frozenset(holders.get(ends.get((peer, local), 0), ()))
            yield follow.Link(name, here, far)
        elif one.kind in _STREAMS and one.state == "established" and one.peer_inode != 0:
            name = f"{one.kind} socket {one.inode} {one.local}".rstrip()
            far = frozenset(holders.get(one.peer_inode or 0, ()))
            yield follow.Link(name, here, far, whole=True)
        else:
            continue
        if len(here) > 1:
            yield follow.Link(f"{name} (shared)", here, here, whole=True)
