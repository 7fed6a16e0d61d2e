"""The gate of a restore that goes on step by step, as somebody far away says.

Promises: as ``stepped``; a restore that is given up leaves nothing that runs.
Does not: keep time; whoever calls ``reach`` gives a deadline.
"""

from __future__ import annotations

import enum

from agent import errors
from agent.node.stepped import Stepped


class Stage(enum.IntEnum):
    """Where a restore stands, in order."""

    FILLED = 0
    RESTORED = 1
    RELEASED = 2
    RUNNING = 3


class SteppedGate(Stepped[Stage]):
    """The gate of ``parties`` members that are restored at once; see ``engines.base.Gate``."""

    def __init__(self, parties: int) -> None:
        super().__init__(parties, Stage.FILLED, _given_up)

    def filled(self) -> None:
        """Wait for the others' files."""
        self._pass(Stage.FILLED)

    def restored(self) -> None:
        """Wait for the others to stand complete, and for the word to go on."""
        self._pass(Stage.RESTORED)

    def released(self) -> None:
        """Wait for the others to hear."""
        self._pass(Stage.RELEASED)

    def running(self) -> None:
        """Be counted: the engine has brought the member back, and it runs."""
        self._arrive(Stage.RUNNING)


def _given_up() -> errors.RestoreFailed:
    return errors.RestoreFailed(
        "the restore was given up", hint="the coordinator's error says why; the placeholders wait"
    )
