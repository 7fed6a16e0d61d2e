"""Keeping CRIU from reading memory that the agent copies itself.

CRIU asks the kernel by ioctl(PAGEMAP_SCAN) which pages of a mapping there are, and then takes them
through pipes: that is most of a stop. For a hidden mapping it is told that there are none, so that
it writes the mapping's description and no pages. Of a shared memory object it asks by
lseek(SEEK_DATA) where there is anything, and is told likewise. Everything else it does as always.

Each question takes longer than its answer. So where a process's smaps are known
(``host.layouts``), CRIU is given them as a file, without the walk that the kernel's would take, and
then its own pagemap for that of the process: a dozen questions a process and one a descriptor, and
none a mapping. It has hardly any pages, and where it has one, CRIU sends the page that the process
has there, if any.

Promises: only what is asked about a hidden mapping, object or process is answered;
whatever else CRIU asks, and every question that is not understood, goes to the kernel, and then
CRIU sends the pages as it always does.
Does not: work if a process of the tree is itself filtered by seccomp: CRIU, being filtered, may not
suspend other filters then.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import platform
import struct
import threading
from collections.abc import Iterable, Mapping

from agent import errors
from agent.engines.criu.probe import Criu
from agent.engines.tracking import shared
from agent.engines.tracking.areas import SMALLEST_BYTES
from agent.engines.tracking.copies import Standing
from agent.host import pagemap, proc
from agent.host.supervision import (
    IOCTL,
    LSEEK,
    OPENAT,
    Call,
    Given,
    Pick,
    Supervisor,
    picking,
)

# linux/fs.h: struct pm_scan_arg is size, flags, start, end, walk_end, vec, vec_len, max_pages,
# category_inverted, category_mask, category_anyof_mask, return_mask.
_PAGEMAP_SCAN = 0xC0606610
_ARGUMENT = struct.Struct("=12Q")
_AT_WALK_END = 32
_GUARD = 1 << 8
# How CRIU asks was read and tried for these.
_KNOWN_CRIU = ((4, 2), (4, 3))

# Numbers of descriptors that CRIU, which takes the lowest, does not come to, and below the limit
# that every process has: its /proc, folders of processes in there, and their pagemaps.
_PROC, _FOLDERS, _PAGEMAPS = 600, range(601, 801), range(801, 1001)
# AT_FDCWD, as the filter sees it.
_HERE, _WORD = -100 & 0xFFFFFFFF, 0xFFFFFFFF
# What is hidden is told in milliseconds; who is not told goes on and sends everything.
_TOLD_S = 10.0
# Longer than every path in a process's folder that is looked for.
_PATH_BYTES = 32


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
        self._smaps: dict[int, bytes] = {}
        # How often CRIU has opened a process's pagemap, and how many descriptors it was given.
        self._opened: collections.Counter[int] = collections.Counter()
        self._given = 0
        self._only: int | None = None
        self._told = threading.Event()
        self._told.set()
        self._supervisor = Supervisor(
            picking(
                Pick(OPENAT, {0: _HERE, 2: os.O_PATH | os.O_DIRECTORY}),
                Pick(OPENAT, {0: _PROC, 2: os.O_PATH}),
                Pick(OPENAT, {0: _FOLDERS, 2: os.O_RDONLY}),
                Pick(IOCTL, {0: range(_PAGEMAPS.start), 1: _PAGEMAP_SCAN}),
                Pick(LSEEK, {2: os.SEEK_DATA}),
            ),
            self._answer,
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
        self._told.set()
        self._supervisor.close()

    def release(self) -> None:
        """CRIU has been started."""
        self._supervisor.release()

    def only(self, number: int | None) -> None:
        """The tree has one process, of this number by CRIU, or several. CRIU keeps the folder open
        that it looked at last: that of the only process then is the one which it opens to freeze.
        """
        self._only = number

    def expect(self) -> None:
        """What is to be hidden is told soon: a question about it waits until ``told``."""
        self._told.clear()

    def told(self) -> None:
        """Nothing more is to be expected."""
        self._told.set()

    def wait(self) -> None:
        """Wait until that is so."""
        self._told.wait(_TOLD_S)

    def hide(
        self,
        standing: Iterable[Standing],
        objects: Iterable[shared.Found],
        smaps: Mapping[int, bytes],
    ) -> None:
        """Hide these mappings and shared memory objects from now on, and all private memory of
        those processes, by CRIU's number, whose ``smaps`` are given.
        """
        self._objects = {each.key for each in objects}
        self._hidden = {
            each.space.id: [tuple(area) for area in each.areas.tolist()] for each in standing
        }
        self._smaps = dict(smaps)

    def _answer(self, call: Call) -> int | Given | None:
        if call.call == LSEEK:
            return self._of_an_object(call)
        return self._of_a_mapping(call) if call.call == IOCTL else self._opening(call)

    def _of_an_object(self, call: Call) -> int | None:
        self.wait()
        if not self._objects:
            return None
        key = shared.key_of(call.path(call.arguments[0]))
        return -errno.ENXIO if key in self._objects else None

    def _of_a_mapping(self, call: Call) -> int | None:
        descriptor, _, address, *_ = call.arguments
        _, _, start, end, *_, mask, _, _ = _ARGUMENT.unpack(call.read(address, _ARGUMENT.size))
        # Most questions are about small mappings: the job stands still, so these go on at once.
        if mask & _GUARD or end - start < SMALLEST_BYTES:
            return None
        number, name = _of_a_process(call.link(descriptor))
        if name != "pagemap":
            return None
        self.wait()
        areas = self._hidden.get(number, ())
        if not any(low <= start and end <= high for low, high in areas):
            return None
        call.write(address + _AT_WALK_END, struct.pack("=Q", end))
        return 0

    def _opening(self, call: Call) -> Given | None:
        """CRIU gets the folders that lead to what it is to be given instead under numbers by which
        the filter knows them: no other opening needs a question.
        """
        folder, address, *_ = call.arguments
        name = call.text(address, _PATH_BYTES)
        if folder & _WORD == _HERE:
            if name != b"/proc":
                return None
            return _opened(f"/proc/{call.pid}/root/proc", os.O_DIRECTORY, _PROC)
        if folder == _PROC:
            # Its own folder it looks at while it is not yet told what is hidden.
            if not name.isdigit() or int(name) == call.pid:
                return None
            self.wait()
            # Nothing more is asked about a folder from which nothing is given: a thread's, say.
            if int(name) not in self._smaps and int(name) != self._only:
                return None
            path = os.path.join(call.path(_PROC), name.decode())
            return _opened(path, os.O_DIRECTORY, self._next(call, _FOLDERS))
        if name not in (b"smaps", b"pagemap"):
            return None
        number, _ = _of_a_process(call.link(folder) + "/")
        smaps = self._smaps.get(number)
        if smaps is None:
            return None
        return _file(smaps) if name == b"smaps" else self._pagemap(call, number)

    def _pagemap(self, call: Call, number: int) -> Given | None:
        """CRIU asks a process for its guard pages first, if the kernel has any (Linux 6.15), and
        opens its pagemap anew then.
        """
        self._opened[number] += 1
        if self._opened[number] == 1 and pagemap.knows_guards():
            # This question needs nobody to be asked, either.
            path = os.path.join(call.path(call.arguments[0]), "pagemap")
        else:
            path = f"/proc/{call.pid}/pagemap"
        return _opened(path, 0, self._next(call, _PAGEMAPS))

    def _next(self, call: Call, numbers: range) -> int:
        """One that CRIU does not use."""
        for _ in numbers:
            self._given += 1
            number = numbers[self._given % len(numbers)]
            if not os.path.lexists(call.path(number)):
                return number
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def _of_a_process(link: str) -> tuple[int, str]:
    """Of ".../PID/NAME", both: the rest depends on where CRIU's /proc is."""
    *_, number, name = ("", "", *link.split("/"))
    return (int(number) if number.isdigit() else 0), name


def _opened(path: str, flags: int, number: int) -> Given:
    # The kernel does not hand on a descriptor of O_PATH; this one does for all that CRIU does.
    return Given(os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags), number)


def _file(content: bytes) -> Given:
    descriptor = os.memfd_create("smaps", os.MFD_CLOEXEC)
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return Given(descriptor)
