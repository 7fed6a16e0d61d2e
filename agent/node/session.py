"""One pod's part in an epoch of several pods: runs the participant, keeps its time, carries out
what it decides.

Promises: the participant hears of everything one after the other; a timer that ran out is acted on
also while a step is being carried out; each effect ends in exactly one event; when the participant
has closed, nothing of the session is left.
Does not: know what a step does; ``Actions`` does. Nor how a coordinator's words arrive.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import Protocol

from agent import errors
from agent.host import clock
from agent.model.protocol import Answer, Course, Decision, Said, Step, Times, Told
from agent.node import participant
from agent.node.participant import Participant, Phase, Timer

_log = logging.getLogger(__name__)

# Between two tries to learn from the store what became of the epoch: the job runs meanwhile.
_SETTLE_AGAIN_S = 5.0
# Long enough for a busy node to hear from its coordinator, which speaks twice a second; short
# against the patience of whatever talks to a job that stands still.
SILENCE_S = 5.0
# Nobody wants a job to stand still for longer, whoever may still be waiting for what.
STOPPED_S = 600.0


class Actions(Protocol):
    """What the steps do to a pod. All methods may take their time; ``let_go`` may be called while
    ``do`` is under way, and makes it give up.
    """

    def do(self, step: Step) -> bytes:
        """Carry out a step; what it gives is sent along with the answer.

        Raises:
            errors.CkptError: it could not be done; nothing of it stays but what ``let_go`` undoes.
        """

    def let_go(self, *, committed: bool) -> bool:
        """Let the processes run and their traffic flow. Never fails for good. Those of a restore
        run only if it is ``committed``, and are undone otherwise. Tell whether they run.
        """

    def settle(self) -> Decision:
        """Abandon the epoch unless it is committed, and say which it is.

        Raises:
            errors.VolumeError | errors.DataError: it cannot be told now.
        """

    def close(self, decision: Decision) -> None:
        """Keep or drop what was stored, and give back everything that was taken."""


class Session:
    """Takes part from ``start`` until the participant has closed. ``ended`` is then called."""

    def __init__(
        self,
        name: str,
        course: Course,
        actions: Actions,
        *,
        timers_s: Mapping[Timer, float] | None = None,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self._participant = Participant.begin(course)
        self._actions = actions
        self._timers_s = timers_s or {Timer.SILENCE: SILENCE_S, Timer.STOPPED: STOPPED_S}
        self._ended = ended
        self._events: queue.SimpleQueue[Callable[[], list[participant.Effect]]] = (
            queue.SimpleQueue()
        )
        self._due: dict[Timer, clock.Deadline] = {}
        self._said: dict[Step, Said] = {}
        self._failures: dict[Step, errors.CkptError] = {}
        self._parts: dict[Step, bytes] = {}
        self._spans_s: dict[Step, tuple[float, float]] = {}
        self._spoke = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"epoch {name}", daemon=True)

    def start(self) -> None:
        """Begin to listen. Whoever never says anything is not waited for longer than a timer."""
        self._due[Timer.SILENCE] = clock.Deadline.after(self._timers_s[Timer.SILENCE])
        self._thread.start()

    def tell(self, told: Told, wait_s: float) -> Said | None:
        """Hand a coordinator's words on; what the member says to them, None if nothing so far."""
        with self._spoke:
            self._said.pop(told.step, None)
            if not self._closed:
                self._events.put(lambda: self._participant.told(told))
                self._spoke.wait_for(lambda: told.step in self._said or self._closed, wait_s)
            if self._closed and told.step not in self._said:
                self._obey(self._participant.told(told))  # which only answers now
            return self._said.get(told.step)

    def leave(self) -> None:
        """Take part no longer: what can be given up is, and what may be committed is settled."""
        self._events.put(lambda: self._participant.expired(Timer.STOPPED))

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False if it has not come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._participant.phase is not Phase.CLOSED:
                self._obey(self._next())
        finally:
            self._ended()
            with self._spoke:
                self._closed = True
                self._spoke.notify_all()
            # A session answers on for long after its end; what it did needs memory.
            del self._actions
            for error in self._failures.values():
                _forget_frames(error)  # others may have raised it again

    def _next(self) -> list[participant.Effect]:
        """What the next event leads to."""
        due = min(self._due.items(), key=lambda each: each[1].at_s, default=None)
        try:
            return self._events.get(timeout=None if due is None else due[1].remaining_s)()
        except queue.Empty:
            timer = due[0] if due else Timer.SILENCE
            del self._due[timer]
            return self._participant.expired(timer)

    def _obey(self, effects: list[participant.Effect]) -> None:
        for effect in effects:
            match effect:
                case participant.Do(step):
                    self._beside(f"{step.value} {self.name}", lambda step=step: self._do(step))  # type: ignore[misc]
                case participant.LetGo(committed):
                    let_go = functools.partial(self._let_go, committed=committed)
                    self._beside(f"let go {self.name}", let_go)
                case participant.Settle():
                    self._beside(f"settle {self.name}", self._settle)
                case participant.Close(decision):
                    self._actions.close(decision)
                case participant.Arm(timer):
                    self._due[timer] = clock.Deadline.after(self._timers_s[timer])
                case participant.Disarm(timer):
                    self._due.pop(timer, None)
                case participant.Reply(answer):
                    self._say(answer)

    def _beside(self, name: str, work: Callable[[], None]) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()

    def _do(self, step: Step) -> None:
        began_s = clock.monotonic_s()
        try:
            part = self._actions.do(step)
            done_s = clock.monotonic_s()
        except errors.CkptError as exc:
            self._fail(step, exc)
        except Exception as exc:  # noqa: BLE001  a defect must not leave a job standing still
            _log.exception("defect in step %s", step.value)
            self._fail(
                step,
                errors.AgentDefect(
                    f"the agent met a {type(exc).__name__} that nobody meant to happen",
                    hint="this is a defect: its log says where; report it",
                ),
            )
        else:
            self._succeed(step, part, (began_s, done_s))

    def _succeed(self, step: Step, part: bytes, span_s: tuple[float, float]) -> None:
        def succeeded() -> list[participant.Effect]:
            self._parts[step], self._spans_s[step] = part, span_s
            return self._participant.did(step)

        self._events.put(succeeded)

    def _fail(self, step: Step, error: errors.CkptError) -> None:
        _forget_frames(error)

        def failed() -> list[participant.Effect]:
            self._failures.setdefault(step, error)
            return self._participant.could_not(step, error.message)

        self._events.put(failed)

    def _let_go(self, *, committed: bool) -> None:
        running = self._actions.let_go(committed=committed)
        self._events.put(lambda: self._participant.let_go(running=running))

    def _settle(self) -> None:
        actions = self._actions
        decision = self._decision(actions)
        while decision is None:
            pause = clock.Deadline.after(_SETTLE_AGAIN_S)
            if clock.wait_until(lambda: self._closed, pause):
                return
            decision = self._decision(actions)
        known = decision
        self._events.put(lambda: self._participant.settled(known))

    def _decision(self, actions: Actions) -> Decision | None:
        try:
            return actions.settle()
        except (errors.VolumeError, errors.DataError) as exc:
            _log.warning("cannot learn what became of epoch %s: %s", self.name, exc.message)
            return None

    def _say(self, answer: Answer) -> None:
        cause = next(iter(self._failures.values()), None) if answer.problem else None
        with self._spoke:
            part, span_s = self._parts.get(answer.step, b""), self._spans_s.get(answer.step)
            times = Times(0.0, 0.0, *span_s) if span_s else None
            self._said[answer.step] = Said(answer, cause, part, times)
            self._spoke.notify_all()


def _forget_frames(error: BaseException | None) -> None:
    """Where an error came from keeps all that was worked on there, memory of the job included."""
    while error is not None and error.__traceback__ is not None:
        error.__traceback__ = None
        if error.__cause__ is not error.__context__:
            _forget_frames(error.__cause__)
        error = error.__context__
