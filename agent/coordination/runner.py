"""Which operations run: each in a thread of its own, a limited number, one of a group at a time.

Promises: an operation that can be given up is, when its caller asks or its time is over; one that
cannot goes to its end; how it ended is recorded, tried until this replica leads no more; told to
end, it gives up what it can and leaves all of it to the next leader.
Does not: do operations; ``work`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence

from agent import errors
from agent.coordination import messages
from agent.coordination.book import Book
from agent.coordination.records import Deposed
from agent.coordination.work import Handle
from agent.host import clock
from agent.model import operations
from agent.model.operations import Operation, State

_log = logging.getLogger(__name__)

Do = Callable[[Operation, Handle], None]
"""Do an operation to its end."""

# Between two tries to record how an operation ended.
_AGAIN_S = 1.0
# An API server that is started anew answers after some seconds; nobody leads without it for longer.
_AWAY_S = 5.0


@dataclasses.dataclass
class _Running:
    handle: Handle
    thread: threading.Thread


class Runner:
    """Runs operations of ``book``, at most ``limit`` at once."""

    def __init__(self, book: Book, begin: Do, go_on: Do, limit: int) -> None:
        """``begin`` does an operation from its beginning, ``go_on`` one that another replica had
        begun.
        """
        self._book, self._begin, self._go_on = book, begin, go_on
        self._limit = limit
        self._lock = threading.Lock()
        self._running: dict[str, _Running] = {}
        self._closing = threading.Event()

    def take_over(self, left: Sequence[Operation]) -> None:
        """Go on with what another replica had begun."""
        for each in left:
            if each.state is State.RUNNING:
                self._start(each, self._go_on)

    def tick(self) -> None:
        """Begin what is next, and give up what took too long. Raises what ``Book`` does."""
        now_s = clock.wall_s()
        for each in self._book.all():
            if each.deadline_s and now_s >= each.deadline_s:
                self._expire(each)
        for each in operations.runnable(self._book.all(), self._limit):
            if self._closing.is_set():
                return
            try:
                begun = self._book.change(
                    each.id,
                    _queued,
                    state=State.RUNNING,
                    tries=each.tries + 1,
                    ordered_s=operations.ordered(each, now_s),
                )
            except errors.Interrupted:
                continue  # cancelled in this moment
            except errors.Unreachable:
                raise
            except errors.CkptError as exc:
                # The others have their turn.
                _log.warning("operation %s is not begun: %s", each.id, exc.message)
                continue
            self._start(begun, self._begin)

    def cancel(self, namespace: str, which: str) -> Operation:
        """Ask an operation to give up; it as it then is. Raises what ``Book`` does."""
        found = self._book.get(namespace, which)
        if found.over:
            return found
        if found.state is State.QUEUED:
            error = errors.Interrupted("it was cancelled before its turn came")
            try:
                return self._ended(which, State.CANCELLED, error, _queued)
            except errors.Interrupted:
                pass  # its turn came in this moment
        found = self._book.change(which, _not_over, cancelling=True)
        self._give_up(which)
        return found

    def close(self, deadline: clock.Deadline) -> None:
        """Begin nothing more, give up what can be, and wait for the rest."""
        self._closing.set()
        with self._lock:
            running = dict(self._running)
        for which, each in running.items():
            each.handle.leaving.set()
            self._give_up(which)
        for each in running.values():
            each.thread.join(deadline.remaining_s)

    def _expire(self, operation: Operation) -> None:
        if operation.state is State.QUEUED:
            error = errors.DeadlineExceeded("its turn did not come in time", hint="ask again")
            try:
                self._ended(operation.id, State.FAILED, error, _queued)
            except errors.Interrupted:
                return
        elif operation.cancellable and not operation.cancelling:
            with self._lock:
                running = self._running.get(operation.id)
            if running is not None:
                running.handle.late.set()
                self._book.change(operation.id, _not_over, cancelling=True)
                self._give_up(operation.id)

    def _give_up(self, which: str) -> None:
        with self._lock:
            running = self._running.get(which)
        with self._book.held(which) as found:
            if running is not None and found.cancellable:
                running.handle.give_up()

    def _start(self, operation: Operation, do: Do) -> None:
        handle = Handle()
        thread = threading.Thread(
            target=self._run,
            args=(operation, handle, do),
            name=f"operation {operation.id}",
            daemon=True,
        )
        with self._lock:
            self._running[operation.id] = _Running(handle, thread)
        thread.start()

    def _run(self, operation: Operation, handle: Handle, do: Do) -> None:
        facts = {"operation": operation.id, "kind": operation.kind.value}
        facts |= {"group": f"{operation.namespace}/{operation.group}"}
        facts |= {"caller": operation.caller.user}
        _log.info("operation begins", extra={"facts": facts})
        try:
            self._do(operation, handle, do)
        except Deposed as exc:
            _log.warning("operation is another replica's now: %s", exc, extra={"facts": facts})
        except errors.CkptError as exc:
            self._failed(operation, handle, exc)
        except Exception as exc:  # noqa: BLE001  a defect is told, and ends nothing else
            _log.exception("defect in operation %s", operation.id)
            found = errors.AgentDefect(
                f"the coordinator met a {type(exc).__name__} that nobody meant to happen",
                hint="this is a defect: its log says where; report it",
            )
            self._failed(operation, handle, found)
        finally:
            with self._lock:
                self._running.pop(operation.id, None)
            self._note_end(operation, facts)

    def _do(self, operation: Operation, handle: Handle, do: Do) -> None:
        """Do it; gone on with once, as after a takeover, where the job stands still only because
        somebody could not be reached for a moment.
        """
        try:
            do(operation, handle)
        except errors.MoveIncomplete as exc:
            if not isinstance(exc.__cause__, errors.Unreachable) or self._book.deposed.is_set():
                raise
            _log.warning("operation %s is gone on with: %s", operation.id, exc.message)
            if self._closing.wait(_AWAY_S):
                raise
            self._go_on(self._book.get(operation.namespace, operation.id), handle)

    def _note_end(self, operation: Operation, facts: dict[str, str]) -> None:
        found = operation
        with contextlib.suppress(errors.NotFound):  # it ended, and was forgotten since
            found = self._book.get(operation.namespace, operation.id)
        facts |= {"state": found.state.value, "stage": found.stage.value}
        if found.error is not None:
            facts |= {"error": str(found.error.get("message", ""))}
        _log.info("operation ends" if found.over else "operation is left", extra={"facts": facts})

    def _failed(self, operation: Operation, handle: Handle, exc: errors.CkptError) -> None:
        state = State.FAILED
        if isinstance(exc, errors.Interrupted):
            if handle.leaving.is_set():
                return  # the next leader begins it anew
            if handle.late.is_set():
                exc = errors.DeadlineExceeded(
                    "the operation did not end in time; the job goes on", hint="allow more time"
                )
            elif self._book.get(operation.namespace, operation.id).cancelling:
                state = State.CANCELLED
        while not self._closing.is_set():
            try:
                self._ended(operation.id, state, exc)
            except Deposed:
                return
            except errors.CkptError as problem:
                _log.warning("cannot record the end of %s: %s", operation.id, problem.message)
                self._closing.wait(_AGAIN_S)
            else:
                return

    def _ended(
        self,
        which: str,
        state: State,
        exc: errors.CkptError,
        check: Callable[[Operation], None] = lambda found: None,
    ) -> Operation:
        error = messages.error(exc)
        return self._book.change(which, check, state=state, ended_s=clock.wall_s(), error=error)


def _queued(found: Operation) -> None:
    if found.state is not State.QUEUED:
        raise errors.Interrupted("it waits no longer")


def _not_over(found: Operation) -> None:
    if found.over:
        raise errors.Conflict("the operation has just ended", hint="look at it again")
