"""A cut that goes on step by step, as somebody far away says.

Promises: as ``stepped``; a capture that is given up lets the processes go on.
Does not: keep time; whoever calls ``reach`` gives a deadline.
"""

from __future__ import annotations

import enum

from agent import errors
from agent.engines.base import Disposition
from agent.host import clock
from agent.node.stepped import Stepped

# The last member of a group runs some milliseconds after the first, or something is wrong.
_OTHERS_S = 0.5


class Stage(enum.IntEnum):
    """Where a capture stands, in order."""

    READY = 0
    POISED = 1
    FROZEN = 2
    HELD = 3
    CAPTURED = 4
    RELEASED = 5
    RUNNING = 6


class SteppedCut(Stepped[Stage]):
    """The cut of ``parties`` members that are captured at once; see ``engines.base.Cut``."""

    def __init__(self, parties: int) -> None:
        super().__init__(parties, Stage.READY, _given_up)
        self._kill = False

    def store(self) -> None:
        """All members of the group run, or it is no longer waited for them."""
        with self._changed:
            self._allowed = max(self._allowed, Stage.RUNNING)
            self._changed.notify_all()

    def end(self, deadline: clock.Deadline) -> None:
        """As ``reach`` for ``RUNNING``, but the members leave ``CAPTURED`` by being ended."""
        self._kill = True
        self.reach(Stage.RUNNING, deadline)

    # Called by the engine.

    def ready(self) -> None:
        """Wait for the pre hooks."""
        self._pass(Stage.READY)

    def poised(self, wait_s: float) -> bool:
        """Wait to be frozen."""
        return self._passed(Stage.POISED, wait_s)

    def frozen(self) -> None:
        """Wait for the others to stand still."""
        self._pass(Stage.FROZEN)

    def held(self) -> None:
        """Wait for the others to be silent."""
        self._pass(Stage.HELD)

    def captured(self) -> Disposition:
        """Wait for the others to be read, or for the end."""
        self._pass(Stage.CAPTURED)
        return Disposition.KILL if self._kill else Disposition.RESUME

    def released(self) -> None:
        """Wait for the others' traffic to flow."""
        self._pass(Stage.RELEASED)

    def running(self) -> None:
        """Be counted, and leave to the members that do not run yet the processors that storing
        would take.
        """
        self._arrive(Stage.RUNNING)
        if not self._kill:
            self._linger(Stage.RUNNING, _OTHERS_S)


def _given_up() -> errors.DumpFailed:
    return errors.DumpFailed(
        "the epoch was given up", hint="the coordinator's error says why; the job goes on"
    )
