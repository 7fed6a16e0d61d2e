"""Work in a thread of its own whose events are handed to whoever reads them.

Promises: the work runs to its end even if nobody reads on, so that what it undoes is undone; its
error is raised to the reader after its last event. Events are few: of a kind that comes often only
the newest within ``EVERY_S`` is told.
Does not: stop the work; the reader's leaving has to tell it to give up.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from agent.host import clock

# Fast enough for a progress bar, slow against the work.
EVERY_S = 0.25

T = TypeVar("T")


class Relay(Generic[T]):
    """One piece of work."""

    def __init__(self, name: str, work: Callable[[Callable[[T], None]], None]) -> None:
        """``work`` is called with the function that tells an event."""
        self._events: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, name=name)

    def events(self) -> Iterator[T]:
        """Do the work and yield its events; raise what it raised."""
        self._thread.start()
        while (event := self._events.get()) is not None:
            yield event
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._work(self._events.put)
        except BaseException as exc:  # noqa: BLE001 - it is raised where the events are read
            self._failure = exc
        finally:
            self._events.put(None)


class Sparingly:
    """Lets an event through if its phase is new or the last one is ``EVERY_S`` ago."""

    def __init__(self) -> None:
        self._phase = ""
        self._told_s = 0.0
        self._lock = threading.Lock()

    def due(self, phase: str) -> bool:
        """Whether to tell the event now."""
        now_s = clock.monotonic_s()
        with self._lock:
            if phase == self._phase and now_s - self._told_s < EVERY_S:
                return False
            self._phase, self._told_s = phase, now_s
            return True
