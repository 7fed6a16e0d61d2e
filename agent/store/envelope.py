"""The wrapping of every small file of a store: what it is, how long it is, and its digest.

``magic[8] version[2] kind[2] zero[4] length[8] body[length] digest[32]``, little-endian; the
digest is BLAKE3-256 over all that precedes it.

Promises: any changed bit, any missing byte and any byte too many is found when a file is opened;
a version that this program does not know is told apart from damage.
Does not: know what bodies mean.
"""

from __future__ import annotations

import enum
import struct

from agent import errors
from agent.store.digest import DIGEST_BYTES, digest

FORMAT_VERSION = 1
MAGIC = b"CKPTFILE"
_HEADER = struct.Struct("<8sHHIQ")
# All that another version is sure to have in common with this one.
_VERSION_END = len(MAGIC) + 2
OVERHEAD_BYTES = _HEADER.size + DIGEST_BYTES


class Kind(enum.IntEnum):
    """What a body is. The numbers are part of the format."""

    STORE = 1
    EPOCH = 2
    MEMBER = 3
    PACK_INDEX = 4
    INTENT = 5
    SUSPECT = 6
    ABANDONMENT = 7
    JOINT_INTENT = 8


def seal(kind: Kind, body: bytes) -> bytes:
    """Return ``body`` in its envelope."""
    sealed = _HEADER.pack(MAGIC, FORMAT_VERSION, kind, 0, len(body)) + body
    return sealed + digest(sealed)


def unseal(kind: Kind, sealed: bytes, *, part: str) -> bytes:
    """Return the body of a file of that kind; ``part`` names it in errors.

    Raises:
        errors.UnknownFormat: it claims a version that this program does not know, and nothing
            more can be said.
        errors.Corrupt: it is damaged, or something else.
    """
    if len(sealed) < _VERSION_END or not sealed.startswith(MAGIC):
        raise errors.Corrupt(f"{part} is not a file of a store", part=part)
    version = int.from_bytes(sealed[len(MAGIC) : _VERSION_END], "little")
    if version != FORMAT_VERSION and not _is_version_one_damaged(sealed):
        raise errors.UnknownFormat(
            f"{part} has format version {version}; this program knows {FORMAT_VERSION}",
            hint="use the version of ckpt-agent that wrote it, or a newer one",
            part=part,
            version=version,
        )
    if len(sealed) < OVERHEAD_BYTES:
        raise errors.Corrupt(f"{part} is cut short", part=part)
    _, _, found_kind, zero, length = _HEADER.unpack_from(sealed)
    if digest(memoryview(sealed)[:-DIGEST_BYTES]) != sealed[-DIGEST_BYTES:]:
        raise errors.Corrupt(f"{part} does not match its digest", part=part)
    if found_kind != kind or zero != 0 or length != len(sealed) - OVERHEAD_BYTES:
        raise errors.Corrupt(f"{part} is a file of another kind or length", part=part)
    return sealed[_HEADER.size : -DIGEST_BYTES]


def claims(kind: Kind, sealed: bytes) -> bool:
    """Tell whether a file's header says this kind, whatever follows it."""
    header = sealed[: _HEADER.size]
    return (
        header.startswith(MAGIC)
        and len(header) == _HEADER.size
        and (_HEADER.unpack(header)[2] == kind)
    )


def _is_version_one_damaged(sealed: bytes) -> bool:
    """Tell whether only the version was changed: the digest fits with the version put right."""
    fixed = MAGIC + FORMAT_VERSION.to_bytes(2, "little") + sealed[_VERSION_END:]
    return digest(memoryview(fixed)[:-DIGEST_BYTES]) == fixed[-DIGEST_BYTES:]
