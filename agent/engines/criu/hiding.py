"""Keeping CRIU from reading memory that the agent copies itself.

CRIU asks the kernel by ioctl(PAGEMAP_SCAN) which pages of a mapping there are, and then takes them
through pipes: that is most of a stop. For a hidden mapping it is told that there are none, so that
it writes the mapping's description and no pages. Of a shared memory object it asks by
lseek(SEEK_DATA) where there is anything, and is told likewise. Everything else it does as always.

Promises: only a question about pages that lies within one hidden mapping of a process is answered,
or about a hidden object;
whatever else CRIU asks, and every question that is not understood, goes to the kernel, and then
CRIU sends the pages as it always does.
Does not: work if a process of the tree is itself filtered by seccomp: CRIU, being filtered, may not
suspend other filters then.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import struct
from collections.abc import Iterable

from agent import errors
from agent.engines.criu.probe import Criu
from agent.engines.tracking import shared
from agent.engines.tracking.areas import SMALLEST_BYTES
from agent.engines.tracking.precopy import Standing
from agent.host import proc
from agent.host.supervision import IOCTL, LSEEK, Call, Pick, Supervisor, picking

# linux/fs.h: struct pm_scan_arg is size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask.
_PAGEMAP_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("=12Q")
_AT_WALK_END = 32
_GUARD = 1 << 8
# How CRIU asks was read and tried for these.
_KNOWN_CRIU = ((4, 2), (4, 3))


def usable(criu: Criu, pids: Iterable[int]) -> str:
    """Why nothing can be hidden from CRIU; "" if it can."""
    if platform.machine() != "x86_64":
        return f"not known how on {platform.machine()}"
    first, unknown = _KNOWN_CRIU
    if not first <= criu.version < unknown:
        return f"not known how with CRIU {criu.version_text}"
    if proc.status(os.getpid()).seccomp:
        return "this agent runs under a seccomp filter"
    for pid in pids:
        with contextlib.suppress(errors.NotFound):
            if proc.status(pid).seccomp:
                return f"process {pid} has a seccomp filter"
    return ""


class Hiding:
    """Hides mappings from one CRIU."""

    def __init__(self) -> None:
        self._hidden: dict[int, list[tuple[int, int]]] = {}
        self._objects: set[shared.Key] = set()
        self._supervisor = Supervisor(
            picking(Pick(IOCTL, 1, _PAGEMAP_SCAN), Pick(LSEEK, 2, os.SEEK_DATA)), self._answer
        )

    @property
    def descriptor(self) -> int:
        """What CRIU must inherit."""
        return self._supervisor.descriptor

    @property
    def under(self) -> list[str]:
        """What CRIU must be started by."""
        return self._supervisor.under()

    @property
    def answered(self) -> int:
        """How many of CRIU's questions were answered here."""
        return self._supervisor.answered

    def start(self) -> None:
        """Be ready for CRIU's questions; to be called before it is started."""
        self._supervisor.start()

    def close(self) -> None:
        """End, after CRIU has; safe to repeat."""
        self._supervisor.close()

    def release(self) -> None:
        """CRIU has been started."""
        self._supervisor.release()

    def hide(self, standing: Iterable[Standing], objects: Iterable[shared.Found]) -> None:
        """Hide these mappings and shared memory objects from now on."""
        self._objects = {each.key for each in objects}
        self._hidden = {
            each.space.id: [tuple(area) for area in each.areas.tolist()] for each in standing
        }

    def _answer(self, call: Call) -> int | None:
        return self._of_an_object(call) if call.call == LSEEK else self._of_a_mapping(call)

    def _of_an_object(self, call: Call) -> int | None:
        if not self._objects:
            return None
        key = shared.key_of(f"/proc/{call.pid}/fd/{call.arguments[0]}")
        return -errno.ENXIO if key in self._objects else None

    def _of_a_mapping(self, call: Call) -> int | None:
        descriptor, _, address, *_ = call.arguments
        _, _, start, end, *_, mask, _, _ = _ARGUMENT.unpack(call.read(address, _ARGUMENT.size))
        # Most questions are about small mappings: the job stands still, so these go on at once.
        if mask & _GUARD or end - start < SMALLEST_BYTES:
            return None
        # ".../PID/pagemap": the rest depends on where CRIU's /proc is.
        *_, number, name = ("", "", *call.link(descriptor).split("/"))
        if name != "pagemap" or not number.isdigit():
            return None
        areas = self._hidden.get(int(number), ())
        if not any(low <= start and end <= high for low, high in areas):
            return None
        call.write(address + _AT_WALK_END, struct.pack("=Q", end))
        return 0
