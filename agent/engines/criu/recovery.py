"""Undoing what an operation left that could not end properly: its agent or its CRIU was killed.

A dying CRIU lets go of the tree by itself: the kernel detaches the tracer, the code it had put
into each process sees its socket close and returns. What can stay behind: processes stopped by
the tracer's last signal, TCP sockets in repair mode (the job would get EPERM), connections locked
out by an nft table, half-restored processes, the scratch folder.

Promises: after ``undo_*`` the tree of a dump runs (or stays stopped, if it was), and nothing of a
restore is left; what belongs to an operation whose agent lives is never touched.
Does not: raise for what cannot be undone; it says so in the ``Findings``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import re
import signal
import socket
import stat
from collections.abc import Iterable

from agent import errors
from agent.engines.criu import journal, trees
from agent.host import clock, descriptors, hold, namespaces, netfilter, proc, sockets, subprocesses
from agent.model.container import HOLD_FOLLOWS

TABLE_PREFIX = "CRIU-"
# The program's name while it runs by itself, and through a loader of its own.
_CRIU_PROGRAMS = ("criu", "ld-linux-x86-64", "ld-linux-aarch6")
# CRIU names its tables by a random UUID, cut to fit a buffer of 32 bytes.
_TABLE = re.compile(r"CRIU-[0-9a-f-]{8,36}")
# An abandoned CRIU notices that its agent is gone at its next message and thaws the tree.
_CRIU_ENDS_S = 20.0
_UNTRACED_S = 5.0
# include/uapi/linux/tcp.h
_TCP_REPAIR = 19
_TCP_REPAIR_OFF = 0


@dataclasses.dataclass
class Findings:
    """What was found and undone, for people and for ``doctor``."""

    operations: list[str] = dataclasses.field(default_factory=list)
    tables: list[str] = dataclasses.field(default_factory=list)
    sockets: int = 0
    killed: list[int] = dataclasses.field(default_factory=list)
    scratch: list[str] = dataclasses.field(default_factory=list)
    unsettled: list[str] = dataclasses.field(default_factory=list)

    @property
    def clean(self) -> bool:
        """Whether there was nothing to undo."""
        return not any(dataclasses.asdict(self).values())


def recover(places: journal.Places) -> Findings:
    """Undo what dead agents left. Cheap if there is nothing."""
    findings = Findings()
    entries = places.entries()
    for entry in entries:
        if proc.alive(entry.agent):
            continue
        findings.operations.append(entry.name)
        _end_criu(entry, findings)
        if entry.action == "dump":
            undo_dump(places, entry, findings)
        elif entry.action == "fill":
            end_unfilled(entry, findings)
        else:
            undo_restore(places, entry, findings)
        places.remove(entry.name)
    places.forget_unwritten()
    places.forget_void_locks()
    places.forget_ended()
    _remove_strays(places, findings)
    _sweep_scratch(places, findings)
    return findings


def undo_dump(
    places: journal.Places, entry: journal.Entry, findings: Findings | None = None
) -> Findings:
    """See to it that the tree of a dump that failed is as it was before."""
    findings = findings or Findings()
    clock.wait_until(
        lambda: not any(_traced(who) for who in entry.pids), clock.Deadline.after(_UNTRACED_S)
    )
    for who in entry.pids:
        if _traced(who):
            findings.unsettled.append(f"process {who.pid} is still traced")
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            findings.sockets += _end_repair(who)
    _let_go(entry, findings)
    settle_tables(places, entry, keep=False, findings=findings)
    return findings


def undo_restore(
    places: journal.Places, entry: journal.Entry, findings: Findings | None = None
) -> Findings:
    """End what a failed restore left of its tree, and let go of its connections."""
    findings = findings or Findings()
    # All are told apart before one is killed: a killed parent's children change their parent.
    made = []
    for who in entry.pids:
        with contextlib.suppress(errors.NotFound):
            if _made_by(entry, who):
                made.append(who.pid)
    made += _made_inside(entry)
    findings.killed.extend(pid for pid in made if subprocesses.signal_quietly(pid))
    _let_go(entry, findings)
    settle_tables(places, entry, keep=False, findings=findings)
    return findings


def end_unfilled(entry: journal.Entry, findings: Findings) -> None:
    """End a tree that waits for memory which nobody brings any more, or has taken missing pages for
    zero since all who kept them were killed at once.
    """
    for root in entry.pids:
        for who in trees.stopped_tree(root.pid) if proc.alive(root) else ():
            if subprocesses.signal_quietly(who.pid):
                findings.killed.append(who.pid)


def hold_name(entry: journal.Entry) -> str:
    """The nft table by which the operation holds connections, where CRIU does not."""
    return f"ckpt-agent-{entry.name}"


def _let_go(entry: journal.Entry, findings: Findings) -> None:
    """Remove the hold of the operation. A pod's network outlives its container: it is found by
    whoever else is in it; with nobody in it, it is gone with all of its rules.
    """
    name = hold_name(entry)
    if entry.about.container is None:
        removed = hold.release(name)
    else:
        removed = False
        who = namespaces.user_of("net", entry.about.network)
        with contextlib.suppress(errors.NotFound), contextlib.ExitStack() as stack:
            if who is not None:
                network = stack.enter_context(namespaces.opened(who, "net"))
                removed = hold.release(name, network=network)
    if removed:
        findings.tables.append(name)


def _made_inside(entry: journal.Entry) -> list[int]:
    """The processes that a restore made inside a container, by their numbers on this host. Their
    numbers inside were free when it began, and it has moved the counter of numbers away.
    """
    about = entry.about
    if about.container is None or not proc.alive(about.container):
        return []
    if _adopted(about.container):
        return []  # the agent died when all was done
    try:
        if about.nested:
            # With its first process the kernel kills the whole namespace.
            return [
                pid
                for pid in namespaces.firsts_below(about.container)
                if _began_since(pid, about.began_ticks)
            ]
        inside = proc.namespaces(about.container.pid)["pid"]
    except errors.NotFound:
        return []  # the container has just ended, and with it the kernel ends all in there
    found = []
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            number = proc.status(pid).ns_pids[-1]
            if (
                number in about.numbers
                and _began_since(pid, about.began_ticks)
                and proc.namespaces(pid)["pid"] == inside
            ):
                found.append(pid)
    return found


def _began_since(pid: int, ticks: int) -> bool:
    try:
        return proc.stat(pid).start_ticks >= ticks
    except errors.NotFound:
        return False


def _adopted(init: proc.Identity) -> bool:
    """Whether the container's pid 1 follows a tree: a placeholder follows none."""
    try:
        with open(f"/proc/{init.pid}/cmdline", "rb") as file:
            return file.read().startswith(HOLD_FOLLOWS)
    except (FileNotFoundError, ProcessLookupError):
        return False


def _made_by(entry: journal.Entry, who: proc.Identity) -> bool:
    """Whether the process with this number came from the restore, not from somebody who was given
    the number meanwhile. ``who.start_ticks`` is when the restore began; the number was free then.
    """
    now = proc.stat(who.pid)
    if now.start_ticks < who.start_ticks:
        return False
    if proc.alive(entry.agent):
        # CRIU makes the root our child.
        return entry.agent.pid in proc.ancestors(who.pid)
    # An orphan: under CRIU's own name until its memory is in place, then under its program's.
    mine = {*entry.about.programs, *_CRIU_PROGRAMS}
    above = proc.ancestors(who.pid)
    own = {each.pid for each in entry.pids}
    return now.comm in mine and all(pid in own or _reaper(pid) for pid in above)


def _reaper(pid: int) -> bool:
    """Whether orphans end up there: the init of this namespace, or one that asked for it."""
    return pid == 1 or proc.stat(pid).ppid in (0, 1)


def settle_tables(
    places: journal.Places, entry: journal.Entry, *, keep: bool, findings: Findings | None = None
) -> None:
    """Remove the table of ``entry``'s operation, or mark it as kept.

    Where its name is not known (CRIU died before it could be seen), tables that are new since CRIU
    could make one are candidates: one that locks a connection of the tree is the operation's, one
    that locks others' is not, and an empty one does no harm: it is removed if no CRIU runs that
    might be about to use it, else marked for ``recover`` to remove later.
    """
    if entry.tables_before is None:
        return
    now = {name for name in netfilter.tables(TABLE_PREFIX) if _TABLE.fullmatch(name)}
    now -= places.kept_tables()
    if entry.table:
        ours = now & {entry.table}
    else:
        candidates = now - set(entry.tables_before)
        ours = _told_apart(places, candidates, _connections(entry.pids)) if candidates else set()
    for name in sorted(ours):
        if keep:
            places.keep_table(name)
        elif netfilter.delete_table(name) and findings is not None:
            findings.tables.append(name)


def _told_apart(
    places: journal.Places, candidates: set[str], connections: set[tuple[str, str]]
) -> set[str]:
    """Those of the candidates that lock a connection of the tree, or nothing while no CRIU runs."""
    ours = set()
    unused = not running_crius()
    for name in candidates:
        locked = _locked(name)
        if locked & connections or (unused and not locked):
            ours.add(name)
        elif not locked or not connections:
            places.note_stray(name)
    return ours


def _connections(tree: Iterable[proc.Identity]) -> set[tuple[str, str]]:
    """The live TCP connections of the tree, as pairs of addresses."""
    found = set()
    for who in tree:
        with contextlib.suppress(errors.NotFound):
            if not proc.alive(who):
                continue
            known = sockets.table(who.pid)
            for file in proc.open_files(who.pid):
                each = known.get(file.inode) if stat.S_ISSOCK(file.mode) else None
                if each is not None and each.connection is not None:
                    found.add(each.connection)
    return found


def _locked(table: str) -> set[tuple[str, str]]:
    """The connections that a table of CRIU locks. Its sets ``conns4`` and ``conns6`` hold
    addresses and ports in network order, each padded to a multiple of four bytes.
    """
    found = set()
    for name, size in (("conns4", 4), ("conns6", 16)):
        for key in netfilter.set_keys(table, name):
            if len(key) != 2 * (size + 4):
                continue
            ends = []
            for at in (0, size + 4):
                host = ipaddress.ip_address(key[at : at + size])
                port = int.from_bytes(key[at + size : at + size + 2], "big")
                ends.append(f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}")
            found.add((ends[0], ends[1]))
    return found


def table_of(criu_pid: int) -> str:
    """The name of the nft table of the CRIU with this pid; "" while that cannot be told.

    CRIU names its tables by the id of its run, and also the sockets, bound to its pid, by which it
    speaks to the code that it puts into the processes that it dumps.
    """
    name = re.compile(rf"@/crtools-pr-{criu_pid}-([0-9a-f-]{{36}})")
    for each in sockets.table(os.getpid()).values():
        match = name.fullmatch(each.local) if each.kind.startswith("unix") else None
        if match:
            # CRIU prints "inet CRIU-ID" into 32 bytes, one of them the final zero.
            return f"inet {TABLE_PREFIX}{match[1]}"[:31].removeprefix("inet ")
    return ""


def running_crius() -> list[int]:
    """The CRIU processes of this network namespace, whoever started them."""
    found = []
    here = proc.namespaces(os.getpid())["net"]
    for pid in proc.pids():
        with contextlib.suppress(errors.NotFound, errors.PrivilegeMissing):
            if not proc.stat(pid).comm.startswith(("criu", "ld-linux")):
                continue
            if proc.namespaces(pid)["net"] != here:
                continue
            # A private copy runs under the name of its dynamic loader.
            comm = proc.stat(pid).comm
            if comm == "criu" or (
                comm.startswith("ld-linux")
                and any(os.path.basename(each.path) == "criu" for each in proc.maps(pid))
            ):
                found.append(pid)
    return found


def _remove_strays(places: journal.Places, findings: Findings) -> None:
    """Remove tables that nobody needs: those marked as strays, and those that lock nothing, which
    every CRIU that kills what it dumps leaves behind. They do no harm but for time: CRIU reads all
    of them several times while a tree is frozen (measured: 0.5 s with 160 of them).
    """
    strays = places.strays()
    now = {name for name in netfilter.tables(TABLE_PREFIX) if _TABLE.fullmatch(name)}
    now -= places.kept_tables()
    if (now or strays) and not running_crius():
        for name in sorted(now):
            if (name in strays or not _locked(name)) and netfilter.delete_table(name):
                findings.tables.append(name)
        for name in sorted(strays):
            places.forget_stray(name)


def forget_gone_tables(places: journal.Places) -> None:
    """Take the marks off tables that a restore has removed."""
    for name in places.kept_tables() - netfilter.tables(TABLE_PREFIX):
        places.forget_table(name)


def _end_criu(entry: journal.Entry, findings: Findings) -> None:
    """Wait for an abandoned CRIU to undo its work; kill it if it does not."""
    who = entry.criu
    if who is None or not proc.alive(who):
        return
    if clock.wait_until(lambda: not proc.alive(who), clock.Deadline.after(_CRIU_ENDS_S)):
        return
    if proc.alive(who) and subprocesses.signal_quietly(who.pid, signal.SIGKILL):
        findings.killed.append(who.pid)
        clock.wait_until(lambda: not proc.alive(who), clock.Deadline.after(_UNTRACED_S))


def _traced(who: proc.Identity) -> bool:
    try:
        return proc.alive(who) and proc.status(who.pid).tracer_pid != 0
    except errors.NotFound:
        return False


def _end_repair(who: proc.Identity) -> int:
    """Take the process's TCP sockets out of repair mode; return how many were in it."""
    if not proc.alive(who):
        return 0
    count = 0
    for file in proc.open_files(who.pid):
        if stat.S_ISSOCK(file.mode):
            with contextlib.suppress(OSError):
                count += _end_repair_of(who.pid, file.number)
    return count


def _end_repair_of(pid: int, number: int) -> int:
    with descriptors.borrowed(pid, number) as copy, socket.socket(fileno=os.dup(copy)) as sock:
        if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        if not sock.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR):
            return 0
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _TCP_REPAIR_OFF)
        return 1


def _sweep_scratch(places: journal.Places, findings: Findings) -> None:
    """Remove scratch folders whose agent is dead; their names say who made them."""
    for name in places.scratch_names():
        match = re.fullmatch(r"[a-z]+-(\d+)-(\d+)-\d+", name)
        if match and not proc.alive(proc.Identity(int(match[1]), int(match[2]))):
            places.remove_scratch(name)
            findings.scratch.append(name)
