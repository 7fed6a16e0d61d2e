"""One call as a service sees it: who calls, how long they wait, when they are gone.

Promises: ``on_gone`` runs its callback exactly once, also for a caller who is gone already.
Does not: end anything that nobody asked it to.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from agent.model.access import Caller

# Nobody means more by a number, and clocks take no infinity.
_LONGEST_S = 7 * 86400.0


class Context(Protocol):
    """The part of gRPC's context that is needed here."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller gives up; None if it waits for ever."""

    def cancel(self) -> object:
        """End the call now."""

    def add_callback(self, callback: Callable[[], None]) -> bool:
        """Call back at the call's end; False if it has ended."""


class Call:
    """A call that was let in."""

    def __init__(self, caller: Caller, context: Context) -> None:
        self.caller = caller
        self._context = context

    def allowed_s(self, asked_s: float, default_s: float) -> float:
        """How long the call may take: what its request asks for, else the default, and never
        longer than the caller waits.
        """
        remaining_s = self._context.time_remaining()
        allowed_s = min(asked_s, _LONGEST_S) if asked_s > 0 else default_s
        return allowed_s if remaining_s is None else min(allowed_s, remaining_s)

    @contextlib.contextmanager
    def ending_after(self, span_s: float) -> Iterator[Callable[[], None]]:
        """End the call if the context has not been left after ``span_s``, so that a caller who
        neither sends nor reads holds nothing; what is yielded takes that back.
        """
        timer = threading.Timer(span_s, self._context.cancel)
        timer.daemon = True
        timer.start()
        try:
            yield timer.cancel
        finally:
            timer.cancel()

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Run ``callback`` when the call has ended, by an answer or because the caller left."""
        if not self._context.add_callback(callback):
            callback()
