"""A cut that goes on step by step, as somebody far away says.

The engine's threads, one a container, stop at each stage until it is allowed. ``reach`` allows one
stage and waits until all threads stand at the next.

Promises: no thread passes a stage that was not allowed; ``give_up`` makes every thread that waits,
or comes to wait, fail, so that the engine lets the processes go on.
Does not: keep time; whoever calls ``reach`` gives a deadline.
"""

from __future__ import annotations

import enum
import threading

from agent import errors
from agent.engines.base import Disposition
from agent.host import clock


class Stage(enum.IntEnum):
    """Where a capture stands, in order."""

    READY = 0
    FROZEN = 1
    HELD = 2
    CAPTURED = 3
    RELEASED = 4
    RUNNING = 5


class SteppedCut:
    """The cut of ``parties`` members that are captured at once."""

    def __init__(self, parties: int) -> None:
        self._parties = parties
        self._reached = dict.fromkeys(Stage, 0)
        self._allowed: Stage | None = None
        self._kill = False
        self._failure: BaseException | None = None
        self._given_up = False
        self._changed = threading.Condition()

    # Called by the engine.

    def ready(self) -> None:
        """Wait to be frozen."""
        self._pass(Stage.READY)

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
        """Be counted."""
        with self._changed:
            self._reached[Stage.RUNNING] += 1
            self._changed.notify_all()

    def check(self) -> None:
        """Raise if the members were told to give up, or one of them failed."""
        if self._given_up:
            raise _given_up()

    # Called by whoever decides.

    def reach(self, stage: Stage, deadline: clock.Deadline, *, kill: bool = False) -> None:
        """Let all members leave the stage before and wait until they stand at ``stage``. ``kill``
        lets them leave ``CAPTURED`` by being ended.

        Raises:
            errors.DeadlineExceeded: not all came there in time.
            BaseException: what a member failed with.
        """
        with self._changed:
            self._kill = kill
            if stage is not Stage.READY:
                self._allowed = Stage(stage - 1)
            self._changed.notify_all()
            came = self._changed.wait_for(
                lambda: self._failure or self._given_up or self._reached[stage] >= self._parties,
                deadline.remaining_s,
            )
            if self._failure is not None:
                raise self._failure
            if self._given_up:
                raise _given_up()
        if not came:
            raise errors.DeadlineExceeded(
                f"not all containers were {stage.name.lower()} in time",
                hint="allow more time, or find what is slow",
            )

    def fail(self, failure: BaseException) -> None:
        """A member failed: none goes on."""
        with self._changed:
            self._failure = self._failure or failure
            self._given_up = True
            self._changed.notify_all()

    def give_up(self) -> None:
        """Let nobody go on."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def _pass(self, stage: Stage) -> None:
        with self._changed:
            self._reached[stage] += 1
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._given_up or (self._allowed is not None and self._allowed >= stage)
            )
            if self._given_up:
                raise _given_up()


def _given_up() -> errors.DumpFailed:
    return errors.DumpFailed(
        "the epoch was given up", hint="the coordinator's error says why; the job goes on"
    )
