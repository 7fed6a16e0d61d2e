"""A replica of the coordinator from its start to its end: it waits for the lease, then leads.

Promises: it answers, and changes anything, only while it holds the lease; a replica whose lease
could not be renewed in time, or whose operations another one took, ends at once, and whoever starts
it anew finds it waiting; told to end, it gives up what can be given up, lets the rest end within
its grace, and lets the lease go last.
Does not: end on an error of the API server while its lease lasts.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from agent import errors
from agent.coordination.records import Deposed
from agent.coordination.service import Lead
from agent.host import clock
from agent.kube.leases import Lease
from agent.model.operations import Operation

_log = logging.getLogger(__name__)

LEASE_NAME = "ckpt-agent-coordinator"
# Kubernetes' own controllers wait as long for a leader that is gone, and renew as often. A leader
# stops after two thirds, before anybody else may begin.
LEASE_S = 15.0
_PERIOD_S = 2.0
_STOPS_S = 10.0
# How soon an operation is begun whose turn has come; a change is heard at once.
_TICK_S = 0.5
_LOOK_S = 0.25
_RECORD_S = 1.0
_TIDY_S = 300.0


class Server(Protocol):
    """The gRPC server (agent.rpc.server)."""

    def start(self) -> None:
        """Take calls."""

    def set_serving(self, *, serving: bool) -> None:
        """What health answers."""

    def stop(self, grace_s: float) -> None:
        """End."""


class Probes(Protocol):
    """Answers to the kubelet (agent.host.probes)."""

    def start(self) -> None:
        """Answer."""

    def close(self) -> None:
        """Answer no more."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a replica is made of: ``take_lead`` reads what is recorded and returns what it leads
    with and what is left to go on with; ``refresh`` is done from time to time.
    """

    server: Server
    probes: Probes
    lease: Lease
    take_lead: Callable[[], tuple[Lead, list[Operation]]]
    refresh: Callable[[], None]
    grace_s: float
    period_s: float = _PERIOD_S
    stops_s: float = _STOPS_S


class Replica:
    """One replica. ``lead`` is what it has while it leads."""

    def __init__(self) -> None:
        self.lead: Lead | None = None
        self.healthy = False
        self._keeping: _Keeping | None = None

    def check(self) -> None:
        """Return if nobody else can lead yet: what goes on after it was stopped for long asks this
        before it changes anything, and its threads go on before it has seen that it is to end.

        Raises:
            Deposed: another replica may lead by now, or soon.
        """
        if self._keeping is None or not self._keeping.sure:
            raise Deposed("this replica leads no more", hint="ask again")

    def run(self, parts: Parts, stop: threading.Event) -> None:
        """Serve until ``stop`` is set.

        Raises:
            errors.Unreachable: it leads no more, and another replica does.
        """
        parts.server.start()
        parts.probes.start()
        self._keeping = keeping = _Keeping(parts, stop)
        keeping.start()
        try:
            while not keeping.held.wait(_TICK_S):
                self.healthy = keeping.reached
                if stop.is_set():
                    return
            self._leads(parts, keeping, stop)
        finally:
            self.lead = None
            keeping.end()
            parts.server.stop(1.0)
            parts.probes.close()

    def _leads(self, parts: Parts, keeping: _Keeping, stop: threading.Event) -> None:
        lead, left = parts.take_lead()
        _log.info("leading", extra={"facts": {"left": len(left)}})
        self.lead, self.healthy = lead, True
        parts.server.set_serving(serving=True)
        lead.runner.take_over(left)
        over, broken = threading.Event(), threading.Event()

        def run(act: Callable[[Lead, Parts, threading.Event], None]) -> None:
            try:
                act(lead, parts, over)
            except Exception:  # noqa: BLE001  a defect is told, and another replica leads
                _log.exception("defect while leading")
                broken.set()

        # Each in a thread of its own: they wait for the API server, the lease does not.
        for name, act in (("turns", _take_turns), ("records", _keep_book)):
            threading.Thread(target=run, args=(act,), name=name, daemon=True).start()
        try:
            while not stop.wait(_LOOK_S):
                if keeping.lapsed or lead.book.deposed.is_set():
                    lead.book.deposed.set()
                    raise errors.Unreachable(
                        "the lease could not be renewed in time, or another replica took it",
                        hint="is the API server slow? This replica is started anew by its kubelet",
                    )
                if broken.is_set():
                    raise errors.AgentDefect(
                        "the coordinator met something that nobody meant to happen, and lets"
                        " another replica lead",
                        hint="this is a defect: its log says where; report it",
                    )
        finally:
            parts.server.set_serving(serving=False)
            self.lead = None
            over.set()
            if not lead.book.deposed.is_set():
                lead.runner.close(clock.Deadline.after(parts.grace_s))
            lead.book.close()


class _Keeping:
    """Takes and renews the lease, in a thread of its own: nothing else may hold that up."""

    def __init__(self, parts: Parts, stop: threading.Event) -> None:
        self._parts, self._stop = parts, stop
        self.held, self._lost = threading.Event(), threading.Event()
        self.reached = False
        self._until = clock.Deadline.after(0.0)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def lapsed(self) -> bool:
        """Whether the lease was held, and may be another's by now or soon."""
        return self.held.is_set() and (self._lost.is_set() or self._until.expired)

    @property
    def sure(self) -> bool:
        """Whether the lease is held and cannot be another's yet."""
        return self.held.is_set() and not self._ending.is_set() and not self.lapsed

    def end(self) -> None:
        """Let the lease go, unless it has lapsed."""
        self._ending.set()
        if self.lapsed:
            return
        self._thread.join(self._parts.stops_s)
        try:
            if self.held.is_set():
                self._parts.lease.release()
        except errors.CkptError as exc:
            _log.info("the lease runs out by itself: %s", exc.message)

    def _run(self) -> None:
        while not self._ending.is_set():
            # From before the request: the lease may have been renewed any time after.
            asked = clock.Deadline.after(self._parts.stops_s)
            try:
                holds = self._parts.lease.hold()
                self.reached = True
            except errors.CkptError as exc:
                _log.warning("the lease cannot be looked at: %s", exc.message)
                self.reached, holds = False, None
            if holds:
                self._until = asked
                self.held.set()
            elif self.held.is_set() and holds is False:
                self._lost.set()
                return
            self._ending.wait(self._parts.period_s)


def _take_turns(lead: Lead, parts: Parts, over: threading.Event) -> None:
    """Begin what is next."""
    while not over.is_set():
        try:
            parts.refresh()
            lead.runner.tick()
        except errors.CkptError as exc:
            _log.warning("cannot begin what is next: %s", exc.message)
            over.wait(_LOOK_S)
        lead.book.await_change(_TICK_S)


def _keep_book(lead: Lead, parts: Parts, over: threading.Event) -> None:
    """Record steps, and forget what is old."""
    tidy = clock.Deadline.after(0.0)
    while not over.wait(_RECORD_S):
        try:
            lead.book.record_steps()
            if tidy.expired:
                tidy = clock.Deadline.after(_TIDY_S)
                lead.book.forget_old(clock.wall_s())
        except errors.CkptError as exc:
            _log.warning("cannot record now: %s", exc.message)
