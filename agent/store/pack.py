"""A pack: blocks of pages one after another, then an index that names them.

``header[16]``, the stored blocks, and the index in an envelope. The header is constant, each block
has a digest of its stored bytes in the index, the index has its own digest, and a member's
manifest says where the index lies: every byte of the file is covered. Index: *blocks* (4), *pages*
(4), then columns: *pages* of each block (2), *stored bytes* (4), *codec* (1), *digest* (32), and
for each page its *tag* (16).

Promises: an index that ``decode`` returns describes a file of exactly the size that it states.
Does not: read, write or compress anything.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.streams import PAGE_BYTES
from agent.store import envelope
from agent.store.codec import Codec
from agent.store.digest import DIGEST_BYTES
from agent.store.identity import TAG_BYTES, Tags

HEADER = struct.pack("<8sHHI", b"CKPTPACK", envelope.FORMAT_VERSION, 0, 0)
# 1 MiB: zstd's gain is flat from here on, and one changed page costs at most this much to read.
BLOCK_PAGES = 256
MAX_BLOCK_PAGES = 4096  # what a reader takes; leaves room to choose again
# 512 MiB: large enough for a disk or an object store, small enough to die by itself.
PACK_PAGES = 1 << 17
MAX_PACK_PAGES = 1 << 20
_COUNTS = struct.Struct("<II")
_BLOCK_ENTRY_BYTES = 2 + 4 + 1 + DIGEST_BYTES
MAX_INDEX_BYTES = (
    envelope.OVERHEAD_BYTES + _COUNTS.size + MAX_PACK_PAGES * (_BLOCK_ENTRY_BYTES + TAG_BYTES)
)


@dataclasses.dataclass(frozen=True)
class PackIndex:
    """The blocks of one pack as columns, and the tags of its pages."""

    block_pages: npt.NDArray[np.int64]
    stored_bytes: npt.NDArray[np.int64]
    codecs: npt.NDArray[np.uint8]
    digests: bytes
    tags: Tags

    @property
    def pages(self) -> int:
        """Pages in all blocks."""
        return int(self.block_pages.sum())

    @property
    def first_pages(self) -> npt.NDArray[np.int64]:
        """The ordinal of each block's first page."""
        ends: npt.NDArray[np.int64] = np.cumsum(self.block_pages)
        return ends - self.block_pages

    @property
    def offsets(self) -> npt.NDArray[np.int64]:
        """Where each block begins in the file."""
        ends: npt.NDArray[np.int64] = np.cumsum(self.stored_bytes)
        return ends - self.stored_bytes + len(HEADER)

    @property
    def index_offset(self) -> int:
        """Where the index begins in the file."""
        return len(HEADER) + int(self.stored_bytes.sum())

    def digest(self, block: int) -> bytes:
        """The digest of a block's stored bytes."""
        return self.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]


def encode(index: PackIndex) -> bytes:
    """Return the sealed index."""
    body = b"".join(
        [
            _COUNTS.pack(len(index.block_pages), len(index.tags)),
            index.block_pages.astype("<u2").tobytes(),
            index.stored_bytes.astype("<u4").tobytes(),
            index.codecs.astype("u1").tobytes(),
            index.digests,
            index.tags.astype("<u8").tobytes(),
        ]
    )
    return envelope.seal(envelope.Kind.PACK_INDEX, body)


def decode(sealed: bytes, *, part: str) -> PackIndex:
    """Return what ``encode`` was given.

    Raises:
        errors.Corrupt: it is damaged or impossible.
        errors.UnknownFormat: it is of another version.
    """
    body = envelope.unseal(envelope.Kind.PACK_INDEX, sealed, part=part)
    if len(body) < _COUNTS.size:
        raise errors.Corrupt(f"{part} is cut short", part=part)
    blocks, pages = _COUNTS.unpack_from(body)
    expected = _COUNTS.size + blocks * _BLOCK_ENTRY_BYTES + pages * TAG_BYTES
    if pages > MAX_PACK_PAGES or len(body) != expected:
        raise errors.Corrupt(f"{part} states impossible sizes", part=part)
    at = _COUNTS.size
    block_pages = np.frombuffer(body, "<u2", blocks, at).astype(np.int64)
    at += 2 * blocks
    stored = np.frombuffer(body, "<u4", blocks, at).astype(np.int64)
    at += 4 * blocks
    codecs = np.frombuffer(body, "u1", blocks, at)
    at += blocks
    digests = body[at : at + DIGEST_BYTES * blocks]
    at += DIGEST_BYTES * blocks
    tags = np.frombuffer(body, "<u8", 2 * pages, at).reshape(-1, 2)
    possible = (
        (block_pages >= 1)
        & (block_pages <= MAX_BLOCK_PAGES)
        & (stored >= 1)
        & (stored <= block_pages * PAGE_BYTES)
        & ((codecs == Codec.ZSTD) | ((codecs == Codec.RAW) & (stored == block_pages * PAGE_BYTES)))
    )
    if not possible.all() or int(block_pages.sum()) != pages:
        raise errors.Corrupt(f"{part} describes an impossible block", part=part)
    return PackIndex(block_pages, stored, codecs, digests, tags)
