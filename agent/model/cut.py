"""Whether the members of a group were cut at one instant, as far as their TCP connections can tell.

Of a connection between two members both ends were captured. With the sender's ``written_seq``
(what follows the last byte that its program wrote) and ``unacknowledged_bytes``, the receiver's
``received_seq`` (what follows the last byte that arrived) must lie, modulo 2^32,

    written_seq - unacknowledged_bytes  <=  received_seq  <=  written_seq.

Above, the receiver has data that its sender never sent; below, data is lost that the sender has
forgotten. Either way both programs wait for ever after a restore, without any error.

Promises: pure; every connection between members is looked at in both directions; those that leave
the group are named.
Does not: know whether the members' clocks or files fit together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable

_SEQUENCES = 1 << 32
# Stands for the loopback addresses of a member, which mean another place in each.
LOCALHOST = "localhost"


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class End:
    """One end of an established TCP connection as it was captured; addresses are without zone and
    never IPv4-mapped. ``place`` is the network namespace that it lives in (a pod), as far as the
    one who looks at ends of several knows. ``peer_closed``: the other end has said its last, and
    may be no more.
    """

    local: str
    local_port: int
    remote: str
    remote_port: int
    written_seq: int
    unacknowledged_bytes: int
    received_seq: int
    place: str = ""
    peer_closed: bool = False

    @property
    def name(self) -> str:
        """The connection, for people."""
        return f"{address(self.local, self.local_port)} -> " + address(
            self.remote, self.remote_port
        )


@dataclasses.dataclass(frozen=True)
class Torn:
    """A direction in which the two ends do not fit: ``lag_bytes`` is by how much the receiver is
    behind what its sender still has (positive), or ahead of what was ever sent (negative).
    """

    sender: End
    receiver: End
    lag_bytes: int

    def __str__(self) -> str:
        how = (
            f"{self.lag_bytes} bytes are lost"
            if self.lag_bytes > 0
            else f"{-self.lag_bytes} bytes arrived that were never sent"
        )
        return (
            f"connection {self.sender.name} from {self.sender.place} to {self.receiver.place}:"
            f" {how}"
        )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a cut is like. ``pairs`` connections lie inside the group; ``leaving`` are ends whose
    other end is no member's.
    """

    pairs: int
    torn: tuple[Torn, ...]
    leaving: tuple[End, ...]

    @property
    def consistent(self) -> bool:
        """Whether all connections inside the group fit together."""
        return not self.torn


def check(ends: Iterable[End]) -> Verdict:
    """Compare both ends of each connection."""
    known = {_key(each): each for each in ends}
    torn, leaving, inside = [], [], 0
    for key, each in sorted(known.items()):
        place, local, local_port, remote, remote_port = key
        other = known.get((place if _loops(each) else "", remote, remote_port, local, local_port))
        if other is None:
            leaving.append(each)
            continue
        inside += 1
        lag = _lag(each, other)
        if lag:
            torn.append(Torn(each, other, lag))
    return Verdict(inside // 2, tuple(torn), tuple(leaving))


def unheld(
    leaving: Iterable[End], places: Collection[str], addresses: Collection[str]
) -> tuple[str, ...]:
    """Those of ``leaving``, a name for people each, that lead from one of ``places`` to another by
    its ``addresses`` after all. The other end knows them by another address, a Service's: whoever
    is held apart by the addresses of the others hears through it what was sent after the cut.
    """
    return tuple(
        each.name
        for each in leaving
        if each.place in places and each.remote in addresses and not each.peer_closed
    )


def unaccepted(connections: Iterable[tuple[str, str]], within: Collection[str]) -> tuple[str, ...]:
    """Those of ``connections`` ("ADDRESS:PORT", of who has not accepted it yet and of who made it)
    that come from ``within``, a name for people each: addresses of all that is cut together, and
    ``LOCALHOST`` where whoever shares the loopback is. The end of who made it would be alone in the
    images. Who made another one finds out as from any program that ended.
    """
    return tuple(
        f"{remote} -> {local}"
        for local, remote in connections
        if (host := remote.rpartition(":")[0].strip("[]")) in within
        or (LOCALHOST in within and is_loopback(host))
    )


def _key(end: End) -> tuple[str, str, int, str, int]:
    # A loopback address means another place in each network namespace.
    place = end.place if _loops(end) else ""
    return place, end.local, end.local_port, end.remote, end.remote_port


def _loops(end: End) -> bool:
    return is_loopback(end.remote)


def is_loopback(host: str) -> bool:
    """Whether an address means another place in each network namespace."""
    return host.startswith("127.") or host == "::1"


def _lag(sender: End, receiver: End) -> int:
    """Bytes lost (positive), never sent (negative), or 0."""
    behind = (sender.written_seq - receiver.received_seq) % _SEQUENCES
    if behind >= _SEQUENCES // 2:
        return behind - _SEQUENCES
    return max(0, behind - sender.unacknowledged_bytes)


def address(host: str, port: int) -> str:
    """An address with its port, for people."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
