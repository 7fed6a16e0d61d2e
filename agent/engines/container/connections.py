"""Sockets of a tree that comes up in a pod with another address.

The pod's own address is rewritten in the images: listeners, and connections between processes of
the pod, go on at the new one. So are the addresses of pods that were cut with it and move at the
same time, on both ends by one map, and connections between them go on as well. A connection to
somebody else cannot: its peer knows the old address. It comes back and is then reset, so that the
program sees what it would see if its peer had vanished, at once, and not at some later time or
never. If the address stays the same, its peer may still be there, and it stays as it is. Reset is
also a connection within the group that nobody had accepted: it is in no image but its caller's.

Promises: only addresses that were those of the old pod or of its group change.
Does not: move the address itself, or change what the programs remember of it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import ipaddress
import os
from collections.abc import Iterable, Mapping
from typing import Any

from agent import errors
from agent.engines.criu import conflicts, facts, images
from agent.host import descriptors, hold, sockets

# struct sockaddr of a family that no address has: it ends a connection.
_NOWHERE = ctypes.create_string_buffer(16)
_MAPPED = (0, 0, 0xFFFF0000)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclasses.dataclass(frozen=True)
class Lost:
    """A connection that cannot go on, by a process (its number inside) and its descriptor."""

    pid: int
    fd: int
    remote: str


class Moved:
    """What becomes of addresses when a pod with the addresses ``old`` comes up with ``new``, and of
    those of its ``group``, which has a new one for each old one, the pod's own among them;
    ``halves`` as in ``engines.base.RestoreOptions``.
    """

    def __init__(
        self,
        old: Iterable[str],
        new: Iterable[str],
        group: Mapping[str, str] | None = None,
        halves: frozenset[str] = frozenset(),
    ) -> None:
        self._halves = halves
        here = [ipaddress.ip_address(each) for each in new]
        self._here = {str(each) for each in here}
        self._own = {_plain(each) for each in old}
        told = {_plain(each): _plain(there) for each, there in (group or {}).items()}
        self._inside = self._own | told.keys()
        self._new = {each: there for each, there in told.items() if each != there}
        for each in sorted(self._own - told.keys()):
            address = ipaddress.ip_address(each)
            same = [other for other in here if other.version == address.version]
            if address not in here and same:
                self._new[each] = str(same[0])

    def __call__(self, address: str) -> str:
        """The address that replaces this one."""
        return self._new.get(address, address)

    def connections(self, known: dict[str, Any]) -> list[hold.Connection]:
        """The tree's live TCP connections as they will be."""
        return [
            hold.Connection(self(c.local), c.local_port, self(c.remote), c.remote_port)
            for c in conflicts.connections(known)
        ]

    def lost(self, known: dict[str, Any]) -> list[Lost]:
        """The connections that have to be reset."""
        live = set(facts.connections(known))
        found = []
        for each in known["sockets"]:
            ends = facts.connections({"sockets": [each]})
            for local, remote in ends:
                here, there = conflicts.endpoint(local)[0], conflicts.endpoint(remote)[0]
                inside = there in self._inside or ipaddress.ip_address(there).is_loopback
                # What its peer has closed comes to its end by itself.
                half = f"{local} -> {remote}" in self._halves and each["state"] == "established"
                gone = half if inside else here not in self._here
                if gone and (remote, local) not in live:
                    found.append(Lost(int(each["pid"]), int(each["fd"]), remote))
        return found

    def homeless(self, known: dict[str, Any]) -> list[str]:
        """The old pod's addresses that sockets use and that nothing here can replace."""
        found = set()
        for each in known["sockets"]:
            if each["kind"].startswith(("tcp", "udp")):
                local = conflicts.endpoint(sockets.unmapped(each["local"]))[0]
                if local in self._own and self(local) not in self._here:
                    found.add(local)
        return sorted(found)

    def rewrite(self, folder: str) -> int:
        """Set the addresses in the images in ``folder``; return how many.

        Raises:
            errors.Corrupt: the images cannot be understood.
        """
        path = os.path.join(folder, "files.img")
        if not self._new or not os.path.exists(path):
            return 0
        entries = images.read(folder, "files", "files.img", images.messages.file_entry)
        words = {_words(old): _words(new) for old, new in self._new.items()}
        count = 0
        for entry in entries:
            if entry.HasField("isk"):
                for field in (entry.isk.src_addr, entry.isk.dst_addr):
                    count += _replace(field, words)
        if count:
            with open(path, "wb") as file:
                file.write(images.dump("files", entries))
        return count


def _plain(address: str) -> str:
    return str(ipaddress.ip_address(address))


def _words(address: str) -> tuple[int, ...]:
    """As CRIU keeps an address: words in network order, read as if in this machine's."""
    packed = ipaddress.ip_address(address).packed
    return tuple(int.from_bytes(packed[at : at + 4], "little") for at in range(0, len(packed), 4))


def _replace(field: Any, words: dict[tuple[int, ...], tuple[int, ...]]) -> int:
    now = tuple(field)
    mapped = len(now) == 4 and now[:3] == _MAPPED
    found = words.get(now[3:] if mapped else now)
    if found is None:
        return 0
    field[:] = (*_MAPPED, *found) if mapped else found
    return 1


def reset(pid: int, fd: int) -> None:
    """End the connection behind a descriptor of a process that has not run yet.

    Raises:
        errors.RestoreFailed: the kernel refuses.
    """
    try:
        with descriptors.borrowed(pid, fd) as copy:
            _disconnect(copy)
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot reset connection {fd} of process {pid}: {exc.strerror}", pid=pid
        ) from exc


def _disconnect(descriptor: int) -> None:
    if _libc.connect(descriptor, _NOWHERE, len(_NOWHERE)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
