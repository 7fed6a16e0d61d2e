"""Epoch after epoch of the same trees, each for what was written since the one before.

Promises: an epoch that fails costs nothing but itself: the trees go on, and the next one begins
anew; what is kept in the agent between two epochs is dropped when it ends, by whatever; and the
kernel ends it if it stands still, since processes that move mappings wait for it. Where an epoch
takes longer than was to be between two, for a slow volume say, the time between two becomes longer:
at most half of it is epochs.
Does not: choose the trees, or remove old epochs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from agent import errors
from agent.engines.base import CaptureOptions, Kept
from agent.host import clock, deadman, proc
from agent.node import dump
from agent.node.dump import DumpOutcome, Member

# Of the time, where nobody says how often: what is copied beside the job takes from its caches and
# cores, and a tenth of that is less than a job varies by itself.
_BUSY = 0.1
# Below this there is hardly anything new, and each epoch costs files.
_SHORTEST_S = 1.0

Dump = Callable[[Sequence[Member], CaptureOptions, dump.Cancel], DumpOutcome]


@dataclasses.dataclass(frozen=True)
class Watched:
    """How it ended: ``epochs`` were committed, ``failures`` were not, the last of them
    ``last_failed``; ``ended``: the trees are no more.
    """

    epochs: int
    failures: int
    last_failed: errors.CkptError | None
    ended: bool


def pause_s(every_s: float | None, took_s: float) -> float:
    """How long to wait after an epoch that took ``took_s``; ``every_s`` is from the beginning of
    one to that of the next, None for as often as it does the trees no harm.
    """
    if every_s is None:
        return max(_SHORTEST_S, took_s * (1 - _BUSY) / _BUSY)
    return every_s - took_s if took_s <= every_s else took_s


def _pause(every_s: float | None, took_s: float, late: Callable[[float, float], None]) -> float:
    pause = pause_s(every_s, took_s)
    if every_s is not None and took_s > every_s:
        late(took_s, pause)
    return pause


class Stop(dump.Cancel):
    """Asks a watch to end: at once between two epochs, and one that is under way gives up."""

    def wait(self, span_s: float) -> bool:
        """Wait so long, or until asked; whether that was."""
        return self._event.wait(span_s)


def watch(
    dump_once: Dump,
    pids: Sequence[int],
    members: Callable[[], Sequence[Member]],
    options: CaptureOptions,
    stop: Stop,
    *,
    every_s: float | None = None,
    most: int | None = None,
    done: Callable[[DumpOutcome], None] = lambda outcome: None,
    failed: Callable[[errors.CkptError], None] = lambda exc: None,
    late: Callable[[float, float], None] = lambda took_s, pause_s: None,
) -> Watched:
    """Dump again and again until ``stop``, until one of the roots ``pids`` has ended or ``most``
    epochs were tried; ``members`` says before each what belongs to it, more trees maybe. ``late``
    is told of an epoch that took longer than ``every_s``, and of the pause after it.

    Raises:
        errors.CkptError: the first epoch failed.
    """
    known: Sequence[Member] = ()
    roots = [proc.identity(pid) for pid in pids]
    with deadman.armed(), Kept() as kept:

        def once() -> None:
            nonlocal known
            try:
                now = members()
                if now != known:
                    # A member's name would mean another tree.
                    kept.forget()
                known = now
                outcome = dump_once(now, dataclasses.replace(options, kept=kept), stop)
            except errors.CkptError:
                kept.forget()
                raise
            kept.committed(outcome.epoch.epoch)
            done(outcome)

        return repeated(
            once,
            lambda: not all(map(proc.alive, roots)),
            stop,
            every_s=every_s,
            most=most,
            failed=failed,
            late=late,
        )


def repeated(
    once: Callable[[], None],
    over: Callable[[], bool],
    stop: Stop,
    *,
    every_s: float | None,
    most: int | None,
    failed: Callable[[errors.CkptError], None],
    late: Callable[[float, float], None],
) -> Watched:
    """Make ``once`` an epoch again and again until ``stop``, until the job is ``over`` or ``most``
    were tried; the rest as ``watch``.

    Raises:
        errors.CkptError: the first epoch failed.
    """
    epochs = failures = 0
    last: errors.CkptError | None = None
    while True:
        began_s = clock.monotonic_s()
        try:
            once()
        except errors.Interrupted:
            return Watched(epochs, failures, last, ended=False)
        except errors.CkptError as exc:
            if not epochs:
                raise
            if over():
                return Watched(epochs, failures, last, ended=True)
            failures, last = failures + 1, exc
            failed(exc)
        else:
            epochs, last = epochs + 1, None
        pause = _pause(every_s, clock.monotonic_s() - began_s, late)
        if epochs + failures == most or stop.wait(pause):
            return Watched(epochs, failures, last, ended=False)
        if over():
            return Watched(epochs, failures, last, ended=True)
