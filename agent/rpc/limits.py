"""What one caller may ask of a server, so that none keeps the others out.

Promises: a caller over its rate is refused before its rights are looked up, and told when to come
again; each call holds a thread, of which one caller has only so many; nobody, known as he
may be, has more than a few that say nothing, of which the rights cannot be looked up. Whoever asks
again and again for what it may not is refused before the API server is asked once more. Whoever
shows nobody's token again and again is refused by address before the API server is asked about
another, unless it comes through a port-forward; an address that shows good ones is not counted.
Does not: authenticate anybody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator

from agent import errors
from agent.host import clock
from agent.model.rates import Buckets, Rate

# More callers than ask a coordinator at once; what is remembered of each is about 200 bytes.
_CALLERS = 4096
# Refused identities from one address: a client with an expired token tries a few times; guessing a
# token takes more than the age of the world either way. It is the API server that is spared.
_STRANGERS = Rate(per_s=5.0, burst=50)
# Where port-forwards come from: the API server knows those callers, each way in costs it more than
# a question does, and one with a stale token must not shut the others out.
_FORWARDED = ("ipv4:127.0.0.1", "ipv6:%5B::1%5D")
# The first message comes with the call, so that the many calls of one name, such as those of a
# coordinator, are hardly ever here together.
_SILENT = 8
# Refusals are remembered for seconds, and each costs the API server a question; whoever has the
# right is not concerned.
_REFUSED = Rate(per_s=2.0, burst=50)
# A large node has 250 pods. Each is told a word of each of a dozen steps at once, and while it has
# not answered again every second; a word that overtakes another waits beside it for as long.
_WORDS = Rate(per_s=500.0, burst=5000)
_AT_ONCE = 288
# With as many for each as a caller may have, a fifth of an agent's threads.
_OTHERS = 4


@dataclasses.dataclass(frozen=True)
class Limits:
    """For each caller: how often it may call, and how many calls that last it may have at once.
    ``words`` is how often it may say something about an epoch instead, which is once a second and
    step for each pod; ``at_once`` how many calls that are answered once it may have here at the
    same moment. None: these are as others; as many as there are threads. ``acting`` is a user who
    acts for many others, each of whom it holds to limits of its own: it may call as often as it
    likes, and have calls that last for several.
    """

    rate: Rate
    lasting: int
    words: Rate | None = None
    at_once: int | None = None
    acting: str = ""


def for_agents(rate: Rate, lasting: int, coordinator: str) -> Limits:
    """What callers of a node's agent are held to, of which one may coordinate all of its pods;
    ``coordinator`` is the cluster's own: one of its callers must not keep the others out here.
    """
    return Limits(rate, lasting, _WORDS, _AT_ONCE, coordinator)


def for_coordinators(rate: Rate, lasting: int, threads: int) -> Limits:
    """What callers of a coordinator are held to, which has so many ``threads``; a plan waits for
    the agents of all pods of a group.
    """
    return Limits(rate, lasting, at_once=threads // 4)


class Limiter:
    """Keeps count for one server."""

    def __init__(self, limits: Limits | None) -> None:
        """``limits`` None: known callers are not counted."""
        self._limits = limits
        self._lock = threading.Lock()
        self._callers = Buckets(limits.rate, _CALLERS) if limits else None
        words = limits.words if limits else None
        self._words = Buckets(words, _CALLERS) if words else self._callers
        self._refused = Buckets(_REFUSED, _CALLERS)
        self._strangers = Buckets(_STRANGERS, _CALLERS)
        self._lasting: dict[str, int] = {}
        self._at_once: dict[str, int] = {}
        self._silent: dict[str, int] = {}

    @contextlib.contextmanager
    def identifying(self, address: str) -> Iterator[None]:
        """Around the question of who calls from ``address``.

        Raises:
            errors.Overloaded: too many from there were nobody.
        """
        if address in _FORWARDED:
            yield
            return
        with self._lock:
            wait_s = self._strangers.wait_s(address, clock.monotonic_s())
        if wait_s > 0:
            raise _refused("too many calls from your address were nobody's", wait_s)
        try:
            yield
        except errors.Unauthenticated:
            with self._lock:
                self._strangers.take(address, clock.monotonic_s())
            raise

    def count(self, user: str, *, word: bool) -> None:
        """A call of ``user``; ``word``: it says something about an epoch.

        Raises:
            errors.Overloaded: one too many.
        """
        callers = self._words if word else self._callers
        if callers is None or self._acts(user):
            return
        with self._lock:
            wait_s = callers.take(user, clock.monotonic_s())
        if wait_s > 0:
            raise _refused(f"{user} calls more often than is allowed", wait_s)

    @contextlib.contextmanager
    def reviewing(self, user: str) -> Iterator[None]:
        """Around the question whether ``user`` may do what it asks for.

        Raises:
            errors.Overloaded: it asked too often for what it may not.
        """
        with self._lock:
            wait_s = self._refused.wait_s(user, clock.monotonic_s())
        if wait_s > 0:
            raise _refused(f"{user} asks too often for what it may not", wait_s)
        try:
            yield
        except errors.Forbidden:
            with self._lock:
                self._refused.take(user, clock.monotonic_s())
            raise

    def answering(self, user: str) -> contextlib.AbstractContextManager[None]:
        """Around a call of ``user`` that is answered once; raises as ``lasting``."""
        most = self._limits.at_once if self._limits else None
        if most is None:
            return contextlib.nullcontext()
        return self._counted(self._at_once, user, most, "that wait for an answer")

    @contextlib.contextmanager
    def lasting(self, user: str) -> Iterator[None]:
        """Around a call of ``user`` that lasts.

        Raises:
            errors.Overloaded: there are as many already as it may have.
        """
        if self._limits is None:
            yield
            return
        most = self._limits.lasting * (_OTHERS if self._acts(user) else 1)
        with self._counted(self._lasting, user, most, "that last open"):
            yield

    def silent(self, user: str) -> contextlib.AbstractContextManager[None]:
        """Around the wait for the first message of a call of ``user``; raises as ``lasting``."""
        return self._counted(self._silent, user, _SILENT, "open without a word")

    def _acts(self, user: str) -> bool:
        return self._limits is not None and user == self._limits.acting != ""

    @contextlib.contextmanager
    def _counted(self, of: dict[str, int], user: str, most: int, what: str) -> Iterator[None]:
        with self._lock:
            there = of.get(user, 0)
            if there >= most:
                raise errors.Overloaded(
                    f"{user} has {there} calls {what}, which is as many as it may",
                    hint="end one of them, or ask for what is there now instead",
                )
            of[user] = there + 1
        try:
            yield
        finally:
            with self._lock:
                of[user] -= 1
                if not of[user]:
                    del of[user]


def _refused(what: str, wait_s: float) -> errors.Overloaded:
    # Upwards, so that whoever waits as told is let in.
    wait_s = math.ceil(wait_s * 1000) / 1000
    return errors.Overloaded(what, hint=f"call again in {wait_s:g} s", retry_after_s=wait_s)
