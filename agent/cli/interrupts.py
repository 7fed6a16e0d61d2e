"""Signals that ask the program to stop, turned into a call.

Promises: inside the context SIGINT, SIGTERM and SIGHUP call ``act`` instead of ending the
program, so that what was begun can be undone; leaving it brings back what was before. Within
another such context only the inner one is called.
Does not: decide what stopping means.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_heard_count = 0


@contextlib.contextmanager
def caught(act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with the signal's number for each signal that arrives inside."""

    def handle(number: int, frame: FrameType | None) -> None:
        global _heard_count
        _heard_count += 1
        act(number)

    before = {number: signal.signal(number, handle) for number in _ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heard() -> int:
    """How often somebody has asked so far, whatever was made of it: what could not be given up any
    more has ended well, and yet nothing more is to be begun.
    """
    return _heard_count
