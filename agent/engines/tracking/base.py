"""What a tracker promises: which pages must be read again.

A copy of a running process's memory is made in rounds. Each round names the pages that the copy
lacks or has in an older version; at the cut, when the process stands still, the tracker says which
pages the copy is sure to have as they are. What cannot be known counts as written.

Promises: a page that ``cut`` names as unchanged was not written, nor replaced by another, since the
last round that named it gave it out, but by who had hold of it by then to write to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from agent.host.pagemap import Ranges


class Tracker(Protocol):
    """Follows one process. Not safe from several threads. Closing it leaves nothing in the process,
    and neither does the death of its owner.

    ``kind`` names how it tells, ``reason`` why not by a better way ("" if there is none).
    """

    kind: str
    reason: str

    def round(self) -> Iterator[Ranges]:
        """The pages to read once whoever has hold of them has let go (``quiet``), piece by piece:
        all that exist in the first round, then those written since they were last given out.

        Raises:
            errors.NotFound: the process has ended.
        """

    def cut(self, areas: Ranges) -> tuple[Ranges, Ranges]:
        """Of the process, which stands still, the pages that exist in these mappings (a row each),
        and those that were not written since they were given out, which may name others as well.

        Raises:
            errors.NotFound: the process has ended.
        """

    def again(self) -> bool:
        """Another copy begins: try anew what could not be tracked in the last one. False: for that
        it must be made anew.

        Raises:
            errors.NotFound: the process has ended.
        """

    def take_back(self, pid: int) -> None:
        """Leave nothing in this process, which was forked meanwhile and is seen for the first time.

        Raises:
            errors.InjectionRefused: it cannot be reached.
            errors.NotFound: it has ended.
        """

    def close(self) -> None:
        """Let go of the process; safe to repeat."""
