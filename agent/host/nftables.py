"""nf_tables over netlink: transactions on tables of the family ``inet``, and listings.

The kernel's own interface, written out: what is needed of it is small, and a library for it takes
ten megabytes in a service that runs on every node.

Promises: a transaction happens whole or not at all; what the kernel refuses is an ``OSError`` with
its errno; every wait ends after ``ANSWER_S``.
Does not: know what the tables are for.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator

# A transaction is made before the kernel lets go of its sender, and a listing as it is read.
ANSWER_S = 10.0

# include/uapi/linux/netlink.h
_NETFILTER = 12
_REQUEST, _ACK, _CREATE, _APPEND, _DUMP = 0x1, 0x4, 0x400, 0x800, 0x300
_ERROR, _DONE = 2, 3
_NESTED = 0x8000
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
# include/uapi/asm-generic/socket.h: beyond the usual limit, for a transaction of many rules.
_SO_SNDBUFFORCE = 32
_READ_BYTES = 1 << 20

# include/uapi/linux/netfilter/nfnetlink.h: family, version and, big-endian, a resource.
_GENERIC = struct.Struct("=BB2s")
_SUBSYSTEM = 10
_BEGIN, _END = 16, 17
# include/uapi/linux/netfilter.h
_INET, _LOCAL_IN, ACCEPT, DROP = 1, 1, 1, 0

# include/uapi/linux/netfilter/nf_tables.h, in its order: messages, then attributes.
_NEW_TABLE, _GET_TABLE, _DEL_TABLE, _NEW_CHAIN, _NEW_RULE = 0, 1, 2, 3, 6
_NEW_SET, _NEW_ELEMENT, _GET_ELEMENT, _DEL_ELEMENT = 9, 12, 13, 14
_LIST_ELEM = 1
_TABLE_NAME = 1
_CHAIN_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOK_NUMBER, _HOOK_PRIORITY = 1, 2
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4
_EXPR_NAME, _EXPR_DATA = 1, 2
_SET_TABLE, _SET_NAME, _SET_FLAGS, _SET_KEY_TYPE, _SET_KEY_BYTES = 1, 2, 3, 4, 5
_SET_ID, _SET_TIMEOUT = 10, 11
_WITH_TIMEOUTS = 0x10
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS = 1, 2, 3
_ELEMENT_KEY, _ELEMENT_TIMEOUT = 1, 4
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE = 1
# NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_NO_ROUTE
_ICMP_OF_EITHER, _NO_ROUTE = 2, 0
# The register that expressions hand values on in, where nothing else is said, and the first of the
# 16 of four bytes each for values of several parts.
_REGISTER, _VERDICT_REGISTER = 1, 0
PARTS = 8
PART_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Change:
    """One step of a transaction."""

    kind: int
    flags: int
    attributes: bytes


def add_table(name: str) -> Change:
    """A table; one of that name stays as it is."""
    return Change(_NEW_TABLE, _CREATE, _text(_TABLE_NAME, name))


def delete_table(name: str) -> Change:
    """A table goes, with all that is in it (ENOENT: there is none)."""
    return Change(_DEL_TABLE, 0, _text(_TABLE_NAME, name))


def add_input_chain(table: str, name: str, priority: int) -> Change:
    """A chain that sees what arrives for this network namespace, and lets pass what no rule
    drops.
    """
    hook = _number(_HOOK_NUMBER, _LOCAL_IN) + _number(_HOOK_PRIORITY, priority)
    return Change(
        _NEW_CHAIN,
        _CREATE,
        _text(_CHAIN_TABLE, table)
        + _text(_CHAIN_NAME, name)
        + _nest(_CHAIN_HOOK, hook)
        + _number(_CHAIN_POLICY, ACCEPT)
        + _text(_CHAIN_TYPE, "filter"),
    )


def add_set(table: str, name: str, key_type: int, key_bytes: int, timeout_ms: int) -> Change:
    """A set whose elements leave after ``timeout_ms``, or a time of their own; with 0 they stay.
    ``key_type`` is what nft calls the keys by, and means nothing to the kernel.
    """
    return Change(
        _NEW_SET,
        _CREATE,
        _text(_SET_TABLE, table)
        + _text(_SET_NAME, name)
        + _number(_SET_FLAGS, _WITH_TIMEOUTS if timeout_ms else 0)
        + _number(_SET_KEY_TYPE, key_type)
        + _number(_SET_KEY_BYTES, key_bytes)
        + _number(_SET_ID, 1)
        + (_long(_SET_TIMEOUT, timeout_ms) if timeout_ms else b""),
    )


def add_key(table: str, name: str, key: bytes, timeout_ms: int) -> Change:
    """A key is in a set for that long; 0 in a set without times: as long as the set is there."""
    return Change(_NEW_ELEMENT, _CREATE, _element(table, name, key, timeout_ms))


def delete_key(table: str, name: str, key: bytes) -> Change:
    """A key leaves a set (ENOENT: it was not in it, or there is no such set)."""
    return Change(_DEL_ELEMENT, 0, _element(table, name, key, 0))


def add_rule(table: str, chain: str, expressions: Iterable[bytes]) -> Change:
    """A rule behind the others: what passes all ``expressions`` meets the last of them, a
    verdict.
    """
    return _rule(_APPEND, table, chain, expressions)


def insert_rule(table: str, chain: str, expressions: Iterable[bytes]) -> Change:
    """As ``add_rule``, before the others."""
    return _rule(0, table, chain, expressions)


def _rule(flags: int, table: str, chain: str, expressions: Iterable[bytes]) -> Change:
    return Change(
        _NEW_RULE,
        _CREATE | flags,
        _text(_RULE_TABLE, table)
        + _text(_RULE_CHAIN, chain)
        + _nest(_RULE_EXPRESSIONS, b"".join(expressions)),
    )


def meta(key: int) -> bytes:
    """Take what is known of a packet (``NFT_META_*``)."""
    return _expression("meta", _number(1, _REGISTER) + _number(2, key))


def payload(base: int, offset: int, length: int, register: int = _REGISTER) -> bytes:
    """Take bytes of a packet's header (``NFT_PAYLOAD_*``), with zeros behind them in the last part
    of the register.
    """
    where = (register, base, offset, length)
    return _expression("payload", b"".join(_number(n, v) for n, v in enumerate(where, 1)))


def equals(value: bytes) -> bytes:
    """Pass if what was taken is ``value``."""
    data = _nest(3, _attribute(_DATA_VALUE, value))
    return _expression("cmp", _number(1, _REGISTER) + _number(2, 0) + data)


def any_of(bits: int) -> bytes:
    """Pass if one of ``bits`` is set in the one byte that was taken."""
    mask, nothing = _attribute(_DATA_VALUE, bytes([bits])), _attribute(_DATA_VALUE, b"\0")
    registers = _number(1, _REGISTER) + _number(2, _REGISTER) + _number(3, 1)
    masked = _expression("bitwise", registers + _nest(4, mask) + _nest(5, nothing))
    return masked + _expression("cmp", _number(1, _REGISTER) + _number(2, 1) + _nest(3, nothing))


def within(name: str, register: int = _REGISTER) -> bytes:
    """Pass if what was taken is in the table's set ``name``."""
    return _expression("lookup", _text(1, name) + _number(2, register))


def verdict(code: int) -> bytes:
    """End with ``ACCEPT`` or ``DROP``."""
    data = _nest(_DATA_VERDICT, _number(_VERDICT_CODE, code))
    return _expression("immediate", _number(1, _VERDICT_REGISTER) + _nest(2, data))


def reject() -> bytes:
    """End with refusing the packet: its sender hears that there is no way (ICMP's network
    unreachable, or ICMPv6's no route to destination).
    """
    return _expression("reject", _number(1, _ICMP_OF_EITHER) + _attribute(2, bytes([_NO_ROUTE])))


def commit(*changes: Change) -> None:
    """Make all changes at once.

    Raises:
        OSError: the kernel refused one, and nothing has changed (EPERM: CAP_NET_ADMIN is missing).
    """
    last = len(changes)
    messages = [_message(_BEGIN, _REQUEST, 0, _edge())]
    for number, change in enumerate(changes, 1):
        # Each refusal is told anyway; one assent is enough.
        flags = _REQUEST | change.flags | (_ACK if number == last else 0)
        messages.append(_message(_kind(change.kind), flags, number, _inet() + change.attributes))
    messages.append(_message(_END, _REQUEST, last + 1, _edge()))
    with _asked(b"".join(messages)) as link:
        for kind, sequence, body in _answers(link):
            if kind == _ERROR:
                _raise(body)
                if sequence == last:
                    return


def tables() -> list[str]:
    """The names of the tables.

    Raises:
        OSError: the kernel does not tell.
    """
    found = []
    for body in _listed(_GET_TABLE, b""):
        found += [value for kind, value in _attributes(body) if kind == _TABLE_NAME]
    return [name.rstrip(b"\0").decode("utf-8", "replace") for name in found]


def keys(table: str, name: str) -> list[bytes]:
    """The keys of a set.

    Raises:
        OSError: the kernel does not tell (ENOENT: there is no such set).
    """
    found = []
    for body in _listed(_GET_ELEMENT, _text(_LIST_TABLE, table) + _text(_LIST_SET, name)):
        for element in _below(body, _LIST_ELEMENTS, _LIST_ELEM):
            found += list(_below(element, _ELEMENT_KEY, _DATA_VALUE))
    return found


def _listed(kind: int, attributes: bytes) -> Iterator[bytes]:
    """The attributes of each object of an answer in parts."""
    question = _message(_kind(kind), _REQUEST | _DUMP, 1, _inet() + attributes)
    with _asked(question) as link:
        for answer, _, body in _answers(link):
            if answer in (_ERROR, _DONE):
                _raise(body)
                return
            yield body[_GENERIC.size :]


def _asked(message: bytes) -> socket.socket:
    """A socket that has sent ``message``; the caller closes it."""
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
    try:
        link.settimeout(ANSWER_S)
        if len(message) > link.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) // 2:
            link.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, 2 * len(message))
        link.bind((0, 0))
        link.sendto(message, (0, 0))
    except BaseException:
        link.close()
        raise
    return link


def _answers(link: socket.socket) -> Iterator[tuple[int, int, bytes]]:
    """The type, sequence and body of each message that comes."""
    while True:
        part = link.recv(_READ_BYTES)
        at = 0
        while at + _HEADER.size <= len(part):
            length, kind, _, sequence, _ = _HEADER.unpack_from(part, at)
            if length < _HEADER.size:
                raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
            yield kind, sequence, part[at + _HEADER.size : at + length]
            at += _aligned(length)


def _raise(body: bytes) -> None:
    """Raise what an answer says went wrong, if anything did."""
    (negative,) = struct.unpack_from("=i", body)
    if negative < 0:
        raise OSError(-negative, os.strerror(-negative))


def _kind(message: int) -> int:
    return _SUBSYSTEM << 8 | message


def _inet() -> bytes:
    return _GENERIC.pack(_INET, 0, bytes(2))


def _edge() -> bytes:
    return _GENERIC.pack(0, 0, _SUBSYSTEM.to_bytes(2, "big"))


def _message(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def _nest(kind: int, attributes: bytes) -> bytes:
    return _attribute(kind | _NESTED, attributes)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, value.to_bytes(4, "big", signed=value < 0))


def _long(kind: int, value: int) -> bytes:
    return _attribute(kind, value.to_bytes(8, "big"))


def _expression(name: str, data: bytes) -> bytes:
    return _nest(_LIST_ELEM, _text(_EXPR_NAME, name) + _nest(_EXPR_DATA, data))


def _element(table: str, name: str, key: bytes, timeout_ms: int) -> bytes:
    element = _nest(_ELEMENT_KEY, _attribute(_DATA_VALUE, key))
    if timeout_ms:
        element += _long(_ELEMENT_TIMEOUT, timeout_ms)
    elements = _nest(_LIST_ELEMENTS, _nest(_LIST_ELEM, element))
    return _text(_LIST_TABLE, table) + _text(_LIST_SET, name) + elements


def _attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(content):
        length, kind = _ATTRIBUTE.unpack_from(content, at)
        if length < _ATTRIBUTE.size:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        yield kind & ~_NESTED, content[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)


def _below(content: bytes, *path: int) -> Iterator[bytes]:
    """The values of the attributes ``path``, each within the one before."""
    for kind, value in _attributes(content):
        if kind == path[0]:
            if len(path) == 1:
                yield value
            else:
                yield from _below(value, *path[1:])


def _aligned(length: int) -> int:
    return (length + 3) & ~3
