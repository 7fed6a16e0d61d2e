"""Reads of an image that are tried again: a tree that runs already waits for what they bring.

Promises: pages come in order, each once. What another try may cure (the error says so) is tried
again, with growing pauses, until no page has come for a bounded time; what does not match its
digest is read once more, for that may be another copy of it; what is missing is not.
Does not: verify; know who waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

from agent import errors
from agent.host import clock
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun

logger = logging.getLogger(__name__)

# Short against what a person notices; long against what an NFS server takes to answer again.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


def read(
    source: MemberSource,
    space: AddressSpace,
    runs: Sequence[PageRun],
    pause: Callable[[float], None],
    patience_s: float,
) -> Iterator[tuple[int, memoryview | None, int]]:
    """As ``MemberSource.read``. ``pause`` lets seconds pass, or raises to end it; while reading
    fails, ``patience_s`` may pass without a page.

    Raises:
        errors.Corrupt | errors.Missing | errors.VolumeError: trying again does not help.
    """
    left = list(runs)
    reached = 0
    deadline: clock.Deadline | None = None
    reread = False
    pause_s = _FIRST_PAUSE_S
    while left:
        try:
            for address, data, pages in source.read(space, left):
                yield address, data, pages
                reached = address + pages * PAGE_BYTES
                deadline, reread, pause_s = None, False, _FIRST_PAUSE_S
        except errors.CkptError as exc:
            if deadline is None:
                deadline = clock.Deadline.after(patience_s)
            if isinstance(exc, errors.Corrupt):
                if reread:
                    raise
                reread = True
            elif not exc.retryable or deadline.expired:
                raise
            logger.warning(
                "memory of the image cannot be read; it is tried again",
                extra={"reason": exc.message, "code": exc.code},
            )
        else:
            return
        pause(min(pause_s, deadline.remaining_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        left = _from(left, reached)


def _from(runs: Sequence[PageRun], address: int) -> list[PageRun]:
    """What of the runs lies at or behind this address."""
    found = []
    for run in runs:
        start, end = max(run.address, address), run.address + run.pages * PAGE_BYTES
        if start < end:
            found.append(PageRun(start, (end - start) // PAGE_BYTES, run.flags))
    return found
