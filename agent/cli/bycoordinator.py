"""What the verbs do with a group's pods where the cluster's coordinator does it: ask, and follow.

Promises: as ``incluster``; who stops asks the coordinator to give up, and who stops again leaves
an operation that goes on, by name; an operation that failed ends as if this program had done it.
Does not: decide anything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

from agent import errors
from agent.cli import arguments, exits, interrupts, operationdocuments, output, progress
from agent.cli.incluster import connected
from agent.cli.invocation import Invocation
from agent.cluster.operations import Operations
from agent.rpc.coordinatorclient import Coordinator, Operation, State, Target
from agent.settings import Settings


def target(found: arguments.Target, labels: str = "") -> Target:
    """What a command line named, as the coordinator is told; ``labels`` say which pods are meant
    by a group, and a pod means whoever is connected with it, too.
    """
    if found.kind == "pod":
        return Target(followed=found.name)
    if found.kind == "group":
        return Target(group=found.name, labels=labels)
    return Target(jobset=found.name)


def dump(
    invocation: Invocation, settings: Settings, target: Target, *, stop: bool, wait: bool
) -> None:
    """``dump`` of a JobSet or of what a selector means."""
    with _asked(settings) as (operations, _):
        asking = operations.asking(wait=wait, deadline_s=settings.dump_deadline_s)
        done = _done(
            invocation,
            operations,
            lambda replica: replica.create_epoch(asking, target, stop=stop),
        )
    document = operationdocuments.dump_report(done, target, stopped=stop)
    invocation.say(
        f"captured {output.human_bytes(document['rawBytes'])} of {len(document['members'])}"
        f" containers at one instant, stopped for {output.human_s(document['stopSeconds'])},"
        f" durable after {output.human_s(document['durableSeconds'])}; {document['connections']}"
        " connections between them fit together"
    )
    for each in document["leaving"]:
        invocation.say(
            f"pod {each['pod']} is connected to {each['remote']}, outside of the group (from"
            f" {each['local']})"
        )
    invocation.emit(document)


def restore(
    invocation: Invocation,
    settings: Settings,
    target: Target,
    epoch: str,
    *,
    storage: str,
    nodes: Sequence[str],
    replace: bool,
    wait: bool,
) -> None:
    """``restore`` of a JobSet."""
    with _asked(settings) as (operations, _):
        asking = operations.asking(wait=wait, deadline_s=settings.restore_deadline_s)
        done = _done(
            invocation,
            operations,
            lambda replica: replica.restore(
                asking, target, epoch=epoch, storage=storage, nodes=nodes, replace=replace
            ),
        )
    _said_back(invocation, done)


def migrate(
    invocation: Invocation, settings: Settings, name: str, nodes: Sequence[str], *, wait: bool
) -> None:
    """``migrate`` of a JobSet."""
    with _asked(settings) as (operations, _):
        deadline_s = settings.dump_deadline_s + settings.restore_deadline_s
        asking = operations.asking(wait=wait, deadline_s=deadline_s)
        done = _done(invocation, operations, lambda replica: replica.migrate(asking, name, nodes))
    _said_back(invocation, done)


def plan(invocation: Invocation, settings: Settings, target: Target) -> int:
    """``plan`` of a JobSet or of what a selector means."""
    with _asked(settings) as (operations, namespace):
        found = operations.ask(lambda replica: replica.plan(namespace, target))
    document = operationdocuments.plan(namespace, target, found)
    invocation.emit(document)
    return exits.DONE if document["feasible"] else exits.REFUSED


def list_all(invocation: Invocation, settings: Settings, group: str) -> None:
    """``operations list``."""
    with _asked(settings) as (operations, namespace):
        found = operations.ask(lambda replica: replica.operations(namespace, group))
    if not found:
        invocation.say(f"no operations in namespace {namespace}")
    invocation.emit(operationdocuments.operation_list(namespace, found))


def show(invocation: Invocation, settings: Settings, identifier: str) -> None:
    """``operations show``."""
    with _asked(settings) as (operations, namespace):
        found = operations.ask(lambda replica: replica.get(namespace, identifier))
    invocation.emit(operationdocuments.operation(found))


def cancel(invocation: Invocation, settings: Settings, identifier: str) -> None:
    """``operations cancel``."""
    with _asked(settings) as (operations, namespace):
        found = operations.ask(lambda replica: replica.cancel(namespace, identifier))
    invocation.emit(operationdocuments.operation(found))


def watch(invocation: Invocation, settings: Settings, identifier: str) -> None:
    """``operations watch``; whoever stops leaves the operation alone."""
    with _asked(settings) as (operations, namespace):
        found = operations.ask(lambda replica: replica.get(namespace, identifier))
        with progress.for_steps(invocation.quiet) as show_step:
            found = operations.follow(found, _shown(invocation, show_step), threading.Event())
    if found.error is not None:
        raise found.error
    invocation.emit(operationdocuments.operation(found))


@contextlib.contextmanager
def _asked(settings: Settings) -> Iterator[tuple[Operations, str]]:
    with connected(settings) as session, contextlib.ExitStack() as stack:
        yield Operations(session, stack), session.namespace


def _done(
    invocation: Invocation, operations: Operations, begin: Callable[[Coordinator], Operation]
) -> Operation:
    """Begin an operation and follow it to its success; its error is this program's."""
    asked = threading.Event()
    begun: Operation | None = None

    def stop_asked(number: int) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        invocation.say("asking the coordinator to give it up; again to leave it alone")

    try:
        with interrupts.caught(stop_asked), progress.for_steps(invocation.quiet) as show_step:
            begun = operations.ask(begin, asked)
            invocation.say(f"operation {begun.id}: {begun.state.value}")
            done = operations.follow(begun, _shown(invocation, show_step), asked)
    except KeyboardInterrupt:
        raise _left(begun) from None
    if done.error is not None:
        raise done.error
    if done.state is not State.SUCCEEDED:
        raise errors.AgentDefect(
            f"the coordinator did not say why operation {done.id} ended {done.state.value}",
            hint="its log says more",
        )
    return done


def _left(begun: Operation | None) -> errors.Interrupted:
    """What is said to who stops twice."""
    if begun is None:
        return errors.Interrupted(
            "interrupted before the coordinator answered",
            hint="ckpt-agent operations shows whether anything began",
        )
    return errors.Interrupted(
        f"operation {begun.id} goes on without this command",
        hint=f"ckpt-agent operations watch {begun.id} -n {begun.namespace}",
        operation=begun.id,
    )


def _shown(invocation: Invocation, show_step: Callable[[str], None]) -> Callable[[Operation], None]:
    """Tells of a step, and once of each replica that took the operation up."""
    takeovers = 0

    def show(now: Operation) -> None:
        nonlocal takeovers
        show_step(now.step or now.state.value)
        if now.takeovers > takeovers:
            takeovers = now.takeovers
            invocation.say(f"another replica of the coordinator went on with operation {now.id}")

    return show


def _said_back(invocation: Invocation, done: Operation) -> None:
    places = ", ".join(f"{each.identity} on {each.now.node}" for each in done.pods)
    invocation.say(f"{done.group} runs again: {places}")
    for each in done.pods:
        for peer in each.lost:
            invocation.say(f"{each.identity} lost its connection to {peer}")
    invocation.emit(operationdocuments.operation(done))
