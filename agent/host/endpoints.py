"""What a process's TCP sockets are connected to, asked of the sockets themselves.

The kernel's tables (``sockets.table``) are walked whole for each look, whatever is in them: some
milliseconds on a machine with much memory. A socket tells of itself in microseconds.

Promises: one ``sockets.Socket`` for each TCP socket among the descriptors that were asked about,
closed ones left out, as in the tables; where a socket does not tell all of it, they are asked.
Does not: change anything in the process, or tell of sockets that are no TCP sockets.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
from collections.abc import Iterable, Iterator

from agent import errors
from agent.host import descriptors, proc, sockets

# linux/tcp.h: struct tcp_info begins with the state.
_STATE_BYTES = 1
_FAMILIES = {socket.AF_INET: "tcp", socket.AF_INET6: "tcp6"}
# linux/in.h and linux/in6.h: IP_RECVERR and IPV6_RECVERR, with their levels.
_TELLS_AT_ONCE = {
    socket.AF_INET: (socket.IPPROTO_IP, 11),
    socket.AF_INET6: (socket.IPPROTO_IPV6, 25),
}


def tcp(pid: int, files: Iterable[proc.OpenFile]) -> dict[int, sockets.Socket]:
    """The TCP sockets among open ``files`` of process ``pid``, by inode number."""
    found: dict[int, sockets.Socket] = {}
    unknown = set()
    for file in files:
        if not file.link.startswith("socket:") or file.inode in found:
            continue
        try:
            with _copied(pid, file.number) as copy:
                if copy.proto == socket.IPPROTO_TCP and copy.family in _FAMILIES:
                    state = _state(copy)
                    if state != "close":
                        found[file.inode] = _told(copy, file.inode, state)
        except OSError:
            # It was closed meanwhile, cannot be copied, or is connecting: then it has a peer that
            # it does not tell.
            unknown.add(file.inode)
    if unknown:
        table = sockets.table(pid)
        found.update((inode, table[inode]) for inode in unknown if inode in table)
    return found


def of_tree(pids: Iterable[int]) -> Iterator[sockets.Socket]:
    """The TCP sockets of processes; of those that have ended none."""
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            yield from tcp(pid, proc.open_files(pid)).values()


def patience(pids: Iterable[int]) -> Iterator[tuple[tuple[str, str], float]]:
    """Both ends of each TCP connection of processes, this one first and IPv4 as IPv4, and the
    shortest time in seconds after which its program has asked to be told that the other end is not
    heard: 0 where it is told at once, infinite where it is left to the kernel (minutes).
    """
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            files = proc.open_files(pid)
            known = tcp(pid, files)
            for file in files:
                found = known.get(file.inode) if file.link.startswith("socket:") else None
                if found is None or found.connection is None:
                    continue
                with (
                    contextlib.suppress(OSError),  # closed meanwhile
                    _copied(pid, file.number) as copy,
                ):
                    yield found.connection, _patience_s(copy)


def _patience_s(copy: socket.socket) -> float:
    """As tcp_write_timeout, tcp_keepalive_timer and tcp_v4_err of the kernel have it."""
    if copy.getsockopt(*_TELLS_AT_ONCE[socket.AddressFamily(copy.family)]):
        return 0.0
    patience_s = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000 or math.inf
    if copy.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
        # It may have been idle for so long already that the first probe is sent at once; with a
        # time of the program's own, one that is not answered is enough.
        every_s = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        probes = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        patience_s = min(patience_s, every_s * (probes if math.isinf(patience_s) else 1))
    return patience_s


@contextlib.contextmanager
def _copied(pid: int, number: int) -> Iterator[socket.socket]:
    with descriptors.borrowed(pid, number) as descriptor:
        copy = socket.socket(fileno=descriptor)
        try:
            yield copy
        finally:
            copy.detach()


def _state(copy: socket.socket) -> str:
    (number,) = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _STATE_BYTES)
    return sockets.STATES[number] if number < len(sockets.STATES) else str(number)


def _told(copy: socket.socket, inode: int, state: str) -> sockets.Socket:
    kind = _FAMILIES[socket.AddressFamily(copy.family)]
    nobody = ("0.0.0.0" if kind == "tcp" else "::", 0)  # noqa: S104 - as tables show it
    remote = nobody if state == "listen" else copy.getpeername()
    return sockets.Socket(inode, kind, state, _shown(copy.getsockname()), _shown(remote), None)


def _shown(name: tuple[object, ...]) -> str:
    """As ``sockets`` shows an address, without a zone."""
    host, port = name[:2]
    address = ipaddress.ip_address(str(host).partition("%")[0])
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
