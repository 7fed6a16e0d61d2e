"""A file on a file system of our own (FUSE) that answers reads when it is told to.

Promises: what was read past the page cache is written into the reader's memory by ``answer``, not
before; closing it leaves no mount and nobody who waits.
"""

from __future__ import annotations

import collections
import ctypes
import errno
import os
import struct
import threading
from pathlib import Path

SIZE_BYTES = 1 << 20
_HEADER = struct.Struct("=IIQQIIII")
_ANSWER = struct.Struct("=IiQ")
# linux/fuse.h
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS = 1, 2, 3, 14, 15, 17
_RELEASE, _FLUSH, _INIT, _INTERRUPT = 18, 25, 26, 36
_ROOT, _FILE = 1, 2
_FORCE, _DETACH = 1, 2  # sys/mount.h: MNT_FORCE ends the connection, whoever has files open

_libc = ctypes.CDLL(None, use_errno=True)


class SlowFile:
    """``path`` is full of ``content``, one byte again and again. ``uncached``: everybody reads past
    the page cache.
    """

    def __init__(self, folder: Path, content: bytes, *, uncached: bool = False) -> None:
        self._folder, self._content, self._uncached = folder, content, uncached
        self._fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._fd},rootmode=40000,user_id=0,group_id=0".encode()
        if _libc.mount(b"slow", os.fsencode(folder), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), "mount")
        self.path = folder / "file"
        self._waiting: collections.deque[tuple[int, int]] = collections.deque()
        self._answering = threading.Lock()
        self.asked = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def answer(self) -> None:
        """Let all that wait have what they asked for."""
        self.asked.clear()
        with self._answering:
            while self._waiting:  # more may come meanwhile
                unique, size_bytes = self._waiting.popleft()
                self._say(unique, self._content * size_bytes)

    def close(self) -> None:
        """Let go of everybody."""
        self.answer()
        for how in (_FORCE, _DETACH):
            _libc.umount2(os.fsencode(self._folder), how)
        self._thread.join(10)
        os.close(self._fd)

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 20)
            except OSError:
                return  # unmounted
            _, command, unique, node, *_ = _HEADER.unpack_from(request)
            body = request[_HEADER.size :]
            if command == _READ:
                self._waiting.append((unique, struct.unpack_from("=QQI", body)[2]))
                self.asked.set()
            elif command == _INIT:
                first = struct.unpack_from("=II", body)
                limits = struct.pack("=HHIIHHI28x", 16, 12, 1 << 16, 1, 32, 0, 0)
                self._say(unique, struct.pack("=IIII", *first, 0, 0) + limits)
            elif command == _LOOKUP:
                head = struct.pack("=QQQQII", _FILE, 0, 0, 0, 0, 0)
                self._say(unique, head + self._attributes(_FILE))
            elif command == _GETATTR:
                self._say(unique, struct.pack("=QII", 0, 0, 0) + self._attributes(node))
            elif command == _OPEN:
                self._say(unique, struct.pack("=QII", 0, self._uncached, 0))  # FOPEN_DIRECT_IO
            elif command == _STATFS:
                self._say(unique, struct.pack("=5Q4I24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0))
            elif command in (_RELEASE, _FLUSH):
                self._say(unique, b"")
            elif command not in (_FORGET, _INTERRUPT):
                os.write(self._fd, _ANSWER.pack(_ANSWER.size, -errno.ENOSYS, unique))

    def _say(self, unique: int, body: bytes) -> None:
        os.write(self._fd, _ANSWER.pack(_ANSWER.size + len(body), 0, unique) + body)

    def _attributes(self, node: int) -> bytes:
        mode, size_bytes = (0o40755, 0) if node == _ROOT else (0o100644, SIZE_BYTES)
        times = struct.pack("=6Q", node, size_bytes, 0, 0, 0, 0)
        return times + struct.pack("=10I", 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
