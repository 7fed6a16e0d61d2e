"""What others may do, as the API server says: asked for everybody that the coordinator acts for.

Promises: nothing is allowed but what the API server allowed seconds ago.
Does not: know what an operation takes; ``coordinator.jobsetchecks`` does.
"""

from __future__ import annotations

from collections.abc import Callable

from agent import errors
from agent.cluster.session import May
from agent.model import access

Authorize = Callable[[access.Caller, access.Right], None]


class Reviews:
    """Asks ``authorize``, which raises ``errors.Forbidden`` for a right that somebody lacks."""

    def __init__(self, authorize: Authorize) -> None:
        self._authorize = authorize

    def of(self, caller: access.Caller) -> May:
        """What ``caller`` may do."""

        def may(right: access.Right) -> bool:
            try:
                self._authorize(caller, right)
            except errors.Forbidden:
                return False
            return True

        return may
