"""A container that its runtime stopped for a checkpoint and never let go on.

containerd pauses a container while it writes and packs the checkpoint, and only that containerd
knows why. If it ends meanwhile, by a crash or an ordinary restart, the container's shim still has
it down as paused. Its successor asks the shim as it starts, some tenths of a second later, cannot
make sense of that, and the kubelet then kills the container and starts it from the beginning. So
when a call has failed, the shim is asked at once to let the container go on.

Two things make that more than one word. When containerd ends, its shim kills the runc that it had
begun to checkpoint with, but not CRIU below it, which works on until it notices at its end that
nobody listens: seconds, for a container with much memory. Meanwhile the container's freezer is
open, since CRIU holds the processes by ptrace, so that runc finds nothing paused and refuses to let
it go on, and the shim still has it down as paused. Hence the freezer is closed for the instant of
the question. And such a CRIU leaves the freezer as it had found it: closed. Hence it is waited for.

Sources: containerd's client/task.go (Checkpoint), internal/cri/server/restart.go (loadContainer),
cmd/containerd-shim-runc-v2/process/init_state.go; ttrpc's server.go (a connection's end cancels
what was asked on it); CRIU's criu/seize.c (freeze_processes, freezer_restore_state).

Promises: a container that ran before the call does not stand still after one that failed, or that
is logged; one that stood still stays so.
Does not: raise; the call's own error is what is to be told. Nor end CRIU, whose code is in the
processes as long as it works; they stand still until it is through, as they would have.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from agent import errors
from agent.engines.kubelet import pause
from agent.engines.kubelet.shim import Shim
from agent.host import clock, proc
from agent.model.container import Container

log = logging.getLogger(__name__)

# A pause that was on its way when the runtime ended comes within this time.
_QUIET_S = 0.5
# A checkpoint that nobody waits for any more is still written to its end.
_GIVE_UP_S = 60.0
_ABANDONED_S = 600.0
# For a shim to see that its containerd is gone, and to have ended runc.
_NOTICE_S = 0.3
# For a shim to run runc, on a busy node. The processes are doubly held meanwhile.
_RESUME_S = 10.0
_LOOK_S = 0.01


@contextlib.contextmanager
def guarded(container: Container) -> Iterator[None]:
    """Around a call that has the runtime checkpoint ``container``: if it fails, the container
    runs.
    """
    freezer = pause.Freezer(container.pid)
    before = freezer.frozen()
    try:
        yield
    except BaseException:
        if not before:
            _LetGo(container, freezer).run()
        raise


class _LetGo:
    """Lets one container go on."""

    def __init__(self, container: Container, freezer: pause.Freezer) -> None:
        self._container = container
        self._freezer = freezer
        self._shim = Shim.of(container.pid)
        self._facts = {"container": container.id, "pid": container.pid}
        # Whether the runtime has it down as running again.
        self._told = self._shim is None
        self._longest = clock.Deadline.after(_ABANDONED_S)

    def run(self) -> None:
        """Return when the container has run for ``_QUIET_S``."""
        deadline = clock.Deadline.after(_GIVE_UP_S)
        stood = False
        while True:
            # A shim that has just lost its containerd has not ended its runc yet.
            clock.wait_until(self._nobody_waits, deadline.sooner(_NOTICE_S), every_s=_LOOK_S)
            abandoned = self._abandoned()
            stood = stood or abandoned or self._freezer.frozen()
            answered = self._told or self._tell(deadline, hold=abandoned)
            if self._freezer.frozen() and (answered or deadline.expired):
                self._freezer.thaw()
            if abandoned:
                deadline = self._longest
                self._wait_for_criu()
            elif self._runs():
                if stood:
                    log.warning(
                        "the runtime had left a container paused; it goes on",
                        extra={"facts": self._facts},
                    )
                return
            if deadline.expired:
                log.error(
                    "a container stays paused after a checkpoint that failed",
                    extra={"facts": self._facts},
                )
                return

    def _tell(self, deadline: clock.Deadline, *, hold: bool) -> bool:
        """Have the shim take it for running; whether it answered. One whose CRIU was abandoned is
        held for the question: what is not paused cannot go on.
        """
        if self._shim is None:
            return True
        if not hold:
            # One that is still at the checkpoint answers when that has ended: until then its
            # processes may run, and be stopped again at the end.
            answer = self._shim.resume(self._container.id, deadline, lambda: None)
        else:
            try:
                answer = self._shim.resume(
                    self._container.id, deadline.sooner(_RESUME_S), self._freezer.freeze
                )
            finally:
                self._freezer.thaw()
        self._told = answer is True
        return answer is not None

    def _wait_for_criu(self) -> None:
        """Until one that was abandoned is through, or it is time to ask the shim again."""
        until = self._longest if self._told else self._longest.sooner(_QUIET_S)
        # Never at once: what cannot be opened must not be tried without a pause.
        clock.wait_until(lambda: False, until.sooner(_LOOK_S))
        clock.wait_until(
            lambda: self._freezer.frozen() or not self._abandoned(), until, every_s=_LOOK_S
        )

    def _runs(self) -> bool:
        """Whether it runs for a while from now."""
        return not clock.wait_until(
            lambda: self._freezer.frozen() or self._abandoned(),
            clock.Deadline.after(_QUIET_S),
            every_s=_LOOK_S,
        )

    def _nobody_waits(self) -> bool:
        """Whether no CRIU works on the container that somebody else waits for."""
        return not self._tracer() or self._abandoned()

    def _abandoned(self) -> bool:
        """Whether a CRIU works on the container whose runc is gone: it has become the shim's own
        child, or the first process's where there is no shim that takes it.
        """
        with contextlib.suppress(errors.NotFound):
            heirs = {1} if self._shim is None else {1, self._shim.pid}
            tracer = self._tracer()
            if tracer and proc.stat(tracer).ppid in heirs:
                return True
            # It may not hold the processes yet, or not any more.
            if self._shim is not None:
                return any(proc.stat(each).comm == "criu" for each in proc.children(self._shim.pid))
        return False

    def _tracer(self) -> int:
        try:
            return proc.status(self._container.pid).tracer_pid
        except errors.NotFound:
            return 0
