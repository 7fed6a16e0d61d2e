"""How many threads the store uses, and how they share the interpreter's lock.

Compression and digests run without the lock, but ask for it a few times a block. At the default of
5 ms they would wait for a busy thread longer than they work (measured, first epoch of 1 GiB on two
cores: 4.3 s at 5 ms, 2.9 s at 1 ms, 2.6 s at 0.2 ms, 2.3 s at 0.05 ms).

Promises: the interval only ever becomes shorter.
Does not: start threads.
"""

from __future__ import annotations

import os
import sys

# Two also on one core, so that one works while the other waits for the disk. Beyond eight, the one
# thread that takes the pages in is what holds the others up.
_FEWEST, _MOST = 2, 8
_SWITCH_INTERVAL_S = 0.00005


def workers() -> int:
    """How many blocks are worked on at once: as many as this process may use cores."""
    return max(_FEWEST, min(_MOST, len(os.sched_getaffinity(0))))


def switch_often() -> None:
    """Let threads take turns quickly, in the whole process and for good: it stores or reads."""
    sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
