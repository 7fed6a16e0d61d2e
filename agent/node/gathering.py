"""What the pods of a group give to its commit, as it comes in a call's messages.

Promises: all that is being gathered here at a time, for whomever, has at most ``LIMIT_BYTES`` as it
was sent, and for one caller ``SHARE_BYTES``, so that there is room for others; a caller who does
not go on sending is left after ``GATHER_S``.
Does not: commit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from agent import errors
from agent.node.contribution import Contribution
from agent.rpc.calls import Call
from agent.rpc.v1 import epochs_pb2 as api

# A pod gives about 5 KiB, most of it the pod as it was made: this is 13,000 of them. Taken apart,
# and written anew as the image's manifest, it is eight times as large as long as the commit lasts.
LIMIT_BYTES = 64 << 20
# 11,000 pods, which no single group has; what is left to others holds 1,600.
SHARE_BYTES = 56 << 20
# A coordinator gives a commit up after half a minute.
GATHER_S = 30.0


class Gathering:
    """The contributions that an agent holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held_bytes = 0
        self._held_for_bytes: dict[str, int] = {}

    @contextlib.contextmanager
    def gathered(
        self, first: api.DecideEpochRequest, more: Iterator[api.DecideEpochRequest], call: Call
    ) -> Iterator[list[Contribution]]:
        """The contributions of a call, which are held as long as the context lasts.

        Raises:
            errors.InvalidInput: they are more than could ever be gathered, or end in a piece.
            errors.Overloaded: they are more than there is room for, beside those of others, or
                beside the caller's own.
            errors.Corrupt: one cannot be understood.
            errors.Interrupted: the call ended before all had come.
        """
        found: list[Contribution] = []
        held = _Held(self, call.caller.user)
        try:
            with call.ending_after(GATHER_S):
                piece = bytearray()
                for message in _all(first, more):
                    last = len(message.contributions) - 1
                    for index, each in enumerate(message.contributions):
                        held.add(len(each))
                        piece += each
                        if index == last and message.unfinished:
                            break
                        found.append(Contribution.decode(bytes(piece)))
                        piece.clear()
            if piece:
                raise errors.InvalidInput("the last contribution is not whole")
            yield found
        finally:
            held.release()

    def hold(self, user: str, mine_bytes: int, more_bytes: int) -> None:
        """Hold ``more_bytes`` for a call of ``user`` that holds ``mine_bytes``; raises as
        ``gathered``.
        """
        with self._lock:
            if mine_bytes + more_bytes > SHARE_BYTES:
                raise errors.InvalidInput(
                    f"the pods of the group give more than {SHARE_BYTES >> 20} MiB to its commit",
                    hint="checkpoint it as several groups",
                )
            theirs_bytes = self._held_for_bytes.get(user, 0)
            if theirs_bytes + more_bytes > SHARE_BYTES:
                raise errors.Overloaded(
                    f"{user} has this agent commit too many large groups now",
                    hint="try again in a moment",
                )
            if self._held_bytes + more_bytes > LIMIT_BYTES:
                raise errors.Overloaded(
                    "too many large groups are being committed by this agent now",
                    hint="try again in a moment",
                )
            self._held_bytes += more_bytes
            self._held_for_bytes[user] = theirs_bytes + more_bytes

    def release(self, user: str, held_bytes: int) -> None:
        """Hold so much less for ``user``."""
        with self._lock:
            self._held_bytes -= held_bytes
            left_bytes = self._held_for_bytes.pop(user, 0) - held_bytes
            if left_bytes:
                self._held_for_bytes[user] = left_bytes


class _Held:
    """What one call holds."""

    def __init__(self, gathering: Gathering, user: str) -> None:
        self._gathering, self._user = gathering, user
        self._bytes = 0

    def add(self, more_bytes: int) -> None:
        self._gathering.hold(self._user, self._bytes, more_bytes)
        self._bytes += more_bytes

    def release(self) -> None:
        self._gathering.release(self._user, self._bytes)
        self._bytes = 0


def _all(
    first: api.DecideEpochRequest, more: Iterator[api.DecideEpochRequest]
) -> Iterator[api.DecideEpochRequest]:
    yield first
    yield from more
