"""How blocks and tables are compressed: zstd, or as they are.

Promises: what comes back has the expected size or ``errors.Corrupt`` is raised, without
allocating more than that size; safe from several threads.
Does not: find changes that zstd's own 32-bit checksum misses; digests do.
"""

from __future__ import annotations

import enum
import threading

import zstandard

from agent import errors

# Level 1 gives 95 % of level 3's gain on process memory at twice the speed.
_LEVEL = 1
# Below this gain a block is stored as it is: reading it back is then a copy.
_WORTH = 0.97
# zstd may demand this much history; blocks and tables are smaller.
_MAX_WINDOW = 1 << 27

_per_thread = threading.local()


class Codec(enum.IntEnum):
    """How a block is stored. The numbers are part of the format."""

    RAW = 0
    ZSTD = 1


def compress(data: bytes | bytearray | memoryview) -> bytes:
    """Return one zstd frame that states its size and carries a checksum of ``data``."""
    compressor = getattr(_per_thread, "compressor", None)
    if compressor is None:
        compressor = zstandard.ZstdCompressor(
            level=_LEVEL, write_checksum=True, write_content_size=True
        )
        _per_thread.compressor = compressor
    frame: bytes = compressor.compress(data)
    return frame


def compress_if_worth(data: memoryview) -> tuple[Codec, bytes | memoryview]:
    """Return ``data`` compressed, or as it is where that gains less than 3 %."""
    frame = compress(data)
    if len(frame) > len(data) * _WORTH:
        return Codec.RAW, data
    return Codec.ZSTD, frame


def decompress(frame: bytes | memoryview, size_bytes: int) -> bytes:
    """Return the ``size_bytes`` that one frame holds.

    Raises:
        errors.Corrupt: it is no such frame, or something follows it.
    """
    decompressor = getattr(_per_thread, "decompressor", None)
    if decompressor is None:
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        _per_thread.decompressor = decompressor
    try:
        # Looked at first, because the library allocates what the frame says, not what we allow.
        if zstandard.frame_content_size(frame) != size_bytes:
            raise errors.Corrupt("a compressed part states another size than its index")
        data: bytes = decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as exc:
        raise errors.Corrupt("a compressed part cannot be decompressed") from exc
    if len(data) != size_bytes:
        raise errors.Corrupt("a compressed part has another size than it states")
    return data


def restore(codec: int, stored: bytes, size_bytes: int) -> bytes:
    """Undo ``compress_if_worth``; raises ``errors.Corrupt`` as ``decompress`` does."""
    if codec == Codec.ZSTD:
        return decompress(stored, size_bytes)
    if codec != Codec.RAW or len(stored) != size_bytes:
        raise errors.Corrupt("a block has an unknown encoding or a wrong size")
    return stored
