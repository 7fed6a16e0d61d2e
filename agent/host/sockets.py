"""What the kernel says about the sockets of a process: who is connected to whom.

Promises: one ``Socket`` for each socket of the asked inodes that the kernel's tables know; the
peer of a unix socket is known by its inode if the process shares our network namespace.
Does not: open, change or read from any of them; enter another namespace.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator

# net/tcp_states.h; unix sockets use the same numbers.
STATES = (
    *("", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait"),
    *("close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"),
)
_TYPES = {1: "stream", 2: "dgram", 5: "seqpacket"}

# Their names below /proc/PID/net.
_TCP = ("tcp", "tcp6")
_BUT_TCP = ("udp", "udp6", "udplite", "udplite6", "raw", "raw6")
# Before Python 3.13 the last two words are shown as others, in hexadecimal.
_MAPPED = re.compile(r"\[(::ffff:[0-9a-f.]+(?::[0-9a-f]+)?)\]")

# linux/netlink.h, linux/sock_diag.h, linux/unix_diag.h
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_ALL_STATES = 0xFFFFFFFF
_SHOW_NAME_AND_PEER = 1 | 4
_UNIX_DIAG_NAME = 0
_UNIX_DIAG_PEER = 2
_ANSWER_S = 2.0
_PACKET_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Socket:
    """One socket. ``kind`` is like ``tcp``, ``udp6``, ``unix-stream`` or ``netlink``;
    ``peer_inode`` is 0 if there is no peer and None if it cannot be told.
    """

    inode: int
    kind: str
    state: str
    local: str
    peer: str
    peer_inode: int | None

    @property
    def tcp(self) -> bool:
        """Whether it is a TCP socket, of either family."""
        return self.kind in ("tcp", "tcp6")

    @property
    def connection(self) -> tuple[str, str] | None:
        """Both ends of a TCP connection that is not over, IPv4 as IPv4 also where an IPv6 socket
        uses it; None for everything else.
        """
        if not self.tcp or self.state in ("listen", "close", "time-wait"):
            return None
        return unmapped(self.local), unmapped(self.peer)


def unmapped(address: str) -> str:
    """``[::ffff:127.0.0.1]:80`` as ``127.0.0.1:80``: so it travels, and so filters see it."""
    found = _MAPPED.match(address)
    inner = ipaddress.IPv6Address(found[1]).ipv4_mapped if found else None
    return f"{inner}{address[found.end() :]}" if found and inner else address


def protocol(pid: int, number: int) -> str:
    """The kernel's name for the protocol of a socket's descriptor, such as ``TCP``, ``UNIX`` or
    ``MPTCP``; "" if it cannot be told.
    """
    try:
        name = os.getxattr(f"/proc/{pid}/fd/{number}", "system.sockprotoname")
    except OSError:  # closed meanwhile, or a kernel without the attribute
        return ""
    return name.rstrip(b"\0").decode(errors="replace")


def table(pid: int) -> dict[int, Socket]:
    """The TCP, UDP and unix sockets of the network namespace of ``pid``, by inode number; the
    peers of unix sockets are not asked for.
    """
    return {one.inode: one for one in (*_inet(pid), *_unix_table(pid))}


def without_tcp(pid: int) -> dict[int, Socket]:
    """As ``table``, without the TCP sockets, the tables of which take longest."""
    return {one.inode: one for one in (*_inet(pid, _BUT_TCP), *_unix_table(pid))}


def of(pid: int, inodes: Iterable[int]) -> list[Socket]:
    """The sockets with these inode numbers, as the network namespace of ``pid`` knows them, in
    order of inode. Sockets of families without a table are left out.
    """
    wanted = set(inodes)
    if not wanted:
        return []
    found = {}
    for one in (*_inet(pid), *_unix_table(pid), *_others(pid)):
        if one.inode in wanted:
            found[one.inode] = one
    if _same_network(pid):
        found.update((one.inode, one) for one in _unix_diag() if one.inode in wanted)
    return [found[inode] for inode in sorted(found)]


def unaccepted(pid: int, listening: Iterable[int]) -> list[tuple[str, str]]:
    """Both ends, this one first, of the TCP connections in the network namespace of ``pid`` that
    have come in at one of the sockets with the inode numbers ``listening``, and that no program has
    accepted yet; IPv4 as IPv4.
    """
    wanted = set(listening)
    rows = list(_inet(pid, _TCP))
    doors = {unmapped(each.local) for each in rows if each.inode in wanted}
    found = []
    for each in rows:
        # Such a connection is nobody's file yet. One that was closed has no file either, but then
        # it is in none of these states.
        if each.inode or each.state not in ("syn-recv", "established", "close-wait"):
            continue
        local = unmapped(each.local)
        port = local.rpartition(":")[2]
        if doors & {local, f"0.0.0.0:{port}", f"[::]:{port}"}:
            found.append((local, unmapped(each.peer)))
    return sorted(found)


def closing(pid: int) -> list[tuple[str, str]]:
    """Both ends, this one first, of the TCP connections in the network namespace of ``pid`` that
    their program has closed, and whose other end may not have heard all of it; IPv4 as IPv4.
    """
    ours = ("fin-wait-1", "closing", "last-ack")
    return sorted(
        (unmapped(each.local), unmapped(each.peer))
        for each in _inet(pid, _TCP)
        if not each.inode and each.state in ours
    )


def _same_network(pid: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
    except OSError:
        return False


def _rows(pid: int, table: str) -> Iterator[list[str]]:
    try:
        with open(f"/proc/{pid}/net/{table}", encoding="utf-8", errors="replace") as stream:
            next(stream, None)
            for line in stream:
                # The last column of "unix" is a path, which may hold spaces.
                yield line.split(None, 7) if table == "unix" else line.split()
    except OSError:  # a kernel without this family, or the process has ended
        return


def _inet(pid: int, tables: Iterable[str] = (*_TCP, *_BUT_TCP)) -> Iterator[Socket]:
    for table in tables:
        for row in _rows(pid, table):
            # sl local remote st tx:rx tr:when retrnsmt uid timeout inode
            yield Socket(
                inode=int(row[9]),
                kind=table,
                state=_state(int(row[3], 16)),
                local=_address(row[1]),
                peer=_address(row[2]),
                peer_inode=None,
            )


def _state(number: int) -> str:
    return STATES[number] if number < len(STATES) else str(number)


def _address(text: str) -> str:
    """From the kernel's hexadecimal words, each in host order, to ``address:port``."""
    host, port = text.split(":")
    words = [int(host[i : i + 8], 16) for i in range(0, len(host), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    address = ipaddress.ip_address(packed)
    shown = f"[{address}]" if address.version == 6 else str(address)
    return f"{shown}:{int(port, 16)}"


def _unix_table(pid: int) -> Iterator[Socket]:
    for row in _rows(pid, "unix"):
        # Num RefCount Protocol Flags Type St Inode Path; St 3 is connected
        yield Socket(
            inode=int(row[6]),
            kind=f"unix-{_TYPES.get(int(row[4], 16), row[4])}",
            state={"01": "listen" if row[3] == "00010000" else "close", "03": "established"}.get(
                row[5], row[5]
            ),
            local=row[7].rstrip("\n") if len(row) > 7 else "",
            peer="",
            peer_inode=None,
        )


def _others(pid: int) -> Iterator[Socket]:
    for row in _rows(pid, "netlink"):
        yield Socket(int(row[9]), "netlink", "close", f"protocol {row[1]}", "", None)
    for row in _rows(pid, "packet"):
        yield Socket(int(row[8]), "packet", "close", f"interface {row[4]}", "", None)


def _unix_diag() -> Iterator[Socket]:
    """All unix sockets of our own network namespace with their peers."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
            link.settimeout(_ANSWER_S)
            link.bind((0, 0))
            body = struct.pack(
                "=BBHIII8s", socket.AF_UNIX, 0, 0, _ALL_STATES, 0, _SHOW_NAME_AND_PEER, b""
            )
            head = struct.pack(
                "=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0
            )
            link.send(head + body)
            yield from _unix_answers(link)
    except OSError:  # no such table in this kernel: peers stay unknown
        return


def _unix_answers(link: socket.socket) -> Iterator[Socket]:
    while True:
        packet = link.recv(_PACKET_BYTES)
        offset = 0
        while offset + 16 <= len(packet):
            length, kind = struct.unpack_from("=IH", packet, offset)
            if kind in (_NLMSG_DONE, _NLMSG_ERROR) or length < 16:
                return
            yield _unix_socket(packet[offset + 16 : offset + length])
            offset += (length + 3) & ~3


def _unix_socket(message: bytes) -> Socket:
    _, kind, state, _, inode = struct.unpack_from("=BBBBI", message)
    name, peer_inode, offset = b"", 0, 16
    while offset + 4 <= len(message):
        length, attribute = struct.unpack_from("=HH", message, offset)
        if length < 4:
            break
        value = message[offset + 4 : offset + length]
        if attribute == _UNIX_DIAG_NAME:
            name = value
        elif attribute == _UNIX_DIAG_PEER:
            peer_inode = int.from_bytes(value[:4], "little")
        offset += (length + 3) & ~3
    # An abstract name begins with a zero byte and is shown with an @, as /proc does.
    shown = ("@" if name[:1] == b"\0" else "") + os.fsdecode(name.strip(b"\0"))
    return Socket(
        inode=inode,
        kind=f"unix-{_TYPES.get(kind, kind)}",
        state=_state(state),
        local=shown,
        peer=f"inode {peer_inode}" if peer_inode else "",
        peer_inode=peer_inode,
    )
