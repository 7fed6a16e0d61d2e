"""What a person or a later restore wants to know of a tree, read from /proc while it stands still.

Promises: JSON values only; no memory, environments or arguments.
Does not: decide what is needed at restore; ``conflicts`` does, from these facts.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from typing import Any

from agent import errors
from agent.engines.criu.probe import Criu
from agent.host import proc

LAYOUT = "criu-4"

# Not files of a file system that a restore could miss.
_PSEUDO = ("/proc/", "/sys/", "/dev/", "/memfd:", "/SYSV", "/anon_hugepage", "/[aio]")
_PIPE = re.compile(r"pipe:\[(\d+)\]")


def gather(pids: Iterable[int], criu: Criu) -> dict[str, Any]:
    """The facts of the tree, root first; processes that end meanwhile are left out."""
    processes: list[dict[str, Any]] = []
    files: dict[str, dict[str, Any]] = {}
    pipes: dict[str, set[int]] = {}
    stdio: list[dict[str, Any]] = []
    used_sockets: list[dict[str, Any]] = []
    known: dict[int, proc.Socket] | None = None
    writable: set[str] = set()
    for pid in pids:
        try:
            processes.append(_process(pid))
            opened = proc.open_files(pid)
            mapped = proc.maps(pid)
        except errors.NotFound:
            continue
        if known is None:
            known = proc.sockets(pid)
        if not stdio:
            stdio = [_stdio(file) for file in opened if file.number <= 2]
        for file in opened:
            if _PIPE.fullmatch(file.link):
                pipes.setdefault(file.link, set()).add(file.flags & os.O_ACCMODE)
            elif stat.S_ISSOCK(file.mode):
                found = known.get(file.inode)
                if found:
                    used_sockets.append(_socket(pid, file.number, found))
            elif stat.S_ISREG(file.mode) and file.link.startswith("/"):
                if file.writable:
                    writable.add(file.link)
                else:
                    _note_file(files, file.link, "open", file.size_bytes, file.mtime_ns)
        _note_mapped(pid, mapped, files, writable)
    for each in stdio:
        # A pipe with one end outside of the tree is cut at restore unless it is redirected.
        ends = pipes.get(each["link"])
        each["external"] = ends is not None and len(ends) == 1
    return {
        "layout": LAYOUT,
        "criu": criu.version_text,
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "cpu_flags": sorted(cpu_flags()),
        "boot_id": proc.boot_id(),
        "processes": processes,
        "stdio": stdio,
        "files": [files[path] for path in sorted(files) if path not in writable],
        "sockets": used_sockets,
        "directories": sorted({each["cwd"] for each in processes if each["cwd"]}),
    }


def cpu_flags() -> set[str]:
    """The features that this host's CPUs have, by the kernel's names."""
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                return set(value.split())
    return set()


def _process(pid: int) -> dict[str, Any]:
    now = proc.stat(pid)
    status = proc.status(pid)
    memory = proc.resident(pid)
    return {
        "pid": pid,
        "comm": now.comm,
        "state": now.state,
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


def _socket(pid: int, number: int, found: proc.Socket) -> dict[str, Any]:
    return {
        "pid": pid,
        "fd": number,
        "kind": found.kind,
        "local": found.local,
        "remote": found.remote,
        "state": found.state,
    }


def _note_mapped(
    pid: int, mapped: list[proc.Mapping], files: dict[str, dict[str, Any]], writable: set[str]
) -> None:
    for each in mapped:
        if not each.inode or each.deleted or not each.path.startswith("/"):
            continue
        if each.shared and "w" in each.perms:
            writable.add(each.path)
        elif each.path not in files:
            try:
                info = os.stat(f"/proc/{pid}/root{each.path}")
            except OSError:
                continue  # unlinked meanwhile: CRIU carries it or refuses
            if stat.S_ISREG(info.st_mode):
                _note_file(files, each.path, "mapped", info.st_size, info.st_mtime_ns)


def _note_file(
    files: dict[str, dict[str, Any]], path: str, use: str, size_bytes: int, mtime_ns: int
) -> None:
    if not path.startswith(_PSEUDO) and not path.endswith(" (deleted)"):
        files[path] = {"path": path, "use": use, "size_bytes": size_bytes, "mtime_ns": mtime_ns}


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
