"""Which pages of a tree that runs already are still to be sent, in what order, and by whom.

Several threads send. Each takes a share of what nobody has taken yet, behind its own last one, so
that it meets the same blocks of the store; where a process waits, one is taken around that page,
and a sender goes on behind it, for the next pages that are read are likely those.

Promises: each page is given to one sender, once; a question is answered when its page has been
sent, also if another one was sending it. Decides only; safe from several threads. A byte a page.
Does not: read or send.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import enum
import threading
from collections.abc import Sequence

import numpy as np

from agent.model.streams import PAGE_BYTES, PageRun

# What a sender takes at once: the more, the less often blocks are met by two; and the longer may
# somebody wait who asks for a page of it.
_SHARE_PAGES = 1024
# What comes along with a page that somebody waits for: half of what a block usually has, so that
# one or two are read; and from where on, so that neighbours do not ask for shreds.
_ASKED_PAGES, _ALIGNED_PAGES = 128, 64
# So many places where somebody has just read are gone on from, the newest first.
_FOLLOWED = 8


class Answer(enum.Enum):
    """What is known of a page that was asked for: nothing but zeros belong there; or it was sent
    before, and who asks may look again.
    """

    ZERO = enum.auto()
    SENT = enum.auto()


class _State(enum.IntEnum):
    """A page's. ``TOLD``: sent, and somebody was told so who asked for it."""

    WAITING = 0
    TAKEN = 1
    ZERO = 2
    SENT = 3
    TOLD = 4


@dataclasses.dataclass(eq=False)
class Share:
    """Pages of the address space ``number`` that one sender is to send, as runs; places ``first``
    up to, not including, ``last`` in the order of all. ``asked`` are the addresses that are waited
    for; ``again``: all of it was sent before.
    """

    number: int
    first: int
    last: int
    runs: list[PageRun]
    asked: list[int] = dataclasses.field(default_factory=list)
    again: bool = False


class Pending:
    """The pages of several address spaces, each with ascending runs, for so many ``senders``."""

    def __init__(self, spaces: Sequence[Sequence[PageRun]], senders: int) -> None:
        self._runs = spaces
        self._starts: list[np.typing.NDArray[np.int64]] = []
        # For each run the place of its first page in the order of all, and of its end at last.
        self._places: list[np.typing.NDArray[np.int64]] = []
        at = 0
        for runs in spaces:
            pages = np.fromiter((run.pages for run in runs), np.int64, len(runs))
            addresses = (run.address for run in runs)
            self._starts.append(np.fromiter(addresses, np.int64, len(runs)))
            self._places.append(np.concatenate(([0], np.cumsum(pages))) + at)
            at = int(self._places[-1][-1])
        self._ends = [int(places[-1]) for places in self._places]
        self._states = bytearray(at)
        self._left = at
        self._total = at
        self._begin = [at * sender // senders for sender in range(senders)]
        self._follow: collections.deque[int] = collections.deque(maxlen=_FOLLOWED)
        self._taken: list[Share] = []
        self._lock = threading.Lock()

    @property
    def sent_pages(self) -> int:
        """How many are in shares that were finished."""
        return self._total - self._left

    @property
    def complete(self) -> bool:
        """Whether all have been sent."""
        return not self._left

    def take(self, sender: int) -> Share | None:
        """What this sender is to send next; None if all is sent, or being sent by others."""
        with self._lock:
            at = self._follow.pop() if self._follow else self._begin[sender]
            first = self._states.find(_State.WAITING, at)
            if first < 0:
                first = self._states.find(_State.WAITING)
            if first < 0:
                return None
            share = self._claim(first, _SHARE_PAGES)
            self._begin[sender] = share.last
            return share

    def ask(self, number: int, address: int) -> Share | Answer | None:
        """Somebody waits for this page: what is to be sent now, what to answer, or None if a
        sender is at it, who will say so (``finish``).
        """
        with self._lock:
            at = self._place(number, address)
            state = _State.ZERO if at is None else self._states[at]
            if at is None or state == _State.ZERO:
                return Answer.ZERO
            if state == _State.TAKEN:
                share = next(each for each in self._taken if each.first <= at < each.last)
                share.asked.append(address)
                return None
            if state == _State.SENT:
                self._states[at] = _State.TOLD
                return Answer.SENT
            if state == _State.TOLD:
                # It looked again and is not there. That must not be; so it is sent again, since
                # whatever the cause, nobody is to wait for ever or find zeros.
                self._left += 1
                return Share(number, at, at + 1, self._cut(number, at, at + 1), [address], True)
            share = self._claim(self._back(number, at), _ASKED_PAGES, at)
            share.asked.append(address)
            self._follow.append(share.last)
            return share

    def zero(self, share: Share, address: int, pages: int) -> None:
        """These pages of a share are zero; they need not be sent."""
        at = self._place(share.number, address)
        if at is not None and not share.again:
            with self._lock:
                self._states[at : at + pages] = bytes([_State.ZERO]) * pages

    def finish(self, share: Share) -> list[tuple[int, Answer]]:
        """All of a share has been sent: the addresses that were asked for, with the answers."""
        with self._lock:
            self._left -= share.last - share.first
            if not share.again:
                mine = self._states[share.first : share.last]
                self._states[share.first : share.last] = mine.replace(
                    bytes([_State.TAKEN]), bytes([_State.SENT])
                )
                self._taken.remove(share)
            return [(address, self._answer(share.number, address)) for address in share.asked]

    def _answer(self, number: int, address: int) -> Answer:
        at = self._place(number, address)
        zero = at is None or self._states[at] == _State.ZERO
        return Answer.ZERO if zero else Answer.SENT

    def _claim(self, first: int, pages: int, through: int = 0) -> Share:
        """Take what waits from ``first`` on, in one address space, ``through`` that at least."""
        number = bisect.bisect_right(self._ends, first)
        last = min(max(first + pages, through + 1), self._ends[number])
        waiting = self._states[first:last]
        last -= len(waiting.lstrip(bytes([_State.WAITING])))
        self._states[first:last] = bytes([_State.TAKEN]) * (last - first)
        share = Share(number, first, last, self._cut(number, first, last))
        self._taken.append(share)
        return share

    def _back(self, number: int, at: int) -> int:
        """Where what waits around this place begins."""
        low = max(int(self._places[number][0]), at // _ALIGNED_PAGES * _ALIGNED_PAGES)
        before = self._states[low:at]
        return low + len(before.rstrip(bytes([_State.WAITING])))

    def _place(self, number: int, address: int) -> int | None:
        run = int(np.searchsorted(self._starts[number], address, side="right")) - 1
        if run < 0:
            return None
        page = (address - int(self._starts[number][run])) // PAGE_BYTES
        at = int(self._places[number][run]) + page
        return at if at < int(self._places[number][run + 1]) else None

    def _cut(self, number: int, first: int, last: int) -> list[PageRun]:
        places, found = self._places[number], []
        at = int(np.searchsorted(places, first, side="right")) - 1
        while first < last:
            run = self._runs[number][at]
            skipped = first - int(places[at])
            pages = min(run.pages - skipped, last - first)
            found.append(PageRun(run.address + skipped * PAGE_BYTES, pages, run.flags))
            first, at = first + pages, at + 1
        return found
