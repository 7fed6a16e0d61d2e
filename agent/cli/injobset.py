"""What the verbs do with the pods of a JobSet together: this program is the coordinator.

Promises: as ``incluster``.
Does not: decide anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from agent.cli import interrupts, jobsetdocuments, output, progress
from agent.cli.incluster import connected, said_hooks
from agent.cli.invocation import Invocation
from agent.coordinator import checkpoint, jobsetcourse, jobsetrestore, jobsets
from agent.host import clock
from agent.model.jobsetrestore import Step
from agent.settings import Settings

_STEPS = {
    Step.DUMP: "dumping; every pod goes on if anything fails",
    Step.SUSPEND: "suspending the JobSet; waiting until its pods are gone",
    Step.START: "resuming it; waiting until all of its pods wait for the image",
    Step.RESTORE: "restoring",
}


def dump(
    invocation: Invocation, settings: Settings, name: str, *, engine: str = "", stop: bool
) -> None:
    """``dump`` of a JobSet."""
    control = checkpoint.Control()

    def stop_asked(number: int) -> None:
        control.cancel()
        invocation.say("stopping; the job goes on")

    with (
        connected(settings) as session,
        interrupts.caught(stop_asked),
        progress.for_epoch(invocation.quiet) as show,
    ):
        done = jobsets.dump(
            session,
            name,
            now_s=clock.wall_s(),
            stop=stop,
            control=control,
            watch=show,
            engine=engine,
        )
        of = {"jobset": name}
        document = jobsetdocuments.dump_report(session.namespace, of, done, stopped=stop)
    said_cut(invocation, document, done, "the JobSet")
    invocation.emit(document)


def said_cut(
    invocation: Invocation, document: output.Document, done: checkpoint.Checkpoint, what: str
) -> None:
    """Tell of a cut that was committed, and who is connected with somebody outside of ``what``."""
    invocation.say(
        f"captured {output.human_bytes(document['rawBytes'])} of {len(done.members)} pods at one"
        f" instant, stopped for {output.human_s(document['stopSeconds'])}, durable after"
        f" {output.human_s(document['durableSeconds'])}; {done.connections} connections between"
        f" them fit together"
    )
    for pod_uid, local, remote in done.leaving:
        pod = next((each.pod for each in done.members if each.uid == pod_uid), pod_uid)
        invocation.say(f"pod {pod} is connected to {remote}, outside of {what} (from {local})")
    said_hooks(invocation, document)


def restore(
    invocation: Invocation,
    settings: Settings,
    name: str,
    epoch: str,
    *,
    storage: str,
    nodes: Sequence[str],
    replace: bool,
) -> None:
    """``restore`` of a JobSet."""
    with connected(settings) as session, _watched(invocation) as watch:
        done = jobsetrestore.bring_back(
            session,
            name,
            epoch=epoch,
            nodes=nodes,
            storage=storage,
            replace=replace,
            now_s=clock.wall_s(),
            watch=watch,
        )
        document = jobsetdocuments.restore_report(session.namespace, {"jobset": name}, done)
    said_back(invocation, f"JobSet {name}", done)
    invocation.emit(document)


def migrate(invocation: Invocation, settings: Settings, name: str, nodes: Sequence[str]) -> None:
    """``migrate`` of a JobSet."""
    with connected(settings) as session, _watched(invocation) as watch:
        done = jobsetrestore.migrate(session, name, nodes, now_s=clock.wall_s(), watch=watch)
        document = jobsetdocuments.move_report(session.namespace, name, done)
    said_back(invocation, f"JobSet {name}", done.returned)
    spans = (f"{step} {output.human_s(span_s)}" for step, span_s in done.returned.steps.items())
    invocation.say(f"it was away for {output.human_s(done.away_s)} ({', '.join(spans)})")
    invocation.emit(document)


def said_back(invocation: Invocation, what: str, done: jobsetcourse.Returned) -> None:
    """Tell where ``what`` runs again, and what it lost."""
    places = ", ".join(f"{each.identity} on {each.now.node}" for each in done.pods)
    invocation.say(f"{what} runs again: {places}")
    for each in done.pods:
        for peer in each.lost:
            invocation.say(f"{each.identity} lost its connection to {peer}")


@contextlib.contextmanager
def _watched(invocation: Invocation) -> Iterator[jobsetcourse.Watch]:
    """Someone looks on, and may ask to stop: at once while the job runs, only when asked twice
    while it stands still.
    """
    reached: list[Step] = []
    asked: list[int] = []

    def stop_asked(number: int) -> None:
        asked.append(number)
        if any(each != Step.DUMP for each in reached) and len(asked) == 1:
            invocation.say("the job stands still and its image is safe: going on; again to stop")
            return
        watch.stop()

    def step(now: Step) -> None:
        reached.append(now)
        invocation.say(_STEPS[now])

    def passed_over(image: str, why: str) -> None:
        invocation.say(f"image {image} cannot be restored, trying an older one: {why}")

    with interrupts.caught(stop_asked), progress.for_epoch(invocation.quiet) as show:
        watch = jobsetcourse.Watch(step=step, state=show, passed_over=passed_over)
        yield watch
