"""What the verbs do with the pods that a label selector means: this program is the coordinator.

Promises: as ``incluster``.
Does not: decide anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from agent.cli import interrupts, jobsetdocuments, progress
from agent.cli.incluster import connected
from agent.cli.injobset import said_back, said_cut
from agent.cli.invocation import Invocation
from agent.coordinator import checkpoint, followed, selected
from agent.coordinator.machine import State
from agent.host import clock
from agent.model import podfollow
from agent.model.podfollow import Closure
from agent.settings import Settings


def dump(
    invocation: Invocation,
    settings: Settings,
    group: str,
    selector: str,
    *,
    engine: str,
    stop: bool,
) -> None:
    """``dump`` of the pods that ``selector`` means."""
    with (
        connected(settings) as session,
        _controlled(invocation, "stopping; the job goes on") as (control, show),
    ):
        done = selected.dump(
            session,
            group,
            selector,
            now_s=clock.wall_s(),
            stop=stop,
            control=control,
            watch=show,
            engine=engine,
        )
        of = {"group": group, "selector": selector}
        document = jobsetdocuments.dump_report(session.namespace, of, done, stopped=stop)
    said_cut(invocation, document, done, "the group")
    invocation.emit(document)


def dump_followed(invocation: Invocation, settings: Settings, pod: str, *, stop: bool) -> None:
    """``dump`` of a pod and of whoever is connected with it."""

    def found(closure: Closure) -> None:
        for name, because in closure.members.items():
            if because:
                invocation.say(f"also cuts pod {name}: {because}")
        for each in closure.leaving:
            invocation.say(f"leaves the cut: {each}")
        for each in closure.unasked:
            invocation.say(f"may leave the cut: {each}")

    with (
        connected(settings) as session,
        _controlled(invocation, "stopping; the job goes on") as (control, show),
    ):
        done = followed.dump(
            session,
            pod,
            now_s=clock.wall_s(),
            stop=stop,
            control=control,
            watch=show,
            found=found,
        )
        of = {"group": podfollow.group(pod), "followed": pod}
        document = jobsetdocuments.dump_report(session.namespace, of, done, stopped=stop)
    said_cut(invocation, document, done, "the group")
    invocation.emit(document)


def restore(
    invocation: Invocation,
    settings: Settings,
    group: str,
    epoch: str,
    *,
    storage: str,
    again: bool,
) -> None:
    """``restore`` of a group into its pods, which wait."""
    with (
        connected(settings) as session,
        _controlled(invocation, "stopping; the pods wait on") as (control, show),
    ):
        done = selected.restore(
            session,
            group,
            epoch,
            now_s=clock.wall_s(),
            storage=storage,
            again=again,
            control=control,
            watch=show,
        )
        document = jobsetdocuments.restore_report(session.namespace, {"group": group}, done)
    said_back(invocation, f"group {group}", done)
    invocation.emit(document)


@contextlib.contextmanager
def _controlled(
    invocation: Invocation, message: str
) -> Iterator[tuple[checkpoint.Control, Callable[[State], None]]]:
    """Someone looks on, and may ask to stop."""
    control = checkpoint.Control()

    def stop_asked(number: int) -> None:
        control.cancel()
        invocation.say(message)

    with interrupts.caught(stop_asked), progress.for_epoch(invocation.quiet) as show:
        yield control, show
