"""Which groups of multicast a process has joined.

The kernel lists the groups of an interface, but not who joined them; whether a socket did is asked
of the socket itself, by a copy of its descriptor.

Promises: a group is named if and only if one of the process's sockets has joined it; nothing
changes. Processes without such a group around them cost two small files.
Does not: tell sources that a socket filters.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import socket
import stat
import struct
from collections.abc import Iterator

from agent.host import descriptors, proc

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# All hosts, which every interface joins by itself (RFC 1112, RFC 4291), and its own addresses'
# solicited-node groups.
_EVERYBODYS = {ipaddress.ip_address(each) for each in ("224.0.0.1", "ff02::1", "ff01::1")}
_SOLICITED = ipaddress.IPv6Network("ff02::1:ff00:0/104")
# include/uapi/linux/in.h. struct group_filter: interface, group (a sockaddr_storage of 128 bytes,
# aligned to 8), mode, number of sources.
_MCAST_MSFILTER = 48
_FILTER = struct.Struct("=I4x128sII")
_LEVELS = {4: socket.IPPROTO_IP, 6: socket.IPPROTO_IPV6}

_libc = ctypes.CDLL(None, use_errno=True)


def joined(pid: int) -> list[str]:
    """The groups that sockets of the process have joined, ascending.

    Raises:
        errors.NotFound: there is no such process.
    """
    around = [*_around(pid)]
    if not around:
        return []
    found: set[Address] = set()
    for file in proc.open_files(pid):
        if stat.S_ISSOCK(file.mode):
            # Closed since, or of a process that nobody may look into.
            with contextlib.suppress(OSError), descriptors.borrowed(pid, file.number) as copy:
                found.update(group for index, group in around if _has(copy, index, group))
    return [str(each) for each in sorted(found, key=lambda each: (each.version, int(each)))]


def _around(pid: int) -> Iterator[tuple[int, Address]]:
    """Interface and group of everything that somebody in the network namespace has joined."""
    for index, group in (*_listed(pid), *_listed6(pid)):
        if group not in _EVERYBODYS and group not in _SOLICITED:
            yield index, group


def _listed(pid: int) -> Iterator[tuple[int, Address]]:
    index = 0
    for words in _lines(pid, "igmp"):
        # An interface's line begins with its number, a group's with its address in host order.
        if words[0].isdigit() and len(words[0]) < 8:
            index = int(words[0])
        elif len(words[0]) == 8 and words[0] != "Idx":
            yield index, ipaddress.IPv4Address(struct.pack("=I", int(words[0], 16)))


def _listed6(pid: int) -> Iterator[tuple[int, Address]]:
    for words in _lines(pid, "igmp6"):
        yield int(words[0]), ipaddress.IPv6Address(bytes.fromhex(words[2]))


def _lines(pid: int, name: str) -> Iterator[list[str]]:
    # A kernel without the protocol, or the process has ended.
    with (
        contextlib.suppress(FileNotFoundError, ProcessLookupError),
        open(f"/proc/{pid}/net/{name}", encoding="ascii") as file,
    ):
        yield from filter(None, (line.split() for line in file))


def _has(descriptor: int, index: int, group: Address) -> bool:
    """Whether a socket has joined the group on an interface."""
    buffer = ctypes.create_string_buffer(_FILTER.pack(index, _socket_address(group), 0, 0))
    size = ctypes.c_int(_FILTER.size)
    asked = (_LEVELS[group.version], _MCAST_MSFILTER, buffer, ctypes.byref(size))
    return bool(_libc.getsockopt(descriptor, *asked) == 0)


def _socket_address(group: Address) -> bytes:
    if group.version == 4:
        return struct.pack("=HH4s", socket.AF_INET, 0, group.packed)
    return struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, group.packed, 0)
