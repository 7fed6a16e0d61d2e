"""Signals that ask the program to stop, turned into a call.

Promises: inside the context SIGINT, SIGTERM and SIGHUP call ``act`` instead of ending the
program, so that what was begun can be undone; leaving it brings back what was before.
Does not: decide what stopping means.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def caught(act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with the signal's number for each signal that arrives inside."""

    def handle(number: int, frame: FrameType | None) -> None:
        act(number)

    before = {number: signal.signal(number, handle) for number in _ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
