"""From pages to packs on a volume: compressed and digested in parallel, written in order.

    caller's thread       a worker a core        one writer thread
    fill a block   ->   zstd, BLAKE3     ->    append to the pack, write back early,
    (waits for a                                at its end: index, sync, name
    free buffer)

The libraries let go of the interpreter's lock while they work. A fixed set of block buffers goes
round, so that memory is bounded and a slow volume holds the caller up.

Promises: packs hold the blocks in the order given; an error of the volume is raised by the next
call, and by every later one; nothing is left unfinished after ``close``.
Does not: know which pages are worth storing; ``pages`` does.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable
from concurrent import futures

import numpy as np
from numpy import typing as npt

from agent import errors
from agent.model.streams import PAGE_BYTES
from agent.store import codec, layout, pack, threads
from agent.store.digest import digest
from agent.store.identity import Tags
from agent.store.manifest import PackRef
from agent.volumes.base import BlobWriter, Volume

# Blocks between the caller and the volume, for each worker: 6 MiB, and their compressed forms.
_BUFFERS = 6
# A volume that takes nothing for so long is gone: the processes must not stand still for it.
_STALLED_S = 120.0

Buffer = npt.NDArray[np.uint8]
_Packed = tuple[codec.Codec, bytes | memoryview, bytes]


class Packer:
    """Writes the packs of one attempt. Calls come from one thread at a time."""

    def __init__(self, volume: Volume, attempt: str) -> None:
        self._volume = volume
        self._attempt = attempt
        self._workers = futures.ThreadPoolExecutor(threads.workers(), "ckpt-compress")
        self._writer = futures.ThreadPoolExecutor(1, "ckpt-write")
        self._free: queue.SimpleQueue[Buffer] = queue.SimpleQueue()
        for _ in range(_BUFFERS * threads.workers()):
            self._free.put(np.empty((pack.BLOCK_PAGES, PAGE_BYTES), dtype=np.uint8))
        self._pack = _OpenPack(volume, attempt)
        self._error: BaseException | None = None
        threads.switch_often()

    def buffer(self) -> Buffer:
        """Return an empty block, once there is one.

        Raises:
            errors.VolumeError: what went wrong with an earlier block.
        """
        self.check()
        try:
            free = self._free.get(timeout=_STALLED_S)
        except queue.Empty as exc:
            raise self._stalled() from exc
        self.check()
        return free

    def add(self, block: Buffer, pages: int) -> None:
        """Append a block of that many pages; ``block`` came from ``buffer`` and is taken back."""
        packed = self._workers.submit(_compress, block[:pages].reshape(-1).data)

        def append() -> None:
            try:
                self._pack.append(pages, packed.result())
            finally:
                self._free.put(block)

        self._submit(append)

    def end_pack(self, tags: Tags) -> None:
        """End the pack; ``tags`` are those of all its pages in order."""
        self._submit(lambda: self._pack.end(tags))

    def wait(self) -> tuple[list[PackRef], int]:
        """Wait until all that was ended is durable; return all packs, and their bytes."""
        try:
            self._writer.submit(lambda: None).result(_STALLED_S)
        except TimeoutError as exc:
            raise self._stalled() from exc
        self.check()
        return list(self._pack.done), sum(ref.size_bytes for ref in self._pack.done)

    def check(self) -> None:
        """Raise the first error that there was."""
        if self._error is not None:
            raise self._error

    def close(self) -> list[str]:
        """Give up what is not ended, let the threads go, and return the names of all packs that
        may exist.
        """
        self._submit(self._pack.give_up)
        self._workers.shutdown(cancel_futures=False)
        self._writer.shutdown()
        return [layout.pack_name(self._attempt, n) for n in range(self._pack.number + 1)]

    def _stalled(self) -> errors.VolumeGone:
        stalled = errors.VolumeGone(
            f"the volume took nothing for {_STALLED_S:.0f} s",
            hint="check its mount and its network",
            volume=self._volume.url,
        )
        self._error = self._error or stalled
        return stalled

    def _submit(self, step: Callable[[], None]) -> None:
        self._writer.submit(step).add_done_callback(self._note)

    def _note(self, step: futures.Future[None]) -> None:
        self._error = self._error or step.exception()


class _OpenPack:
    """The pack being written. Used by the writer thread only, but for ``done`` after a wait."""

    def __init__(self, volume: Volume, attempt: str) -> None:
        self._volume = volume
        self._attempt = attempt
        self.number = 0
        self.done: list[PackRef] = []
        self._stack = contextlib.ExitStack()
        self._blob: BlobWriter | None = None
        self._failed = False
        self._blocks: list[tuple[int, int, int, bytes]] = []

    @property
    def _name(self) -> str:
        return layout.pack_name(self._attempt, self.number)

    def append(self, pages: int, packed: _Packed) -> None:
        if self._failed:
            return
        how, stored, checksum = packed
        self._failed = True  # until it went well
        if self._blob is None:
            self._blob = self._stack.enter_context(self._volume.create(self._name))
            self._blob.write(pack.HEADER)
        self._blob.write(stored)
        self._blocks.append((pages, len(stored), how, checksum))
        self._failed = False

    def end(self, tags: Tags) -> None:
        if self._failed or self._blob is None:
            return
        self._failed = True
        columns = list(zip(*self._blocks, strict=True))
        index = pack.PackIndex(
            np.array(columns[0], dtype=np.int64),
            np.array(columns[1], dtype=np.int64),
            np.array(columns[2], dtype=np.uint8),
            b"".join(columns[3]),
            tags,
        )
        sealed = pack.encode(index)
        self._blob.write(sealed)
        self._blob.commit()
        self._stack.close()
        self.done.append(
            PackRef(self._name, index.pages, index.index_offset, len(sealed), digest(sealed))
        )
        self.number += 1
        self._blob = None
        self._blocks = []
        self._failed = False

    def give_up(self) -> None:
        self._failed = True
        self._stack.close()


def _compress(block: memoryview) -> _Packed:
    how, stored = codec.compress_if_worth(block)
    return how, stored, digest(stored)
