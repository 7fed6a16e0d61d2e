"""``ckpt-agent watch jobset/NAME``: one epoch of all its pods after the other.

Promises: each epoch is what ``dump jobset/NAME`` makes, by this program or the coordinator, and is
let in and counted as that; between two of them others may have the JobSet; old images are removed
with the caller's own rights.
Does not: keep anything in the agents between two epochs, as ``podwatch`` does.
"""

from __future__ import annotations

from agent import errors
from agent.cli import bycoordinator, exits, incluster, injobset, interrupts, podwatch
from agent.cli.invocation import Invocation
from agent.cli.watch import Times, said_late
from agent.kube import jobsets as kube
from agent.model import jobset
from agent.node.watch import Stop, repeated
from agent.rpc.coordinatorclient import Target
from agent.settings import Settings


def watch(invocation: Invocation, settings: Settings, name: str, times: Times) -> int:
    """Watch a JobSet until it ends, so many dumps were made or somebody asks to stop."""
    stop = Stop()

    def stop_asked(number: int) -> None:
        stop.set()
        invocation.say("stopping; the job goes on")

    def once() -> None:
        before = interrupts.heard()
        if settings.use_coordinator:
            target = Target(jobset=name)
            bycoordinator.dump(invocation, settings, target, stop=False, wait=False)
        else:
            injobset.dump(invocation, settings, name, stop=False)
        if interrupts.heard() != before:
            stop.set()  # it came too late to give that dump up
        if times.keep_last is not None:
            _prune(invocation, settings, name, times.keep_last)

    def failed(exc: errors.CkptError) -> None:
        invocation.say(f"a dump failed, the job goes on: {exc.message}")

    def late(took_s: float, pause_s: float) -> None:
        said_late(invocation, took_s, pause_s)

    with interrupts.caught(stop_asked):
        found = repeated(
            once,
            lambda: _over(settings, name),
            stop,
            every_s=times.every_s,
            most=times.count,
            failed=failed,
            late=late,
        )
    invocation.say(
        f"{'the JobSet has ended' if found.ended else 'the job goes on'}; images: {found.epochs},"
        f" failed dumps: {found.failures}"
    )
    if found.last_failed is not None:
        raise found.last_failed
    return exits.DONE


def _over(settings: Settings, name: str) -> bool:
    """Whether the JobSet is no more or has ended; not if that cannot be told now."""
    try:
        with incluster.connected(settings) as session:
            return bool(jobset.ends(kube.read(session.api, session.namespace, name)))
    except errors.NotFound:
        return True
    except errors.Unreachable:
        return False


def _prune(invocation: Invocation, settings: Settings, name: str, keep_last: int) -> None:
    with incluster.connected(settings) as session:
        podwatch.prune(invocation, session, settings, jobset.group(name), "", keep_last)
