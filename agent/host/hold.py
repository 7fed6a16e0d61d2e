"""The hold: TCP segments are kept from arriving, those of named connections while their ends are
rebuilt (``held``), or all from some addresses while programs run on (``apart``).

An end that exists before its peer must not be heard: the kernel would answer its first segment
with a reset. Segments are dropped where they arrive, so the sender simply sends them again (a drop
where they leave would count as congestion at the sender and stall it for seconds). It waits twice
as long each time, though, for nearly as long after the hold as that lasted. Where that may be
seconds (``apart``), it hears that there is no way: then it tries again at its usual pace (RFC
6069), and its program hears nothing.

The kernel holds for ``LEASE_S`` only, and a thread of this program asks it to go on: if the program
dies or stands still, traffic flows again by itself, within seconds and not at the end of what the
operation was allowed. What is left of a hold then is a table that matches nothing.

Promises: only what was named is touched; the table is gone when the context is left, and
``release`` of the same name removes what a dead owner left; a hold that the kernel ended early is
an error of ``Held.check``.
Does not: hold UDP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from agent import errors
from agent.host import clock, namespaces, netfilter, nftables

_T = TypeVar("_T")

# include/uapi/linux/netfilter.h and nf_tables.h
_NFPROTO = {4: 2, 6: 10}
_META_IIF, _META_NFPROTO, _META_L4PROTO = 4, 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
# Where the two addresses, source first, begin in the IPv4 and in the IPv6 header.
_ADDRESSES_AT = {4: 12, 6: 8}
# What nft calls addresses as keys of a set (datatype.h), by version; ports; and a key of several
# parts by six bits each.
_ADDRESS_KEYS = {4: 7, 6: 8}
_PORT_KEYS, _KEY_BITS = 13, 6
# The loopback interface is the first of each network namespace.
_LOOPBACK = (1).to_bytes(4, sys.byteorder)
_FLAGS_AT, _SYN, _RST = 13, 0x02, 0x04
# Before connection tracking and everybody else's rules, like the hold's own purpose.
_PRIORITY = -400
# The rules match while this set has its element, which the kernel removes when its time is up.
_LIVE = "live"
_CHAIN = "arrive"
# What nft calls keys like this one (inet_proto in its src/datatype.c).
_PROTOCOL = 12
_LIVE_KEY = bytes([socket.IPPROTO_TCP])
# Longer than a busy node keeps a thread waiting, shorter than peers' patience: TCP goes on sending
# for minutes, and what watches connections commonly gives them half a minute.
LEASE_S = 10.0
_RENEWALS = 5  # in the time of one lease


@dataclasses.dataclass(frozen=True)
class Connection:
    """A TCP connection as one of its ends sees it: addresses without zone, and ports."""

    local: str
    local_port: int
    remote: str
    remote_port: int


@contextlib.contextmanager
def held(
    name: str,
    connections: Iterable[Connection],
    *,
    network: int | None = None,
    limit_s: float | None = None,
) -> Iterator[Held]:
    """Hold what arrives for the local ends of ``connections`` in the network namespace of the
    descriptor ``network`` (or this program's), by an nf_tables table called ``name``: while the
    context lasts, this program lives and ``limit_s`` are not over.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
        errors.EnvironmentUnfit: the kernel cannot filter (no nf_tables).
    """
    with _standing(Held(name, network, limit_s), _drop_arriving(name, connections)) as made:
        yield made


@contextlib.contextmanager
def apart(
    name: str,
    addresses: Iterable[str],
    *,
    loopback: bool = False,
    network: int | None = None,
    limit_s: float | None = None,
) -> Iterator[Held]:
    """Refuse what arrives over TCP from ``addresses``, and with ``loopback`` what stays within the
    namespace; otherwise as ``held``. No connection of theirs begins, or hears more than its reset.
    """
    with _standing(Held(name, network, limit_s), _refuse_from(name, addresses, loopback)) as made:
        yield made


@contextlib.contextmanager
def _standing(made: Held, rules: Sequence[nftables.Change]) -> Iterator[Held]:
    name, network = made.name, made.network
    if not rules:
        yield made
        return
    if _there(network, lambda: bool(netfilter.tables(name))):  # taking one away takes long
        release(name, network=network)
    try:
        try:
            made.begin(rules)
        except OSError as exc:
            if exc.errno == errno.EPERM:
                raise errors.PrivilegeMissing(
                    "not allowed to filter packets", hint="run as root with CAP_NET_ADMIN"
                ) from exc
            raise errors.EnvironmentUnfit(
                f"cannot hold TCP connections: {exc}",
                hint="load the modules nf_tables and nft_reject_inet",
            ) from exc
        yield made
    finally:
        made.end()
        release(name, network=network)


class Held:
    """A hold, from ``begin`` to ``end``; ``held`` and ``apart`` call both."""

    def __init__(self, name: str, network: int | None, limit_s: float | None) -> None:
        self.name = name
        self.network = network
        self._limit = clock.Deadline.after(float("inf") if limit_s is None else limit_s)
        self._lease = clock.Deadline.after(float("inf"))
        self._failure: errors.CkptError | None = None
        self._ended = threading.Event()
        self._keeper: threading.Thread | None = None

    def check(self) -> None:
        """Return if the connections have been silent without a gap.

        Raises:
            errors.DeadlineExceeded: the kernel let go of them.
        """
        if self._lease.expired:
            raise errors.DeadlineExceeded(
                "the job's connections could not be kept silent long enough",
                hint="the node is too busy, or the operation took too long: try again",
            ) from self._failure

    def begin(self, rules: Sequence[nftables.Change]) -> None:
        """Make the table with these rules, and see to it that it goes on."""
        lease = self._next()
        _there(self.network, lambda: _install(self.name, rules, lease.remaining_s))
        self._lease = lease
        self._keeper = threading.Thread(target=self._keep, name="hold", daemon=True)
        self._keeper.start()

    def let_through(self) -> None:
        """Hold nothing any more: at once, while taking the table away waits for the whole machine
        (some milliseconds).
        """
        if self._keeper is not None:
            _there(self.network, lambda: netfilter.accept_all(self.name, _CHAIN))

    def end(self) -> None:
        """Ask for no more time."""
        self._ended.set()
        if self._keeper is not None:
            self._keeper.join()

    def _next(self) -> clock.Deadline:
        # Time counts from before the question, so that the kernel's own is never shorter.
        return self._limit.sooner(LEASE_S)

    def _keep(self) -> None:
        while not self._ended.wait(LEASE_S / _RENEWALS) and not self._limit.expired:
            lease = self._next()
            try:
                if not self._renewed(lease):
                    return
            except errors.CkptError as exc:
                self._failure = exc
                return
            self._lease = lease

    def _renewed(self, lease: clock.Deadline) -> bool:
        def renew() -> bool:
            return netfilter.renew_key(self.name, _LIVE, _LIVE_KEY, lease.remaining_s)

        return _there(self.network, renew)


def release(name: str, *, network: int | None = None) -> bool:
    """Let go; False if there was nothing to let go."""
    return _there(network, lambda: netfilter.delete_table(name))


def _there(network: int | None, function: Callable[[], _T]) -> _T:
    return function() if network is None else namespaces.within([network], function)


def _install(name: str, rules: Sequence[nftables.Change], span_s: float) -> None:
    nftables.commit(
        nftables.add_table(name),
        nftables.add_set(name, _LIVE, _PROTOCOL, len(_LIVE_KEY), netfilter.milliseconds(LEASE_S)),
        nftables.add_input_chain(name, _CHAIN, _PRIORITY),
        *rules,
        nftables.add_key(name, _LIVE, _LIVE_KEY, netfilter.milliseconds(span_s)),
    )


def _refuse_from(name: str, addresses: Iterable[str], loopback: bool) -> list[nftables.Change]:
    packed = {ipaddress.ip_address(each).packed for each in addresses}
    tcp = [*(nftables.meta(_META_L4PROTO), nftables.within(_LIVE))]
    flags = nftables.payload(_TRANSPORT_HEADER, _FLAGS_AT, 1)
    changes: list[nftables.Change] = []
    sources: list[list[bytes]] = []
    for version, key_type in _ADDRESS_KEYS.items():
        width = 4 if version == 4 else 16
        keys = sorted(each for each in packed if len(each) == width)
        if keys:
            known = f"v{version}"
            changes.append(nftables.add_set(name, known, key_type, width, 0))
            changes += [nftables.add_key(name, known, each, 0) for each in keys]
            sources.append(
                [
                    *(nftables.meta(_META_NFPROTO), nftables.equals(bytes([_NFPROTO[version]]))),
                    nftables.payload(_NETWORK_HEADER, _ADDRESSES_AT[version], width),
                    nftables.within(known),
                ]
            )
    if loopback:
        sources.append([nftables.meta(_META_IIF), nftables.equals(_LOOPBACK)])
    for each in sources:
        # A reset is said once only: who does not hear it waits for ever.
        let_be = [flags, nftables.any_of(_RST), nftables.verdict(nftables.ACCEPT)]
        # One that connects would take a refusal for the answer, and asks again by itself.
        lose = [flags, nftables.any_of(_SYN), nftables.verdict(nftables.DROP)]
        for end in (let_be, lose, [nftables.reject()]):
            changes.append(nftables.add_rule(name, _CHAIN, [*each, *tcp, *end]))
    return changes


def _drop_arriving(name: str, connections: Iterable[Connection]) -> list[nftables.Change]:
    """A rule for each version of IP, whose connections are in a set: however many they are, each
    packet of the machine meets no more than these.
    """
    keys: dict[int, set[bytes]] = {4: set(), 6: set()}
    for each in connections:
        version, key = _key(each)
        keys[version].add(key)
    changes: list[nftables.Change] = []
    for version, found in keys.items():
        if found:
            known, kind = f"held{version}", 0
            for part in (*[_ADDRESS_KEYS[version]] * 2, *[_PORT_KEYS] * 2):
                kind = kind << _KEY_BITS | part
            changes.append(nftables.add_set(name, known, kind, len(next(iter(found))), 0))
            changes += [nftables.add_key(name, known, key, 0) for key in sorted(found)]
            changes.append(nftables.add_rule(name, _CHAIN, _drop_known(version, known)))
    return changes


def _key(each: Connection) -> tuple[int, bytes]:
    """By which version it travels, and source, target and their ports as they arrive."""
    source, target = ipaddress.ip_address(each.remote), ipaddress.ip_address(each.local)
    mapped = [getattr(address, "ipv4_mapped", None) for address in (source, target)]
    # A connection of an IPv6 socket to an IPv4 address travels as IPv4.
    packed = [(m or a).packed for m, a in zip(mapped, (source, target), strict=True)]
    ports = [
        port.to_bytes(2, "big").ljust(nftables.PART_BYTES, b"\0")
        for port in (each.remote_port, each.local_port)
    ]
    return 4 if len(packed[0]) == 4 else 6, b"".join(packed + ports)


def _drop_known(version: int, known: str) -> list[bytes]:
    addresses_bytes = 8 if version == 4 else 32
    ports = nftables.PARTS + addresses_bytes // nftables.PART_BYTES
    at = _ADDRESSES_AT[version]
    return [
        *(nftables.meta(_META_NFPROTO), nftables.equals(bytes([_NFPROTO[version]]))),
        *(nftables.meta(_META_L4PROTO), nftables.within(_LIVE)),
        nftables.payload(_NETWORK_HEADER, at, addresses_bytes, nftables.PARTS),
        nftables.payload(_TRANSPORT_HEADER, 0, 2, ports),
        nftables.payload(_TRANSPORT_HEADER, 2, 2, ports + 1),
        *(nftables.within(known, nftables.PARTS), nftables.verdict(nftables.DROP)),
    ]
