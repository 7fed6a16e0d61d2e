"""Threads with the rights of other processes."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.host import acting

NOBODY = 65534
# include/uapi/linux/prctl.h
GET_DUMPABLE, SET_DUMPABLE = 3, 4
_libc = ctypes.CDLL(None)


def dumpable() -> int:
    return int(_libc.prctl(GET_DUMPABLE, 0, 0, 0, 0))


@pytest.fixture
def somebody() -> Iterator[int]:
    """A process of another user."""
    with subprocess.Popen(["sleep", "1000"], user=NOBODY, group=NOBODY) as process:
        yield process.pid
        process.kill()


def test_two_at_once_leave_this_program_as_it_was(somebody: int) -> None:
    before = dumpable()
    may_end = [threading.Event(), threading.Event()]
    begun = [threading.Event(), threading.Event()]

    def stay(which: int) -> int:
        begun[which].set()
        assert may_end[which].wait(20)
        return os.geteuid()

    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(acting.acting_as, somebody, lambda: stay(0))
            assert begun[0].wait(20)
            second = pool.submit(acting.acting_as, somebody, lambda: stay(1))
            assert begun[1].wait(20)
            may_end[0].set()
            assert first.result(20) == NOBODY
            # Who has the other's rights could trace the thread that has them still.
            assert dumpable() != 1
            may_end[1].set()
            assert second.result(20) == NOBODY
        assert os.geteuid() == 0
        assert dumpable() == before == 1
    finally:
        _libc.prctl(SET_DUMPABLE, before, 0, 0, 0)
