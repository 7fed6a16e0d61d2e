"""When members did what, on one clock, from what each says of its own.

A member's clock is as far from ours as it was when the word reached it, which was after it was
said, and when the answer left it, which was before that came back. Each exchange with a node bounds
the distance from both sides; the narrowest bounds of all exchanges hold (the principle of NTP,
RFC 5905 section 8). Clocks of different nodes drift apart by less than a millisecond in the seconds
of an epoch.

Promises: pure; ``skew_s`` and ``stood_s`` are upper bounds; what members do not tell is None. Safe
from several threads.
Does not: read a clock.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection

from agent.model.protocol import Said, Step


class Timing:
    """One epoch's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By node: the least and the most that its clock can be ahead of ours.
        self._ahead_s: dict[str, tuple[float, float]] = {}
        self._spans_s: dict[Step, dict[str, tuple[str, float, float]]] = {}

    def heard(self, node: str, member: str, said: Said, sent_s: float, received_s: float) -> None:
        """``member`` on ``node`` answered; when it was spoken to, and when the answer came."""
        times = said.times
        if times is None:
            return
        with self._lock:
            least, most = self._ahead_s.get(node, (-math.inf, math.inf))
            least = max(least, times.answered_s - received_s)
            most = min(most, times.heard_s - sent_s)
            self._ahead_s[node] = least, most
            if times.done_s:
                spans = self._spans_s.setdefault(said.answer.step, {})
                spans[member] = node, times.began_s, times.done_s

    def skew_s(self, step: Step, members: Collection[str]) -> float | None:
        """How far apart at most the first and the last of ``members`` had done ``step``."""
        with self._lock:
            spans = self._spans_s.get(step, {})
            if not spans.keys() >= set(members):
                return None
            earliest, latest = [], []
            for node, _, done_s in spans.values():
                least, most = self._ahead_s[node]
                if least > most:
                    return None  # a clock that jumped
                earliest.append(done_s - most)
                latest.append(done_s - least)
            if len({node for node, _, _ in spans.values()}) == 1:
                done = [done_s for _, _, done_s in spans.values()]
                return max(done) - min(done)
            return max(latest) - min(earliest)

    def stood_s(self, first: Step, last: Step, members: Collection[str]) -> float | None:
        """How long at most it was from when one of ``members`` began ``first`` until all of them
        had done ``last``.
        """
        with self._lock:
            beginning, ending = self._spans_s.get(first, {}), self._spans_s.get(last, {})
            if not (beginning.keys() >= set(members) and ending.keys() >= set(members)):
                return None
            spans = [*beginning.values(), *ending.values()]
            if any(least > most for least, most in (self._ahead_s[node] for node, _, _ in spans)):
                return None  # a clock that jumped
            if len({node for node, _, _ in spans}) == 1:
                began_s = min(began_s for _, began_s, _ in beginning.values())
                return max(done_s for _, _, done_s in ending.values()) - began_s
            earliest_s = min(at_s - self._ahead_s[node][1] for node, at_s, _ in beginning.values())
            latest_s = max(at_s - self._ahead_s[node][0] for node, _, at_s in ending.values())
            return latest_s - earliest_s

    def longest_s(self, steps: Collection[Step], members: Collection[str]) -> float | None:
        """The longest that one of ``members`` was at work on ``steps`` in all, without what it
        waited for others.
        """
        with self._lock:
            found = [self._spans_s.get(step, {}) for step in steps]
            if not all(spans.keys() >= set(members) for spans in found):
                return None
            return max(sum(spans[each][2] - spans[each][1] for spans in found) for each in members)
