"""Whether anybody on this host has hold of pages of memory, to write to them later.

Who works on pages behind the page table (process_vm_writev(2), direct I/O, devices) takes hold of
them first and lets go of them when it has written (mm/gup.c: FOLL_PIN), and the kernel counts both
in /proc/vmstat, each on the processor where it happens. /proc/sys/vm/stat_refresh adds up what the
processors have counted. So let those who let go be read, then all be added up, and only then those
who took hold be read. The second number has everybody who took hold before the first was read, and
the first has nobody who did so later. If both are the same, whoever had taken hold when the first
was read had let go by then. (Who reads both at once, or the other way round, can be shown one who
came and went in place of one who stays.)

The count is raised under the lock of the page's entry in the page table, so who got hold of a page
before its entry was protected counts, and who comes later makes it look written.

Promises: "none" is proven; what is not known is not.
Does not: know who has hold of what: one page that is pinned for good (RDMA, a GPU, a virtual
machine, a registered buffer of io_uring) leaves nothing to be proven on the whole host; know of who
has hold of pages in another way (FOLL_GET), as ptrace(2) has and /proc/PID/mem, under a lock of the
address space.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import TypeVar

from agent.host import clock

_REFRESH, _COUNTS = "/proc/sys/vm/stat_refresh", "/proc/vmstat"
_TAKEN, _LET_GO = b"nr_foll_pin_acquired", b"nr_foll_pin_released"
# Processors that are kept free of the kernel's own work: whoever has one would be interrupted, and
# one who computes there at a real-time priority would let nobody ask.
_ISOLATED = ("/sys/devices/system/cpu/isolated", "/sys/devices/system/cpu/nohz_full")
_REALTIME = "/proc/sys/kernel/sched_rt_runtime_us"
_POLL_S = 0.0005

_Told = TypeVar("_Told")


class Pins:
    """Asks again and again; from one thread. ``hindrance`` is why it cannot ("" if it can)."""

    def __init__(self) -> None:
        self._asking: threading.Thread | None = None
        self.hindrance = _hindrance()

    def none(self, deadline: clock.Deadline) -> bool:
        """Whether there was an instant since the call at which nobody had hold of any page."""
        if self.hindrance:
            return False
        found: list[bool] = []
        return clock.wait_until(
            lambda: self._asked(_none, found, deadline) and found[-1], deadline, every_s=_POLL_S
        )

    def acquired(self, deadline: clock.Deadline) -> int | None:
        """How many pages somebody has taken hold of until now, since the host started; None if that
        is not known in time.
        """
        found: list[int | None] = []
        known = not self.hindrance and self._asked(_acquired, found, deadline)
        return found[-1] if known else None

    def _asked(
        self, ask: Callable[[], _Told], found: list[_Told], deadline: clock.Deadline
    ) -> bool:
        """Put an answer into ``found``; whether there is one in time."""

        def told() -> None:
            with contextlib.suppress(OSError):  # what cannot be asked is not known
                found.append(ask())

        # The kernel has each processor answer, and who waits for that cannot be interrupted.
        if self._asking is None or not self._asking.is_alive():
            asking = threading.Thread(target=told, name="pins", daemon=True)
            try:
                asking.start()
            except RuntimeError:  # no thread is to be had: not known either
                return False
            self._asking = asking
        self._asking.join(deadline.remaining_s)
        return bool(found)


def _none() -> bool:
    _add_up()
    let_go = _count(_LET_GO)
    return let_go is not None and let_go == _acquired()


def _acquired() -> int | None:
    _add_up()
    return _count(_TAKEN)


def _add_up() -> None:
    descriptor = os.open(_REFRESH, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"1")
    finally:
        os.close(descriptor)


def _count(name: bytes) -> int | None:
    with open(_COUNTS, "rb") as file:
        for line in file:
            key, _, value = line.partition(b" ")
            if key == name:
                return int(value)
    return None


def _hindrance() -> str:
    if not os.access(_REFRESH, os.W_OK):
        return f"{_REFRESH} cannot be written"
    if _count(_TAKEN) is None or _count(_LET_GO) is None:
        return f"{_COUNTS} does not count pins"
    if any(_listed(path) for path in _ISOLATED):
        return "some processors are isolated"
    if _read(_REALTIME) == "-1":
        return "real-time work may keep a processor for ever"
    return ""


def _listed(path: str) -> bool:
    return _read(path) not in ("", "(null)")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
