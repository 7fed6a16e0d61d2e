"""What the agent is doing: one operation a container at a time, a limited number in all. What is
done at the same instant to several pods counts as one: it could not be done one after the other.

Promises: an operation that was let in is counted until it has ended, whatever became of its
caller; while shutting down none is let in and each one is told to give up.
Does not: run anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

from agent import errors
from agent.host import clock, memory
from agent.node.dump import Cancel

Kind = Literal["dump", "restore", "verify", "export", "import"]
_NOUNS = {
    "dump": "dumped",
    "restore": "restored",
    "verify": "verified",
    "export": "exported",
    "import": "imported",
}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One that runs. ``what`` names it to people, ``keys`` are what nobody else may touch;
    ``part_of`` names what it is done at one instant with, if it is.
    """

    kind: Kind
    what: str
    keys: frozenset[Hashable]
    began_s: float
    cancel: Cancel
    part_of: str = ""


class Operations:
    """At most ``limit`` at once."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._running: list[Operation] = []
        self._closed = False

    @contextlib.contextmanager
    def begin(
        self,
        kind: Kind,
        what: str,
        keys: Sequence[Hashable],
        cancel: Cancel,
        part_of: str = "",
    ) -> Iterator[Operation]:
        """Let an operation in until the context is left; ``cancel`` is set if it has to give up.
        All of what they are ``part_of`` counts once.

        Raises:
            errors.TargetBusy: one of the keys is in use.
            errors.Overloaded: there are too many, or the agent is shutting down.
        """
        operation = Operation(kind, what, frozenset(keys), clock.monotonic_s(), cancel, part_of)
        with self._changed:
            self._refuse(operation)
            self._running.append(operation)
        try:
            yield operation
        finally:
            with self._changed:
                self._running.remove(operation)
                idle = not self._running
                self._changed.notify_all()
            if idle:
                memory.give_back()

    def running(self) -> list[Operation]:
        """Those that run now, oldest first."""
        with self._changed:
            return list(self._running)

    def close(self) -> None:
        """Let no more in, and tell those that run to give up."""
        with self._changed:
            self._closed = True
            for operation in self._running:
                operation.cancel.set()

    def wait_empty(self, deadline: clock.Deadline) -> bool:
        """Wait until none runs; False if no time is left."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, deadline.remaining_s)

    def _refuse(self, wanted: Operation) -> None:
        if self._closed:
            raise errors.Overloaded(
                "the agent is shutting down", hint="try again when its successor is ready"
            )
        for other in self._running:
            if wanted.keys & other.keys:
                part = f" ({other.part_of})" if other.part_of else ""
                raise errors.TargetBusy(
                    f"{other.what} is being {_NOUNS[other.kind]} right now{part}, since"
                    f" {wanted.began_s - other.began_s:.0f} s",
                    hint="try again when it has ended",
                )
        together = {each.part_of for each in self._running if each.part_of}
        count = len(together) + sum(not each.part_of for each in self._running)
        if count >= self._limit and wanted.part_of not in together:
            names = ", ".join(f"{each.kind} of {each.what}" for each in self._running)
            raise errors.Overloaded(
                f"the agent does {count} operations already: {names}",
                hint="try again when one has ended, or allow more at once (parallel)",
            )
