"""The way to members that are asked by calls, wherever they are, and the mailbox of what they say.

Promises: the newest word is said to a member until it is answered, and again when reminded; a
member that cannot be reached for as long as it is waited for is lost; the store is asked by a
thread of its own for each wish; leaving the context lets no thread begin another call.
Does not: know whether a call crosses a network.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

from agent import errors
from agent.coordinator.driver import Answered, Event, Lost, Settled
from agent.host import clock
from agent.model.protocol import Decision, Said, Step, Told

Call = Callable[[Told, float], Said | None]
"""Say something to a member and wait so many seconds for what it says to that; None: nothing yet.

Raises ``errors.CkptError`` if it cannot be reached or will not hear of it.
"""

Decide = Callable[[Decision, Mapping[int, bytes]], Decision]
"""Commit the epoch of these parts, or abandon it; what it is then.

Raises ``errors.CkptError`` if that cannot be told.
"""

# A call comes back at least so often, so that a member hears that somebody still waits.
_WAIT_S = 1.0
# An agent that is started anew answers after this.
PATIENCE_S = 2.0
_AGAIN_S = 0.1


class Mailbox:
    """Events in the order in which they came, on this host's clock."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def now_s(self) -> float:
        """Seconds on the monotonic clock."""
        return clock.monotonic_s()

    def next(self, until_s: float) -> Event | None:
        """The next event; None if the time has come and none has."""
        try:
            return self._events.get(timeout=max(0.0, until_s - self.now_s()))
        except queue.Empty:
            return None

    def put(self, event: Event) -> None:
        """Safe from any thread and from signal handlers."""
        self._events.put(event)


class Links:
    """Threads that talk to the members of one epoch."""

    def __init__(
        self,
        mailbox: Mailbox,
        calls: Sequence[Call],
        decide: Decide,
        patience_s: Callable[[Step], float] = lambda step: PATIENCE_S,
    ) -> None:
        """``patience_s``: how long a member that cannot be reached is told a step again."""
        self._mailbox = mailbox
        self._decide = decide
        self._members = [
            _Member(number, call, mailbox, patience_s) for number, call in enumerate(calls)
        ]

    @contextlib.contextmanager
    def open(self) -> Iterator[Links]:
        """Talk to members within the context."""
        try:
            yield self
        finally:
            for each in self._members:
                each.stop()

    def tell(self, member: int, told: Told) -> None:
        """See ``driver.Links``."""
        self._members[member].tell(told)

    def decide(self, wish: Decision, parts: Mapping[int, bytes]) -> None:
        """See ``driver.Links``."""
        given = dict(parts)

        def ask() -> None:
            try:
                self._mailbox.put(Settled(self._decide(wish, given)))
            except errors.CkptError as exc:
                self._mailbox.put(Settled(None, exc))

        threading.Thread(target=ask, name=f"decide {wish.value}", daemon=True).start()


class _Member:
    """One member. Each word is said in a thread of its own, so that a new one, which may be to
    abort, does not wait until the call with the last one comes back.
    """

    def __init__(
        self, number: int, call: Call, mailbox: Mailbox, patience_s: Callable[[Step], float]
    ) -> None:
        self._number, self._call, self._mailbox = number, call, mailbox
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._word: Told | None = None
        self._saying = False
        self._stopped = False

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def tell(self, told: Told) -> None:
        with self._changed:
            if self._saying and told == self._word:
                return  # it is being said, again and again
            self._word, self._saying = told, True
            self._changed.notify_all()
        name = f"{told.step.value} to member {self._number}"
        threading.Thread(target=self._say, args=(told,), name=name, daemon=True).start()

    def _say(self, word: Told) -> None:
        """Say it until it is answered, or something else is to be said."""
        event = self._answer(word)
        with self._changed:
            if self._word != word:
                return
            self._saying = False
        if event is not None:
            self._mailbox.put(event)

    def _answer(self, word: Told) -> Event | None:
        patience_s = self._patience_s(word.step)
        patience = clock.Deadline.after(patience_s)
        while not self._over(word):
            try:
                said = self._call(word, _WAIT_S)
                patience = clock.Deadline.after(patience_s)
                if said is not None:
                    return Answered(self._number, said)
            except errors.CkptError as exc:
                if not exc.retryable or patience.expired:
                    return Lost(self._number, exc)
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped, _AGAIN_S)
        return None

    def _over(self, word: Told) -> bool:
        with self._changed:
            return self._stopped or self._word != word
