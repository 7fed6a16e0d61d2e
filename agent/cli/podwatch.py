"""``ckpt-agent watch pod/NAME``: the pod's agent makes one epoch after the other.

Promises: as ``incluster``; old images are removed with the caller's own rights, by the pod's name.
Does not: decide anything.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from agent import errors
from agent.cli import exits, incluster, interrupts, poddocuments
from agent.cli.invocation import Invocation
from agent.cli.watch import Times, said_epoch, said_late
from agent.cluster import pods
from agent.cluster.session import Session
from agent.rpc import results
from agent.settings import Settings


def watch(
    invocation: Invocation,
    settings: Settings,
    pod: str,
    containers: Sequence[str],
    times: Times,
) -> int:
    """Watch a pod until it ends, so many dumps were made or somebody asks to stop."""
    cancel = threading.Event()
    made: list[results.DumpOutcome] = []

    def stop_asked(number: int) -> None:
        cancel.set()
        invocation.say("stopping; the pod goes on")

    def done(outcome: results.DumpOutcome) -> None:
        made.append(outcome)
        document = poddocuments.dump_report(session.namespace, pod, outcome)
        said_epoch(invocation, document)
        incluster.said_hooks(invocation, document)
        invocation.emit(document)
        if times.keep_last is not None:
            prune(invocation, session, settings, pod, outcome.image.storage, times.keep_last)

    def failed(exc: errors.CkptError) -> None:
        invocation.say(f"a dump failed, the pod goes on: {exc.message}")

    def late(took_s: float, pause_s: float) -> None:
        said_late(invocation, took_s, pause_s)

    with incluster.connected(settings) as session, interrupts.caught(stop_asked):
        try:
            found = pods.watch(
                session,
                pod,
                containers=containers,
                every_s=times.every_s,
                count=times.count,
                cancel=cancel,
                done=done,
                failed=failed,
                late=late,
            )
        except errors.Interrupted:
            if not cancel.is_set():
                raise
            invocation.say(f"the pod goes on; images: {len(made)}")
            return exits.DONE
    invocation.say(
        f"{'the containers have ended' if found.ended else 'the pod goes on'}; images:"
        f" {found.epochs}, failed dumps: {found.failures}"
    )
    if found.last_failed is not None:
        raise found.last_failed
    return exits.DONE


def prune(
    invocation: Invocation,
    session: Session,
    settings: Settings,
    group: str,
    storage: str,
    keep_last: int,
) -> None:
    """Remove older images of a group; what stands in the way is told, and left for the next time.
    ``storage`` "" means all.
    """
    try:
        session.any_agent(
            lambda agent: agent.prune(
                session.namespace,
                group=group,
                keep_last=keep_last,
                keep_within_s=settings.keep_within_s,
                dry_run=False,
                storage=storage,
            )
        )
    except errors.CkptError as exc:
        invocation.say(f"old images stay for now: {exc.message}")
