"""A ring all-reduce over TCP: how the ranks of the training job add up their gradients.

Promises: connections are made once and stay open; every rank gets the same bits, since each
chunk is added up in one fixed order around the ring and then handed on unchanged.
Does not: survive a lost peer; the job then ends with an error, as training jobs do.
"""

from __future__ import annotations

import itertools
import select
import socket

import numpy as np
import numpy.typing as npt


class PeerLost(Exception):
    """A neighbour closed its connection before the training was over."""


class Ring:
    """One rank's two connections: from its left neighbour, to its right one."""

    def __init__(self, rank: int, listener: socket.socket, ports: list[int]) -> None:
        self._rank = rank
        self._world = len(ports)
        self._scratch = np.empty(0, np.float32)
        # All listeners exist before any rank is started, so connecting cannot come too early.
        self._right = socket.create_connection(("127.0.0.1", ports[(rank + 1) % self._world]))
        self._left, _ = listener.accept()
        listener.close()
        for end in (self._left, self._right):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)

    def close(self) -> None:
        """Close both connections."""
        self._left.close()
        self._right.close()

    def all_reduce(self, values: npt.NDArray[np.float32]) -> None:
        """Replace ``values`` by their sum over all ranks, in place.

        Raises:
            PeerLost: a neighbour is gone.
        """
        bounds = [len(values) * i // self._world for i in range(self._world + 1)]
        chunks = [values[a:b] for a, b in itertools.pairwise(bounds)]
        longest = max(len(chunk) for chunk in chunks)
        if len(self._scratch) < longest:
            self._scratch = np.empty(longest, np.float32)
        for hop in range(self._world - 1):
            into = chunks[(self._rank - hop - 1) % self._world]
            arrived = self._scratch[: len(into)]
            self._exchange(chunks[(self._rank - hop) % self._world], arrived)
            into += arrived
        for hop in range(self._world - 1):
            self._exchange(
                chunks[(self._rank + 1 - hop) % self._world],
                chunks[(self._rank - hop) % self._world],
            )

    def _exchange(self, out: npt.NDArray[np.float32], into: npt.NDArray[np.float32]) -> None:
        """Send ``out`` to the right while ``into`` is filled from the left.

        Both at once: if every rank sent first, all would wait for ever as soon as a chunk is
        larger than the socket buffers.
        """
        unsent = out.view(np.uint8).data
        unfilled = into.view(np.uint8).data
        while unsent or unfilled:
            readable, writable, _ = select.select(
                [self._left] if unfilled else [], [self._right] if unsent else [], []
            )
            if readable:
                count = self._left.recv_into(unfilled)
                if not count:
                    raise PeerLost(f"rank {self._rank}: the left neighbour is gone")
                unfilled = unfilled[count:]
            if writable:
                unsent = unsent[self._right.send(unsent) :]
