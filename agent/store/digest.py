"""The one cryptographic digest of the format: BLAKE3 with 256 bits.

Promises: finds any change of what it covers, also one that was made on purpose.
Does not: use a key; page identity (``identity``) does.
"""

from __future__ import annotations

import blake3

DIGEST_BYTES = 32


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """Return the digest of ``data``; lets other threads run meanwhile."""
    return blake3.blake3(data).digest()
