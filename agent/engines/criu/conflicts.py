"""What on this host is in the way of a restore: everything at once, before anything is touched.

Promises: every reason is a sentence that names the thing; no reason means that CRIU has what it
needs as far as can be seen from outside.
Does not: change anything; files that travel with the image are ``ephemeral``'s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

from agent import errors
from agent.engines.base import RestoreOptions
from agent.engines.criu import facts
from agent.host import clock, hold, proc, sockets, system

# CRIU itself, page tables, and room for the rest of the host while the tree comes up.
_SPARE_BYTES = 64 << 20
# A shell tells a missing file in a line; a missing installation should not fill the screen.
_MAX_REASONS = 50
# Inits that look after their children only now and then do so every second.
_INIT_S = 3.0


def numbers(known: dict[str, Any]) -> set[int]:
    """Every pid and thread number that the tree will take.

    Raises:
        errors.UnknownFormat: another engine made the image.
        errors.Corrupt: the facts do not make sense.
    """
    if known.get("layout") != facts.LAYOUT:
        raise errors.UnknownFormat(
            f"the image has layout {known.get('layout')!r}, this engine restores {facts.LAYOUT}",
            hint="use the engine that made it",
        )
    try:
        found = {int(number) for each in known["processes"] for number in each["threads"]}
        return found | {int(each["pid"]) for each in known["processes"]}
    except (KeyError, TypeError, ValueError) as exc:
        raise _incomplete() from exc


def programs(known: dict[str, Any]) -> list[str]:
    """The names of the programs that the tree will run."""
    return [str(each["comm"]) for each in known["processes"]]


def connections(known: dict[str, Any]) -> list[hold.Connection]:
    """The tree's live TCP connections, each as both of its ends see it: the other end may be in
    the tree as well, or in another one that is restored at the same time.
    """
    found = []
    for local, remote in facts.connections(known):
        here, there = endpoint(local), endpoint(remote)
        found += [hold.Connection(*here, *there), hold.Connection(*there, *here)]
    return found


def endpoint(text: str) -> tuple[str, int]:
    """Address and port of ``127.0.0.1:80`` or ``[::1]:80``."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def wait_for_init(numbers: Iterable[int]) -> None:
    """Give init a moment to notice the end of processes whose numbers the tree needs: a restore
    right after a kill would else be refused for the sake of a few milliseconds.
    """
    clock.wait_until(
        lambda: not any(_orphaned_zombie(number) for number in numbers),
        clock.Deadline.after(_INIT_S),
    )


def _orphaned_zombie(number: int) -> bool:
    try:
        now = proc.stat(number)
    except errors.NotFound:
        return False
    return now.state in "ZX" and now.ppid == 1


def find(known: dict[str, Any], memory_bytes: int, options: RestoreOptions) -> list[str]:
    """The reasons why the tree of these facts cannot be restored here and now.

    Raises:
        errors.Corrupt: the facts do not make sense.
    """
    try:
        reasons = [
            *_machine(known),
            *([] if options.isolate else _pids(known)),
            *_files(known["files"], options.accept_changed),
            *_directories(known["directories"]),
            *_memory(memory_bytes),
            *_sockets(known),
        ]
    except (KeyError, TypeError, ValueError) as exc:
        raise _incomplete() from exc
    return [*reasons[:_MAX_REASONS], *_rest(reasons)]


def _incomplete() -> errors.Corrupt:
    return errors.Corrupt(
        "the facts of the image are incomplete", hint="use another image", part="facts"
    )


def _rest(reasons: list[str]) -> list[str]:
    left = len(reasons) - _MAX_REASONS
    return [f"and {left} more"] if left > 0 else []


def _machine(known: dict[str, Any]) -> Iterator[str]:
    here = os.uname().machine
    if known["machine"] != here:
        yield f"the image is of a {known['machine']} machine, this is {here}"
        return
    missing = sorted(set(known["cpu_flags"]) - facts.cpu_flags())
    if missing:
        yield f"this CPU lacks {', '.join(missing)}"


def _pids(known: dict[str, Any]) -> Iterator[str]:
    for number in sorted(numbers(known)):
        if proc.exists(number):
            yield f"pid {number} is in use{_by(number)} (--isolate avoids that)"


def _by(number: int) -> str:
    try:
        now = proc.stat(number)
    except errors.NotFound:
        return ""
    if now.state == "Z":
        return f" by {now.comm}, which has ended, but its parent {now.ppid} has not noticed"
    return f" by {now.comm}"


def _files(files: Iterable[dict[str, Any]], accept_changed: bool) -> Iterator[str]:
    for file in files:
        path = file["path"]
        try:
            info = os.stat(path)
        except OSError as exc:
            yield f"{path} is missing: {exc.strerror}"
            continue
        if accept_changed:
            continue
        if info.st_size != file["size_bytes"]:
            yield f"{path} has {info.st_size} bytes, {file['size_bytes']} at the dump"
        elif info.st_mtime_ns != file["mtime_ns"]:
            yield f"{path} was written since the dump"


def _directories(directories: Iterable[str]) -> Iterator[str]:
    for path in directories:
        if path.endswith(" (deleted)"):
            continue  # CRIU carries a directory without a name itself, or has refused to
        if not os.path.isdir(path):
            yield f"the directory {path} is missing"


def _memory(memory_bytes: int) -> Iterator[str]:
    free = system.memory_available_bytes()
    if memory_bytes + _SPARE_BYTES > free:
        yield (f"the tree needs {memory_bytes >> 20} MiB of memory, {free >> 20} MiB are free")


def _sockets(known: dict[str, Any]) -> Iterator[str]:
    here = sockets.table(os.getpid()).values()
    taken = {(each.kind, each.local) for each in here if _bound(each.kind, each.state)}
    told = set()
    for each in known["sockets"]:
        name = (each["kind"], each["local"])
        if _bound(name[0], each["state"]) and name[1] and name in taken and name not in told:
            told.add(name)
            yield f"{name[0]} {name[1]} is being listened on by somebody else"
    connected = {each.connection for each in here}
    for local, remote in facts.connections(known):
        if (local, remote) in connected:
            yield f"the connection {local} - {remote} still exists here"


def _bound(kind: str, state: str) -> bool:
    """Whether nobody else can have the socket's address."""
    return state == "listen" or (kind.startswith("udp") and state == "close")
