"""The operations that the leader knows: recorded first, then told to whoever waits for them.

Promises: a change is seen by others when it is recorded, or, where it is only a step, soon
recorded; two calls with one idempotency key begin one operation; of a group's operations none is
begun while another is under way, unless it is to wait; what ended is kept for ``KEPT_S``, of all at
most ``ENDED`` records; more than ``WAITING`` that have not ended are refused, and of one namespace
more than ``EACH_WAITING``.
Does not: run operations, or outlive the leader.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from agent import errors
from agent.coordination.records import Deposed, Records
from agent.host import clock
from agent.model import operations
from agent.model.operations import Operation, State

KEPT_S = 86400.0
# A record is a few KiB, of a large group 100; they share the API server's database with everything
# else.
ENDED = 500
WAITING = 500
EACH_WAITING = 125
# A step takes milliseconds; whoever takes over reads only what is recorded at once.
_STEPS_S = 2.0
# A lease that cannot be renewed either is lost after ten seconds.
_PATIENCE_S = 10.0
_PAUSE_S = 0.5
T = TypeVar("T")


@dataclasses.dataclass
class _Entry:
    """``lock`` is held while it is written; ``recorded`` is what the record says."""

    operation: Operation
    recorded: Operation
    written_s: float
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


class Book:
    """The operations while this replica leads."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._changed = threading.Condition()
        self._beginning = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._closed = False
        self.deposed = threading.Event()

    def load(self) -> list[Operation]:
        """Take over what is recorded; those that had not ended, each of which is recorded as this
        replica's. Waits a while for an API server that does not answer: somebody has to lead.
        Raises what ``Records`` does.
        """
        patience = clock.Deadline.after(_PATIENCE_S)
        found = _patiently(self._records.load, patience)
        now_s = clock.monotonic_s()
        with self._changed:
            self._entries = {each.id: _Entry(each, each, now_s) for each in found}
        return [self._taken_over(each, patience) for each in found if not each.over]

    def _taken_over(self, found: Operation, patience: clock.Deadline) -> Operation:
        more = found.state is State.RUNNING
        return _patiently(lambda: self.change(found.id, takeovers=found.takeovers + more), patience)

    def begin(self, wanted: Operation, *, wait: bool) -> Operation:
        """Record a new operation, or return the one that its idempotency key began before.

        Raises:
            errors.InvalidInput: that was asked something else.
            errors.TargetBusy: another is under way with this group, and it shall not ``wait``.
            errors.Overloaded: too many wait already.
        """
        with self._beginning:
            if known := self._find(wanted.id):
                operations.same_request(known, wanted)
                return known
            every = self.all()
            other = operations.in_the_way(every, wanted.namespace, wanted.group)
            if other is not None and not wait:
                raise errors.TargetBusy(
                    f"operation {other.id} ({other.kind.value}, {other.step or other.state.value})"
                    f" is under way with {wanted.namespace}/{wanted.group}",
                    hint="wait for its end, cancel it, or ask to wait for your turn"
                    " (WHEN_BUSY_WAIT)",
                    operation=other.id,
                )
            _check_room(every, wanted.namespace)
            recorded = self._record(lambda: self._records.create(wanted))
            with self._changed:
                self._entries[wanted.id] = _Entry(recorded, recorded, clock.monotonic_s())
                self._changed.notify_all()
            if recorded is not wanted:
                # Its caller, or another replica's, never heard that it was recorded.
                operations.same_request(recorded, wanted)
                return self.change(wanted.id)
            return wanted

    def get(self, namespace: str, which: str) -> Operation:
        """One operation. Raises ``errors.NotFound``."""
        found = self._find(which)
        if found is None or found.namespace != namespace:
            raise errors.NotFound(
                f"there is no operation {which} in namespace {namespace}",
                hint="they are kept for a day after their end",
            )
        return found

    def all(self) -> list[Operation]:
        """Every operation."""
        with self._changed:
            return [each.operation for each in self._entries.values()]

    def change(
        self, which: str, check: Callable[[Operation], None] = lambda found: None, **changes: Any
    ) -> Operation:
        """Record a change, then tell it. ``check`` may raise; nothing changes before the change.

        Raises:
            Deposed: another replica has the operation now.
            errors.CkptError: it is not recorded, and nothing has changed.
        """
        entry = self._entry(which)
        with entry.lock:
            with self._changed:
                check(entry.operation)
                wanted = entry.operation.changed(**changes)
            self._record(lambda: self._records.write(wanted))
            with self._changed:
                now = entry.operation
                told = wanted
                if now.revision >= wanted.revision:  # a step was told meanwhile
                    told = dataclasses.replace(wanted, revision=now.revision + 1)
                    if "step" not in changes:
                        told = dataclasses.replace(told, step=now.step)
                entry.operation, entry.written_s = told, clock.monotonic_s()
                if told.step == wanted.step:
                    entry.recorded = told
                self._changed.notify_all()
            return told

    @contextlib.contextmanager
    def held(self, which: str) -> Iterator[Operation]:
        """The operation, which does not change until the context is left but for its step."""
        entry = self._entry(which)
        with entry.lock:
            yield entry.operation

    def step(self, which: str, step: str) -> None:
        """Tell a step, which is recorded soon. Never waits for the API server."""
        entry = self._entry(which)
        with self._changed:
            if entry.operation.step == step or entry.operation.over:
                return
            entry.operation = entry.operation.changed(step=step)
            self._changed.notify_all()

    def record_steps(self) -> None:
        """Record the steps that were told some time ago. Raises as ``change``."""
        with self._changed:
            stale = [
                each.operation.id
                for each in self._entries.values()
                if each.operation is not each.recorded
                and clock.monotonic_s() - each.written_s >= _STEPS_S
            ]
        for each in stale:
            self.change(each)

    def forget_old(self, now_s: float) -> None:
        """Remove what ended long ago, as far as that can be done now; ``now_s`` is wall time."""
        removed = self._records.remove(operations.removable(self.all(), now_s, KEPT_S, ENDED))
        with self._changed:
            for each in removed:
                del self._entries[each]

    def watch(self, namespace: str, which: str, span_s: float = 1.0) -> Iterator[Operation | None]:
        """The operation as it is, then whenever it has changed, until it has ended; None each
        ``span_s`` in which nothing has. Ends early when the book is closed.
        """
        seen = self.get(namespace, which)
        yield seen
        while not seen.over:
            with self._changed:
                entry = self._entries.get(which)
                if self._closed or entry is None:
                    return
                self._changed.wait_for(
                    lambda: self._closed or entry.operation.revision > seen.revision,  # noqa: B023
                    span_s,
                )
                now = entry.operation
            if now.revision == seen.revision:
                yield None
            else:
                seen = now
                yield seen

    def await_change(self, span_s: float) -> None:
        """Return when any operation has changed, or after ``span_s``."""
        with self._changed:
            if not self._closed:
                self._changed.wait(span_s)

    def close(self) -> None:
        """Let whoever waits go."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _find(self, which: str) -> Operation | None:
        with self._changed:
            entry = self._entries.get(which)
            return entry.operation if entry else None

    def _entry(self, which: str) -> _Entry:
        with self._changed:
            return self._entries[which]

    def _record(self, write: Callable[[], T]) -> T:
        if self.deposed.is_set():
            raise Deposed("this replica leads no more", hint="ask again")
        try:
            return write()
        except Deposed:
            self.deposed.set()
            raise


def _patiently(act: Callable[[], T], patience: clock.Deadline) -> T:
    while True:
        try:
            return act()
        except errors.Unreachable as exc:
            if isinstance(exc, Deposed) or patience.expired:
                raise
        clock.wait_until(lambda: False, patience.sooner(_PAUSE_S), every_s=_PAUSE_S)


def _check_room(every: list[Operation], namespace: str) -> None:
    """Raise ``errors.Overloaded`` if one more would be too many."""
    waiting = [each.namespace for each in every if not each.over]
    for count, most, where in (
        (len(waiting), WAITING, ""),
        (waiting.count(namespace), EACH_WAITING, f" in namespace {namespace}"),
    ):
        if count >= most:
            raise errors.Overloaded(
                f"{count} operations{where} have not ended yet", hint="try again when some have"
            )
