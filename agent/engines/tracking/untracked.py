"""No tracking at all: everything counts as written, always.

A copy made ahead is then worth only its content: a store that has seen it does not need to compress
it again while the job stands still.

Promises: what ``base.Tracker`` promises, on every kernel.
Does not: save any reading.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.engines.tracking import areas
from agent.host import pagemap
from agent.host.pagemap import Pagemap, Ranges


class Untracked:
    """Names everything in its first round, and nothing as unchanged ever."""

    kind = "none"

    def __init__(self, pid: int, reason: str) -> None:
        self.reason = reason
        self._pid = pid
        self._given = False

    def round(self) -> Iterator[Ranges]:
        """All pages, once."""
        if self._given:
            return
        self._given = True
        pages = Pagemap(self._pid)
        try:
            for start, end in areas.eligible(self._pid).tolist():
                yield pages.existing(start, end)
        finally:
            pages.close()

    def unchanged(self, areas: Ranges) -> Ranges:
        """None."""
        return pagemap.none()

    def again(self) -> bool:
        """Perhaps it can be tracked by now."""
        return False

    def take_back(self, pid: int) -> None:
        """Nothing was put there."""

    def close(self) -> None:
        """Nothing to do."""
