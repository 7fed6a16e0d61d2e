"""Time: the only place that reads a clock or waits for time to pass.

Promises: durations and deadlines are monotonic and do not jump with the wall clock; a ``Deadline``
is made once at the top of an operation and handed down, so that steps share one budget.
Does not: schedule anything.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from agent import errors

# Between two looks at something that gives no event: short against a stop time of tens of
# milliseconds, long against the cost of a look.
_POLL_S = 0.005


def monotonic_s() -> float:
    """Seconds that only ever grow, for durations within one process."""
    return time.monotonic()


def boottime_s() -> float:
    """Seconds since boot, sleep included; comparable between processes of one host."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall_s() -> float:
    """Seconds since 1970, for people and for ages of days."""
    return time.time()


@dataclasses.dataclass(frozen=True)
class Deadline:
    """A moment by which something must have ended, on the monotonic clock."""

    at_s: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The deadline that many seconds from now."""
        return cls(monotonic_s() + seconds)

    def sooner(self, seconds: float) -> Deadline:
        """This one, or the one that many seconds from now if that comes first."""
        return Deadline(min(self.at_s, monotonic_s() + seconds))

    @property
    def remaining_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at_s - monotonic_s())

    @property
    def expired(self) -> bool:
        """Whether no time is left."""
        return self.remaining_s == 0.0

    def check(self, what: str) -> None:
        """Raise ``errors.DeadlineExceeded`` naming ``what`` if no time is left."""
        if self.expired:
            raise errors.DeadlineExceeded(
                f"{what} did not end in time", hint="allow more time, or find what is slow"
            )


def wait_until(
    predicate: Callable[[], bool], deadline: Deadline, *, every_s: float = _POLL_S
) -> bool:
    """Ask ``predicate`` until it is true (then True) or the deadline has passed (then False).

    It is asked at least once, also when no time is left.
    """
    while not predicate():
        if deadline.expired:
            return False
        time.sleep(min(every_s, deadline.remaining_s))
    return True
