"""Memory's overflow: a file without a name, on the local disk, that is written once and read once.

While a job stands still, a disk that takes what it is given into the page cache is several times
quicker than a store that compresses: 10 GB/s where the file has its pages there already, a seventh
of that, and at worst 0.6 GB/s, where the kernel must find memory for each page.

Promises: at most a tenth of the memory that is free when the first piece comes, beyond which Linux
makes writers wait for the disk (vm.dirty_background_ratio), and half of the room on the disk, of
which more is left than a kubelet wants (else it removes images, and then evicts pods);
what does not fit, or cannot be written, is refused. ``close`` leaves nothing, and so does death.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import IO

from agent import errors
from agent.host import system

_OF_MEMORY = 0.1
_OF_DISK = 0.5
# Of the whole disk: imageGCHighThresholdPercent is 85, evictionHard nodefs.available<10%.
_LEFT_OF_DISK = 0.15
_NOTHING = bytes(1 << 20)


class Spool:
    """One file in ``folder``, made when it is needed; without a folder there is no room. Writers
    take turns.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._most_bytes = self._prepared_bytes = 0
        self.size_bytes = 0

    def put(self, data: memoryview) -> Callable[[], memoryview] | None:
        """Write ``data``; what reads it back, or None if there is no room."""
        if self._folder is None:
            return None
        try:
            return self._put(self._opened(self._folder), data)
        except OSError:
            # A full or failing disk: nothing more goes there, what is there is read.
            self._folder = None
            return None

    def prepare(self, size_bytes: int, check: Callable[[], None]) -> None:
        """Have room for so much, or what there is, in the page cache, as long as memory is not
        short; ``check`` is called before each piece and may raise.
        """
        if self._folder is None:
            return
        try:
            file = self._opened(self._folder)
            for at in range(0, min(size_bytes, self._most_bytes), len(_NOTHING)):
                check()
                os.pwrite(file.fileno(), _NOTHING, at)
                self._prepared_bytes = at + len(_NOTHING)
        except OSError:
            self._folder = None

    def close(self) -> None:
        """Remove it; safe to repeat."""
        if self._file is not None:
            self._file.close()

    def _opened(self, folder: str) -> IO[bytes]:
        if self._file is not None:
            return self._file
        found = os.statvfs(folder)
        free_bytes = found.f_bavail * found.f_frsize * _OF_DISK
        memory_bytes = system.memory_available_bytes() * _OF_MEMORY
        self._most_bytes = int(min(free_bytes, _room_bytes(found), memory_bytes))
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - close
        return self._file

    def _put(self, file: IO[bytes], data: memoryview) -> Callable[[], memoryview] | None:
        at, length = self.size_bytes, len(data)
        more_bytes = at + length - self._prepared_bytes
        if at + length > self._most_bytes:
            return None
        # Others fill the disk meanwhile, and CRIU must write its own there.
        if more_bytes > 0 and more_bytes > _room_bytes(os.fstatvfs(file.fileno())):
            return None
        done = 0
        while done < length:
            done += os.pwrite(file.fileno(), data[done:], at + done)
        self.size_bytes += length

        def load() -> memoryview:
            into = memoryview(bytearray(length))
            got = 0
            while got < length:
                count = os.preadv(file.fileno(), [into[got:]], at + got)
                if not count:
                    raise errors.DumpFailed(
                        "what was held on the local disk is not there any more",
                        hint="look at the disk of the work directory; the job goes on",
                    )
                got += count
            return into

        return load


def _room_bytes(disk: os.statvfs_result) -> float:
    """How much more may go there."""
    return disk.f_frsize * (disk.f_bavail - disk.f_blocks * _LEFT_OF_DISK)
