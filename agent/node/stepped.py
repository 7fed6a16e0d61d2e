"""Threads of an engine, one a container, that go on step by step, as somebody far away says.

They stop at each stage until it is allowed. ``reach`` allows one stage and waits until all threads
stand at the next.

Promises: no thread passes a stage that was not allowed; ``give_up`` makes every thread that waits,
or comes to wait, fail.
Does not: keep time; whoever calls ``reach`` gives a deadline. Nor know what the stages are:
``steppedcut`` and ``steppedgate`` do.
"""

from __future__ import annotations

import enum
import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from agent import errors
from agent.host import clock

StageT = TypeVar("StageT", bound=enum.IntEnum)


class Stepped(Generic[StageT]):
    """``parties`` threads, of which each passes the stages from ``first`` on. ``over`` makes what
    they fail with when they are given up.
    """

    def __init__(self, parties: int, first: StageT, over: Callable[[], errors.CkptError]) -> None:
        self._parties = parties
        self._first = first
        self._over = over
        self._reached: Counter[StageT] = Counter()
        self._waited: set[tuple[StageT, int]] = set()
        self._allowed: int = first - 1
        self._failure: BaseException | None = None
        self._given_up = False
        self._changed = threading.Condition()

    def check(self) -> None:
        """Raise if the members were told to give up, or one of them failed."""
        if self._given_up:
            raise self._over()

    def reach(self, stage: StageT, deadline: clock.Deadline) -> None:
        """Let all members leave the stage before and wait until they stand at ``stage``.

        Raises:
            errors.DeadlineExceeded: not all came there in time.
            BaseException: what a member failed with.
        """
        with self._changed:
            self._allowed = max(self._allowed, stage - 1)
            self._changed.notify_all()
            came = self._changed.wait_for(
                lambda: self._failure or self._given_up or self._reached[stage] >= self._parties,
                deadline.remaining_s,
            )
            if self._failure is not None:
                raise self._failure
            if self._given_up:
                raise self._over()
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

    def _arrive(self, stage: StageT) -> None:
        """Be counted at a stage, and go on."""
        with self._changed:
            self._reached[stage] += 1
            self._changed.notify_all()

    def _linger(self, stage: StageT, most_s: float) -> None:
        """Wait until a stage may be left or nobody goes on, but no longer than ``most_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or self._allowed >= stage, most_s)

    def _pass(self, stage: StageT) -> None:
        """Be counted at a stage, and wait until it may be left."""
        with self._changed:
            self._reached[stage] += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._given_up or self._allowed >= stage)
            if self._given_up:
                raise self._over()

    def _passed(self, stage: StageT, wait_s: float) -> bool:
        """As ``_pass``; False if it may not be left within ``wait_s``. Whoever comes again is not
        counted again.
        """
        with self._changed:
            me = stage, threading.get_ident()
            if me not in self._waited:
                self._waited.add(me)
                self._reached[stage] += 1
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._given_up or self._allowed >= stage, wait_s)
            if self._given_up:
                raise self._over()
            return self._allowed >= stage
