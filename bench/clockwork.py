"""A job with a clock of its own: ``python -m bench.clockwork DIRECTORY --bytes N``.

It holds N bytes that do not compress (with ``--memfd`` in one shared memory object), writes one
word to 1 % of its pages every second, evenly, and notes its longest pause: the longest time between
two looks at the clock. With ``--processes`` and ``--threads`` it is a tree: the bytes and the
writing are shared out among the processes, the threads wait, and only the root looks at the clock.
``--direct`` reads a file past the page cache every hundredth of a second; ``--asynchronous`` is
ready for I/O that goes on by itself, so that its writes cannot be followed.

``DIRECTORY/pause`` is a shared page: at 0 the longest pause in seconds (a double), set back by
whoever asks; at 8 how often it looked (u64).

Promises: it looks at the clock at least every millisecond unless it is kept from it.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import struct
import sys
import threading
import time

import numpy as np
from numpy import typing as npt

from bench import mortal

PAUSE, LOOKS = struct.Struct("=d"), struct.Struct("=Q")
SHARE_PER_S = 0.01
_PAGE_BYTES = 4096
_REST_S = 0.0005
_READ_BYTES = 64 << 10
_READ_S = 0.01
_NR_IO_SETUP = {"x86_64": 206, "aarch64": 0}


def main(arguments: list[str]) -> None:
    """Does not return."""
    parser = argparse.ArgumentParser(prog="python -m bench.clockwork", description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--memfd", action="store_true")
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    mortal.end_with_parent()
    _use_files(options)
    pages = options.bytes // options.processes // _PAGE_BYTES
    is_root = True
    for _ in range(options.processes - 1):
        if not os.fork():
            is_root = False
            mortal.end_with_parent()
            break
    for _ in range(options.threads // options.processes - 1):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
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
        if is_root and gap > PAUSE.unpack_from(shown)[0]:
            PAUSE.pack_into(shown, 0, gap)
        looks += 1
        if is_root:
            LOOKS.pack_into(shown, 8, looks)
        # What was missed in a long pause is not made up for.
        due = min(due + gap * SHARE_PER_S * pages, SHARE_PER_S * pages)
        while due >= 1:
            words[order[written % pages], written % 512] += np.uint64(1)
            written += 1
            due -= 1
        time.sleep(_REST_S)


def _use_files(options: argparse.Namespace) -> None:
    if options.direct:
        path = os.path.join(options.directory, "direct")
        threading.Thread(target=_read_directly, args=(path,), daemon=True).start()
    if options.asynchronous:
        _have_asynchronous_io()


def _read_directly(path: str) -> None:
    with open(path, "wb") as file:
        file.write(bytes(_READ_BYTES))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    into = mmap.mmap(-1, _READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    while True:
        os.preadv(descriptor, [into], 0)
        time.sleep(_READ_S)


def _have_asynchronous_io() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_NR_IO_SETUP[platform.machine()], 1, ctypes.byref(ctypes.c_ulong())):
        raise OSError(ctypes.get_errno(), "io_setup")


def _memory(pages: int, *, shared: bool) -> npt.NDArray[np.uint64]:
    if not shared:
        return np.empty((pages, _PAGE_BYTES // 8), dtype=np.uint64)
    descriptor = os.memfd_create("bench")
    os.ftruncate(descriptor, pages * _PAGE_BYTES)
    held = mmap.mmap(descriptor, pages * _PAGE_BYTES)
    return np.frombuffer(held, dtype=np.uint64).reshape(pages, -1)


if __name__ == "__main__":
    main(sys.argv[1:])
