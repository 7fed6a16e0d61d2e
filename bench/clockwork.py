"""A process with a clock of its own: ``python -m bench.clockwork DIRECTORY --bytes N``.

It holds N bytes that do not compress (with ``--memfd`` in one shared memory object), writes one
word to 1 % of its pages every second, evenly, and notes its longest pause: the longest time between
two looks at the clock. ``DIRECTORY/pause`` is a
shared page: at 0 the longest pause in seconds (a double), set back by whoever asks; at 8 how often
it looked (u64).

Promises: it looks at the clock at least every millisecond unless it is kept from it.
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import sys
import time

import numpy as np
from numpy import typing as npt

PAUSE, LOOKS = struct.Struct("=d"), struct.Struct("=Q")
SHARE_PER_S = 0.01
_PAGE_BYTES = 4096
_REST_S = 0.0005


def main(arguments: list[str]) -> None:
    """Does not return."""
    parser = argparse.ArgumentParser(prog="python -m bench.clockwork", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--memfd", action="store_true")
    options = parser.parse_args(arguments)
    pages = options.bytes // _PAGE_BYTES
    draw = np.random.default_rng(1)
    words = _memory(pages, shared=options.memfd)
    for at in range(0, pages, 1 << 15):
        part = words[at : at + (1 << 15)]
        part[:] = draw.integers(0, 1 << 64, part.shape, dtype=np.uint64)
    order = draw.permutation(pages)
    with open(os.path.join(options.directory, "pause"), "r+b") as file:
        shown = mmap.mmap(file.fileno(), _PAGE_BYTES)
    last, due, written, looks = time.monotonic(), 0.0, 0, 0
    while True:
        now = time.monotonic()
        gap, last = now - last, now
        if gap > PAUSE.unpack_from(shown)[0]:
            PAUSE.pack_into(shown, 0, gap)
        looks += 1
        LOOKS.pack_into(shown, 8, looks)
        # What was missed in a long pause is not made up for.
        due = min(due + gap * SHARE_PER_S * pages, SHARE_PER_S * pages)
        while due >= 1:
            words[order[written % pages], written % 512] += np.uint64(1)
            written += 1
            due -= 1
        time.sleep(_REST_S)


def _memory(pages: int, *, shared: bool) -> npt.NDArray[np.uint64]:
    if not shared:
        return np.empty((pages, _PAGE_BYTES // 8), dtype=np.uint64)
    descriptor = os.memfd_create("bench")
    os.ftruncate(descriptor, pages * _PAGE_BYTES)
    held = mmap.mmap(descriptor, pages * _PAGE_BYTES)
    return np.frombuffer(held, dtype=np.uint64).reshape(pages, -1)


if __name__ == "__main__":
    main(sys.argv[1:])
