"""No tracking at all: everything counts as written, always.

A copy made ahead is then worth only its content (``compared``).

Promises: what ``base.Tracker`` promises, on every kernel.
Does not: save any reading.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent.engines.tracking import areas
from agent.host import pagemap
from agent.host.pagemap import Pagemap, Ranges


class Untracked:
    """Names everything in every round, and nothing as unchanged ever."""

    kind = "none"

    def __init__(self, pid: int, reason: str) -> None:
        self.reason = reason
        self._pid = pid

    def round(self) -> Iterator[Ranges]:
        """All pages."""
        pages = Pagemap(self._pid)
        try:
            for start, end in areas.eligible(self._pid).tolist():
                yield pages.existing(start, end)
        finally:
            pages.close()

    def cut(self, areas: Ranges) -> tuple[Ranges, Ranges]:
        """All that exist, none unchanged."""
        return pagemap.existing(self._pid, areas), pagemap.none()

    def again(self) -> bool:
        """Perhaps it can be tracked by now."""
        return False

    def take_back(self, pid: int) -> None:
        """Nothing was put there."""

    def close(self) -> None:
        """Nothing to do."""
