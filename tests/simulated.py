"""Members and a store that exist in virtual time only, for a coordinator that is the real one.

Promises: each simulated member is the participant that ships; messages take the time they are
given, in the order of their arrival, and may be lost; nothing sleeps.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections.abc import Callable, Mapping

from agent import errors
from agent.coordinator.driver import Answered, Event, Settled
from agent.model.protocol import RESTORE, Answer, Course, Decision, Said, Step, Told
from agent.node import participant
from agent.node.participant import Participant, Timer

TIMERS_S = {Timer.SILENCE: 5.0, Timer.STOPPED: 60.0}


class World:
    """A coordinator's mailbox and links, with members behind them. ``delay_s`` is how long a
    message takes, ``spend_s`` how long a member needs for a step, ``lose`` the part that is lost.
    """

    def __init__(
        self,
        course: Course,
        members: int,
        *,
        seed: int = 0,
        delay_s: float = 0.0005,
        spend_s: Callable[[Step], float] = lambda step: 0.01,
        lose: float = 0.0,
    ) -> None:
        self._back = course is RESTORE
        self.members = [Participant.begin(course) for _ in range(members)]
        self.decision: Decision | None = None
        self.frozen_s: dict[int, float] = {}
        self.longest_stop_s = 0.0
        self.unreachable: set[int] = set()
        self._random = random.Random(seed)
        self._delay_s, self._spend_s, self._lose = delay_s, spend_s, lose
        self._now_s = 0.0
        self._order = itertools.count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._arrived: list[Event] = []
        self._timers: dict[tuple[int, Timer], int] = {}

    # The coordinator's side.

    def now_s(self) -> float:
        return self._now_s

    def next(self, until_s: float) -> Event | None:
        while not self._arrived:
            if not self._queue or self._queue[0][0] > until_s:
                self._now_s = max(self._now_s, until_s)
                return None
            self._step()
        return self._arrived.pop()

    def tell(self, member: int, told: Told) -> None:
        if member in self.unreachable or self._random.random() < self._lose:
            return
        self._after(self._delay_s, lambda: self._act(member, self.members[member].told(told)))

    def decide(self, wish: Decision, parts: Mapping[int, bytes]) -> None:
        self._after(self._delay_s, lambda: self._settle(wish))

    # The members' side.

    def run_on(self, span_s: float) -> None:
        """Let time pass without a coordinator."""
        until_s = self._now_s + span_s
        while self._queue and self._queue[0][0] <= until_s:
            self._step()
        self._now_s = until_s

    def _step(self) -> None:
        self._now_s, _, act = heapq.heappop(self._queue)
        act()

    def _after(self, span_s: float, act: Callable[[], None]) -> int:
        number = next(self._order)
        heapq.heappush(self._queue, (self._now_s + span_s, number, act))
        return number

    def _settle(self, wish: Decision) -> None:
        self.decision = self.decision or wish
        self._after(self._delay_s, lambda: self._arrived.append(Settled(self.decision)))

    def _act(self, which: int, effects: list[participant.Effect]) -> None:
        made = self.members[which]
        for effect in effects:
            match effect:
                case participant.Do(step):
                    span_s = self._spend_s(step) * self._random.uniform(0.5, 1.5)
                    self._after(span_s, lambda step=step: self._act(which, made.did(step)))  # type: ignore[misc]
                case participant.LetGo(committed):
                    running = committed or not self._back
                    go = functools.partial(made.let_go, running=running)
                    self._after(0.001, lambda go=go: self._act(which, go()))  # type: ignore[misc]
                case participant.Settle():
                    self._after(self._delay_s, lambda: self._told_decision(which))
                case participant.Arm(timer):
                    self._arm(which, timer)
                case participant.Disarm(timer):
                    self._timers.pop((which, timer), None)
                case participant.Reply(answer):
                    self._reply(which, answer)
        self._note_stop(which)

    def _told_decision(self, which: int) -> None:
        self.decision = self.decision or Decision.ABANDONED
        self._act(which, self.members[which].settled(self.decision))

    def _arm(self, which: int, timer: Timer) -> None:
        def expire() -> None:
            if self._timers.get((which, timer)) == number:
                self._act(which, self.members[which].expired(timer))

        number = self._after(TIMERS_S[timer], expire)
        self._timers[which, timer] = number

    def _reply(self, which: int, answer: Answer) -> None:
        if which in self.unreachable or self._random.random() < self._lose:
            return
        error = errors.DumpFailed(answer.problem) if answer.problem else None
        event = Answered(which, Said(answer, error))
        self._after(self._delay_s, lambda: self._arrived.append(event))

    def _note_stop(self, which: int) -> None:
        if self.members[which].stopped:
            self.frozen_s.setdefault(which, self._now_s)
        elif which in self.frozen_s:
            stopped_s = self._now_s - self.frozen_s.pop(which)
            self.longest_stop_s = max(self.longest_stop_s, stopped_s)
