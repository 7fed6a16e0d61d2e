"""What a person or a later restore wants to know of a tree, read from /proc while it stands still.

Promises: JSON values only; no memory, environments or arguments.
Does not: decide what is needed at restore; ``conflicts`` does, from these facts.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from agent import errors
from agent.engines.criu.probe import Criu
from agent.host import endpoints, proc, sockets, system

LAYOUT = "criu-4"

# Not files of a file system that a restore could miss.
_PSEUDO = ("/proc/", "/sys/", "/dev/", "/memfd:", "/SYSV", "/anon_hugepage", "/[aio]")
_PIPE = re.compile(r"pipe:\[(\d+)\]")


# Tells a process's mappings; raises errors.NotFound.
Maps = Callable[[int], Sequence[proc.Mapping]]


def gather(
    pids: Iterable[int], states: Mapping[int, str], criu: Criu, maps: Maps = proc.maps
) -> dict[str, Any]:
    """The facts of the tree, root first; processes that end meanwhile are left out.

    ``states`` are the kernel's letters from before the freeze, which hides them.
    """
    tree = _Tree(states, maps)
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            tree.add(pid)
    return {
        "layout": LAYOUT,
        "criu": criu.version_text,
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "cpu_flags": sorted(cpu_flags()),
        "boot_id": system.boot_id(),
        **tree.facts(),
    }


class _Tree:
    """What is known of the processes seen so far."""

    def __init__(self, states: Mapping[int, str], maps: Maps) -> None:
        self._states = states
        self._maps = maps
        self._processes: list[dict[str, Any]] = []
        self._files: dict[str, dict[str, Any]] = {}
        self._writable: set[str] = set()
        self._pipes: dict[str, set[int]] = {}
        self._stdio: list[dict[str, Any]] | None = None
        self._sockets: list[dict[str, Any]] = []
        self._other_sockets: dict[int, sockets.Socket] | None = None
        self._known_sockets: dict[int, sockets.Socket] = {}

    def add(self, pid: int) -> None:
        """Look at one process; raises ``errors.NotFound`` if it is gone."""
        # First: whoever tells them has something to do that CRIU waits for.
        mappings = self._maps(pid)
        self._processes.append(_process(pid, self._states.get(pid, "?")))
        opened = proc.open_files(pid)
        if self._stdio is None:
            self._stdio = [_stdio(file) for file in opened if file.number <= 2]
        connected = endpoints.tcp(pid, opened)
        if self._other_sockets is None and any(_unknown(file, connected) for file in opened):
            self._other_sockets = sockets.without_tcp(pid)
        self._known_sockets = {**(self._other_sockets or {}), **connected}
        for file in opened:
            self._add_open(pid, file)
        for mapping in mappings:
            self._add_mapped(pid, mapping)

    def _add_open(self, pid: int, file: proc.OpenFile) -> None:
        if _PIPE.fullmatch(file.link):
            self._pipes.setdefault(file.link, set()).add(file.flags & os.O_ACCMODE)
        elif stat.S_ISSOCK(file.mode):
            found = self._known_sockets.get(file.inode)
            if found:
                self._sockets.append(_socket(pid, file.number, found))
        elif stat.S_ISREG(file.mode) and file.link.startswith("/"):
            if file.writable:
                self._writable.add(file.link)
            else:
                self._note(file.link, "open", file.size_bytes, file.mtime_ns)

    def _add_mapped(self, pid: int, each: proc.Mapping) -> None:
        if not each.inode or each.deleted or not each.path.startswith("/"):
            return
        if each.shared and "w" in each.perms:
            self._writable.add(each.path)
        elif each.path not in self._files:
            try:
                info = os.stat(f"/proc/{pid}/root{each.path}")
            except OSError:
                return  # unlinked meanwhile: CRIU carries it or refuses
            if stat.S_ISREG(info.st_mode):
                self._note(each.path, "mapped", info.st_size, info.st_mtime_ns)

    def _note(self, path: str, use: str, size_bytes: int, mtime_ns: int) -> None:
        if not path.startswith(_PSEUDO) and not path.endswith(" (deleted)"):
            self._files[path] = {
                "path": path,
                "use": use,
                "size_bytes": size_bytes,
                "mtime_ns": mtime_ns,
            }

    def facts(self) -> dict[str, Any]:
        """What was found, as JSON values."""
        stdio = self._stdio or []
        ttys = outside_ttys(each["pid"] for each in self._processes)
        for each in stdio:
            # Cut off at restore unless it is redirected: its other end is not in the tree.
            cut_pipe = each["kind"] == "pipe" and len(self._pipes.get(each["link"], ())) == 1
            each["external"] = cut_pipe or each["key"] in ttys
        return {
            "ttys": sorted(ttys),
            "processes": self._processes,
            "stdio": stdio,
            "files": [
                self._files[path] for path in sorted(self._files) if path not in self._writable
            ],
            "sockets": self._sockets,
            "directories": sorted({each["cwd"] for each in self._processes if each["cwd"]}),
        }


def connections(known: dict[str, Any]) -> list[tuple[str, str]]:
    """Both ends of the tree's live TCP connections, from its facts; IPv4 as IPv4."""
    return [
        (sockets.unmapped(each["local"]), sockets.unmapped(each["remote"]))
        for each in known.get("sockets", ())
        if each["kind"] in ("tcp", "tcp6") and each["state"] not in ("listen", "close")
    ]


def cpu_flags() -> set[str]:
    """The features that this host's CPUs have, by the kernel's names."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return set(value.split())
    return set()


def _process(pid: int, state: str) -> dict[str, Any]:
    now = proc.stat(pid)
    status = proc.status(pid)
    memory = proc.resident(pid)
    return {
        "pid": pid,
        "comm": now.comm,
        "state": state,
        "ppid": now.ppid,
        "pgid": now.pgid,
        "session": now.session,
        "threads": proc.threads(pid),
        "uid": status.uid,
        "gid": status.gid,
        "cwd": proc.cwd(pid),
        "exe": proc.exe(pid),
        "memory": {
            "anon_bytes": memory.anon,
            "file_bytes": memory.file,
            "shmem_bytes": memory.shmem,
            "swap_bytes": memory.swap,
        },
    }


def _stdio(file: proc.OpenFile) -> dict[str, Any]:
    kind = (
        "tty"
        if _is_tty(file)
        else "pipe"
        if stat.S_ISFIFO(file.mode)
        else "socket"
        if stat.S_ISSOCK(file.mode)
        else "file"
    )
    return {
        "fd": file.number,
        "kind": kind,
        "link": file.link,
        "key": tty_key(file) if kind == "tty" else file.link,
    }


def _unknown(file: proc.OpenFile, connected: Mapping[int, sockets.Socket]) -> bool:
    return stat.S_ISSOCK(file.mode) and file.inode not in connected


def _socket(pid: int, number: int, found: sockets.Socket) -> dict[str, Any]:
    return {
        "pid": pid,
        "fd": number,
        "kind": found.kind,
        "local": found.local,
        "remote": found.peer,
        "state": found.state,
    }


def _is_tty(file: proc.OpenFile) -> bool:
    # Documentation/admin-guide/devices.txt: 4 ttyN and ttySN, 5 tty, console and ptmx, 136-143
    # the slaves of pseudo terminals, 204 other serial lines.
    major = os.major(file.rdev)
    return stat.S_ISCHR(file.mode) and (major in (4, 5, 204) or 136 <= major <= 143)


def tty_key(file: proc.OpenFile) -> str:
    """How CRIU names a terminal that it is to take from outside."""
    return f"tty[{file.rdev:x}:{file.dev:x}]"


def outside_ttys(pids: Iterable[int]) -> set[str]:
    """CRIU's keys of the terminals that the tree uses but whose other side it does not hold."""
    slaves: dict[str, int] = {}
    masters: set[int] = set()
    for pid in pids:
        try:
            opened = proc.open_files(pid)
        except errors.NotFound:
            continue
        for file in opened:
            if not _is_tty(file):
                continue
            if (os.major(file.rdev), os.minor(file.rdev)) == (5, 2):
                masters.add(proc.tty_index(pid, file.number))
            else:
                slaves[tty_key(file)] = _pty_index(file.rdev)
    return {key for key, index in slaves.items() if index < 0 or index not in masters}


def _pty_index(rdev: int) -> int:
    """The number of a pseudo terminal's slave; -1 for another terminal."""
    major = os.major(rdev)
    return (major - 136) * 256 + os.minor(rdev) if 136 <= major <= 143 else -1
