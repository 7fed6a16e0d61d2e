"""What libraries write to standard error by themselves, as lines of this program's log: gRPC tells
there, and nowhere else, of callers that it has turned away.

Promises: within ``serving`` each line that anybody writes to standard error is a warning of this
logger; one that is said over and over is counted instead, so that nobody can fill a disk by
knocking. Afterwards all is as before.
Does not: keep what is written in the instant in which it ends the program; where the program was
then is told by Python.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

from agent.host import clock, logs

_log = logging.getLogger(__name__)

_STDERR = 2
# abseil's log/internal/log_format.cc: level and date, time, thread, place.
_PREFIX = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ \S+\] ")
_LONGEST = 2000
_AGAIN_S = 10.0
# For the lines that are on their way; a child that lives on may hold the other end.
_LAST_S = 1.0


@contextlib.contextmanager
def serving(level: int) -> Iterator[None]:
    """Around the life of a service, whose log from ``level`` on goes to standard error."""
    with taken_in(afterwards=lambda: logs.to_stderr(level)) as out:
        logs.to_stderr(level, out)
        yield


@contextlib.contextmanager
def taken_in(afterwards: Callable[[], None] = lambda: None) -> Iterator[TextIO]:
    """Take in what is written to standard error; yields where it went before, which is for the log
    itself. ``afterwards`` is called when it goes there again.
    """
    before = os.dup(_STDERR)
    try:
        reading, writing = os.pipe()
        os.dup2(writing, _STDERR)
        os.close(writing)
        reader = threading.Thread(target=_read, args=(reading,), name="stderr", daemon=True)
        reader.start()
        # Not a context of its own: what it has not taken at the end is lost.
        out = open(os.dup(before), "w", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
        try:
            ours = not faulthandler.is_enabled()
            if ours:
                faulthandler.enable(out)
            try:
                yield out
            finally:
                if ours:
                    faulthandler.disable()
                os.dup2(before, _STDERR)
                reader.join(_LAST_S)
                afterwards()
        finally:
            with contextlib.suppress(OSError):
                out.close()
    finally:
        os.close(before)


def _read(fd: int) -> None:
    """Until nobody can write any more."""
    last, told_s, more = "", 0.0, 0
    with open(fd, "rb") as lines:
        for line in lines:
            text = _PREFIX.sub("", line.decode(errors="replace").strip(), count=1)[:_LONGEST]
            if not text:
                continue
            now_s = clock.monotonic_s()
            if text == last and now_s < told_s + _AGAIN_S:
                more += 1
                continue
            if more:
                _log.warning("%d times more: %s", more, last)
            last, told_s, more = text, now_s, 0
            _log.warning("%s", text)
    if more:
        _log.warning("%d times more: %s", more, last)
