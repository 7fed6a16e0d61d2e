"""The hold: TCP segments of named connections are kept from arriving while their ends are rebuilt.

An end that exists before its peer must not be heard: the kernel would answer its first segment
with a reset. Segments are dropped where they arrive, so the sender simply sends them again (a drop
where they leave would count as congestion at the sender and stall it for seconds).

Promises: only the connections named are touched; the table is gone when the context is left, and
``release`` of the same name removes what a dead owner left.
Does not: hold UDP, or connections of other network namespaces.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.nftables.expressions import genex, verdict
from pyroute2.nftables.main import NFTables

from agent import errors
from agent.host import netfilter

# include/uapi/linux/netfilter.h and nf_tables.h
_INET, _DROP = 1, 0
_NFPROTO = {4: 2, 6: 10}
_META_NFPROTO, _META_L4PROTO = 15, 16
_NETWORK_HEADER, _TRANSPORT_HEADER = 1, 2
# Where the two addresses, source first, begin in the IPv4 and in the IPv6 header.
_ADDRESSES_AT = {4: 12, 6: 8}
_REGISTER = 1
# Before connection tracking and everybody else's rules, like the hold's own purpose.
_PRIORITY = -400


@dataclasses.dataclass(frozen=True)
class Connection:
    """A TCP connection as one of its ends sees it: addresses without zone, and ports."""

    local: str
    local_port: int
    remote: str
    remote_port: int


@contextlib.contextmanager
def held(name: str, connections: Iterable[Connection]) -> Iterator[None]:
    """Hold what arrives for the local ends of ``connections`` in this network namespace, by an
    nf_tables table called ``name``.

    Raises:
        errors.PrivilegeMissing: CAP_NET_ADMIN is missing.
        errors.EnvironmentUnfit: the kernel cannot filter (no nf_tables).
    """
    wanted = sorted(set(connections), key=dataclasses.astuple)
    if not wanted:
        yield
        return
    release(name)
    try:
        try:
            _install(name, wanted)
        except NetlinkError as exc:
            if exc.code == errno.EPERM:
                raise errors.PrivilegeMissing(
                    "not allowed to filter packets", hint="run as root with CAP_NET_ADMIN"
                ) from exc
            raise errors.EnvironmentUnfit(
                f"cannot hold TCP connections: {exc}", hint="load the module nf_tables"
            ) from exc
        yield
    finally:
        release(name)


def release(name: str) -> bool:
    """Let go; False if there was nothing to let go."""
    return netfilter.delete_table(name)


def _install(name: str, connections: Iterable[Connection]) -> None:
    with NFTables(nfgen_family=_INET) as nft:
        nft.table("add", name=name)
        nft.chain("add", table=name, name="arrive", hook="input", priority=_PRIORITY, policy=1)
        for each in connections:
            nft.rule("add", table=name, chain="arrive", expressions=_drop_arriving(each))


def _drop_arriving(each: Connection) -> list[list[dict[str, Any]]]:
    source, target = ipaddress.ip_address(each.remote), ipaddress.ip_address(each.local)
    mapped = [getattr(address, "ipv4_mapped", None) for address in (source, target)]
    # A connection of an IPv6 socket to an IPv4 address travels as IPv4.
    packed = [(m or a).packed for m, a in zip(mapped, (source, target), strict=True)]
    version = 4 if len(packed[0]) == 4 else 6
    width = len(packed[0])
    at = _ADDRESSES_AT[version]
    ports = each.remote_port.to_bytes(2, "big") + each.local_port.to_bytes(2, "big")
    return [
        _meta_is(_META_NFPROTO, _NFPROTO[version]),
        _meta_is(_META_L4PROTO, socket.IPPROTO_TCP),
        _header_is(_NETWORK_HEADER, at, packed[0]),
        _header_is(_NETWORK_HEADER, at + width, packed[1]),
        _header_is(_TRANSPORT_HEADER, 0, ports),
        verdict(_DROP),
    ]


def _meta_is(key: int, value: int) -> list[dict[str, Any]]:
    return [genex("meta", {"key": key, "dreg": _REGISTER}), _equals(bytes([value]))]


def _header_is(base: int, offset: int, value: bytes) -> list[dict[str, Any]]:
    where = {"dreg": _REGISTER, "base": base, "offset": offset, "len": len(value)}
    return [genex("payload", where), _equals(value)]


def _equals(value: bytes) -> dict[str, Any]:
    data = {"attrs": [("NFTA_DATA_VALUE", value)]}
    return dict(genex("cmp", {"sreg": _REGISTER, "op": 0, "data": data}))
