"""How often somebody may ask: pure, what was asked and what time it is in, how long to wait out.

A bucket that holds ``burst`` and refills with ``per_s`` a second is one number: the moment at which
it will be full again (the generic cell rate algorithm, ITU-T I.371).

Promises: over any span nobody gets more than ``burst`` plus ``per_s`` times its seconds; what is
remembered is bounded, however many ask; whoever has been forgotten had a full bucket, or shares
one with the others for whom there was no room.
Does not: read a clock or lock.
"""

from __future__ import annotations

import dataclasses

from agent import errors

# What sums of a clock's seconds, which may be millions, are off by.
_ROUNDING_S = 1e-6


@dataclasses.dataclass(frozen=True)
class Rate:
    """``per_s`` a second in the long run, ``burst`` at once.

    Raises:
        errors.InvalidInput: it would let nothing through.
    """

    per_s: float
    burst: int

    def __post_init__(self) -> None:
        if not (self.per_s > 0 and self.burst >= 1):
            raise errors.InvalidInput(
                f"a rate of {self.per_s} a second and {self.burst} at once lets nothing through",
                hint="allow at least one at once and more than none a second",
            )


class Buckets:
    """A bucket for each of up to ``most`` keys, and one for all others together."""

    def __init__(self, rate: Rate, most: int) -> None:
        self._rate = rate
        self._most = most
        # By key, when its bucket is full again; who asked last is last.
        self._full_s: dict[str, float] = {}
        self._others_s = 0.0

    def __len__(self) -> int:
        return len(self._full_s)

    def wait_s(self, key: str, now_s: float) -> float:
        """Seconds after which ``key`` may ask again, 0 for now; takes nothing."""
        full_s = self._full_s.get(key)
        if full_s is None:
            full_s = 0.0 if self._has_room(now_s) else self._others_s
        span_s = self._rate.burst / self._rate.per_s
        # The bucket holds a whole one once it lacks no more than the others.
        wait_s = full_s - now_s - span_s + 1.0 / self._rate.per_s
        return wait_s if wait_s > _ROUNDING_S else 0.0

    def take(self, key: str, now_s: float) -> float:
        """Take one for ``key`` if there is one; as ``wait_s`` if there is none."""
        wait_s = self.wait_s(key, now_s)
        if wait_s > 0:
            return wait_s
        if key not in self._full_s and not self._has_room(now_s):
            self._others_s = self._one_less(self._others_s, now_s)
            return 0.0
        self._full_s[key] = self._one_less(self._full_s.pop(key, 0.0), now_s)
        return 0.0

    def _one_less(self, full_s: float, now_s: float) -> float:
        return max(full_s, now_s) + 1.0 / self._rate.per_s

    def _has_room(self, now_s: float) -> bool:
        """Whether one more is remembered; those whose buckets are full again are forgotten."""
        if len(self._full_s) >= self._most:
            self._full_s = {key: at_s for key, at_s in self._full_s.items() if at_s > now_s}
        return len(self._full_s) < self._most
