"""``ckpt-agent restore``: bring an image's processes back."""

from __future__ import annotations

import contextlib
import os

import click

from agent import errors, wiring
from agent.cli import arguments, documents, exits, interrupts, output, progress
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.engines.base import FilePolicy, Fills, RestoreOptions
from agent.model import jobset, podfollow
from agent.node.restore import Progress, RestoreOutcome
from agent.settings import Settings

# Less memory than this takes no longer to come before the processes run.
_LATE_FROM_BYTES = 64 << 20
# What a new file for a tree's output may be read by: its owner, as a log with unknown content.
_OUTPUT_MODE = 0o600


@click.command(
    "restore",
    cls=Verb,
    short_help="Bring an image's processes back.",
    status=(
        exits.REFUSED,
        exits.FAILED,
        exits.DATA,
        exits.VOLUME,
        exits.ENVIRONMENT,
        exits.MOVE_INCOMPLETE,
        exits.INTERRUPTED,
        exits.PIPE_CLOSED,
    ),
    example="ckpt-agent restore training --isolate --wait --stdout run7.log",
)
@click.argument("image", shell_complete=arguments.complete_image)
@click.option(
    "--node",
    "nodes",
    multiple=True,
    metavar="NODE",
    shell_complete=arguments.complete_node,
    help="In a cluster: start the image's pod on this node; for a JobSet, repeat it.",
)
@click.option("--pod", help="In a cluster: restore into this pod, which waits for the image.")
@click.option(
    "--replace",
    is_flag=True,
    help="With --node: delete a pod of that name first; of a JobSet, end what runs of it.",
)
@click.option("--again", is_flag=True, help="In a cluster: even if the image was restored before.")
@arguments.storage
@click.option("--isolate", is_flag=True, help="Use fresh pid and mount namespaces.")
@click.option(
    "--wait",
    is_flag=True,
    help="Stay until the processes end, pass signals on, and exit with the first root's status"
    " that is not 0.",
)
@click.option(
    "--files",
    type=click.Choice([policy.value for policy in FilePolicy]),
    default=FilePolicy.REFUSE.value,
    show_default=True,
    help="Where a file of the image differs from what is there now: refuse, roll it back (the"
    " other is kept aside), or keep what is there.",
)
@click.option(
    "--eager",
    is_flag=True,
    help="Let all memory come before the processes run, as it always does in a cluster.",
)
@click.option("--stdin", type=click.Path(), help="Replaces the processes' standard input.")
@click.option("--stdout", type=click.Path(), help="Appended to; replaces standard output.")
@click.option("--stderr", type=click.Path(), help="Appended to; replaces standard error.")
@click.option(
    "--accept-changed", is_flag=True, help="Accept programs and libraries that have changed."
)
@click.option(
    "--deadline",
    type=arguments.span_s,
    metavar="SPAN",
    help="Give up after this time [default: 10m].",
)
@arguments.coordinator("a JobSet or a group")
@arguments.queue
@pass_invocation
def verb(
    invocation: Invocation,
    image: str,
    nodes: tuple[str, ...],
    pod: str | None,
    replace: bool,
    again: bool,
    storage: str,
    isolate: bool,
    wait: bool,
    files: str,
    eager: bool,
    stdin: str | None,
    stdout: str | None,
    stderr: str | None,
    accept_changed: bool,
    deadline: float | None,
    coordinator: bool | None,
    queue: bool,
) -> int:
    """Bring IMAGE back: a name that dump printed, or a group for its newest image.

    Everything in the way is named at once, and nothing is changed then. In a cluster say where:
    --node or --pod.

    On this host large memory may come while the processes run: before they run, the image is
    verified but for that memory, all of which must be there; then each page is verified before a
    process sees it, those first that are waited for. The command stays until all is in. If that
    cannot be, the processes are ended. With --eager, and in a cluster, the image is read and
    verified whole before any process starts.

    jobset/NAME[@EPOCH] brings back all pods of a JobSet at one instant, on the nodes that --node
    names or where the scheduler likes. group/NAME[@EPOCH] brings the pods of a selector back, or
    those that were followed (group/followed.NAME), into pods of the same names that wait for the
    image.
    """
    of_a_cluster = {
        "--node": nodes,
        "--pod": pod,
        "--replace": replace,
        "--again": again,
        "--storage": storage,
    }
    of_a_host = {
        "--isolate": isolate,
        "--wait": wait,
        "--files": files if files != FilePolicy.REFUSE.value else "",
        "--stdin": stdin,
        "--stdout": stdout,
        "--stderr": stderr,
        "--accept-changed": accept_changed,
    }
    settings = invocation.settings(restore_deadline=deadline, use_coordinator=coordinator)
    told_where = bool(nodes or pod) or not invocation.in_cluster(settings)
    together = _together(image if told_where else _as_printed(image))
    kind = together[0].kind if together else ""
    asked = arguments.by_coordinator(settings, kind, said=coordinator, queue=queue)
    if together is not None:
        if kind == "jobset":
            arguments.refuse(of_a_host | {"--pod": pod, "--again": again}, "is not for a JobSet")
        else:
            placed = {"--pod": pod, "--node": nodes, "--replace": replace}
            arguments.refuse(of_a_host | placed, "is not for a group of pods, which wait already")
            arguments.refuse({"--again": again and asked}, "does not go with --coordinator")
        target, epoch = together
        if asked:
            from agent.cli import bycoordinator

            meant = bycoordinator.target(target)
            bycoordinator.restore(
                invocation,
                settings,
                meant,
                epoch,
                storage=storage,
                nodes=nodes,
                replace=replace,
                wait=queue,
            )
        elif kind == "jobset":
            from agent.cli import injobset

            injobset.restore(
                invocation,
                settings,
                target.name,
                epoch,
                storage=storage,
                nodes=nodes,
                replace=replace,
            )
        else:
            from agent.cli import ingroup

            ingroup.restore(invocation, settings, target.name, epoch, storage=storage, again=again)
        return exits.DONE
    if invocation.in_cluster(settings) or any(of_a_cluster.values()):
        arguments.refuse(of_a_host, "is for processes on this host, not for pods in a cluster")
        node = arguments.one_node(nodes, "--node")
        if (node is None) == (pod is None):
            raise click.UsageError("say where: --node NODE or --pod NAME")
        if replace and node is None:
            raise click.UsageError("--replace goes with --node")
        from agent.cli import incluster

        incluster.restore(
            invocation,
            settings,
            image,
            storage=storage,
            node=node,
            pod=pod,
            replace=replace,
            again=again,
        )
        return exits.DONE
    with contextlib.ExitStack() as stack:
        options = RestoreOptions(
            isolate=isolate,
            files=FilePolicy(files),
            stdin=_opened(stack, stdin, os.O_RDONLY),
            stdout=_opened(stack, stdout, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            stderr=_opened(stack, stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            deadline_s=settings.restore_deadline_s,
            accept_changed=accept_changed,
            log_level=settings.criu_log_level,
            fills=None if eager else Fills(_LATE_FROM_BYTES),
        )
        outcome = _restored(invocation, settings, image, options)
    document = documents.restore_report(outcome, isolated=isolate)
    whole = ""
    if outcome.late_bytes:
        complete_s = outcome.running_s + outcome.late_s
        whole = f"; all of its memory was there after {output.human_s(complete_s)}"
    invocation.say(f"{document['name']} runs after {output.human_s(outcome.running_s)}{whole}")
    statuses = _wait(outcome) if wait else []
    for member, status in zip(document["members"], statuses, strict=False):
        member["exitStatus"] = status
    invocation.emit(document)
    return next((status for status in statuses if status), exits.DONE)


def _restored(
    invocation: Invocation, settings: Settings, image: str, options: RestoreOptions
) -> RestoreOutcome:
    """All of it, or nothing if a signal comes before its memory is complete."""
    stopped: list[int] = []
    told: list[str] = []

    def asked(number: int) -> None:
        if not stopped:
            invocation.say("stopping; nothing of the image will run")
        stopped.append(number)

    with interrupts.caught(asked), progress.for_restore(invocation.quiet) as show:

        def look(now: Progress) -> None:
            show(now)
            if stopped and now.phase != "done":
                raise _interrupted()
            if now.phase == "fill" and not told:
                told.append(now.phase)
                late = output.human_bytes(now.total_bytes)
                invocation.say(f"{image} runs, {late} of its memory are on the way")

        outcome = wiring.restore(settings, image, options, progress=look)
        if stopped:
            _take_back(outcome)
    return outcome


def _as_printed(image: str) -> str:
    """What dump printed of several pods as this verb calls it, where the name alone says so."""
    if podfollow.is_group(image.partition("@")[0]):
        return f"group/{image}"
    prefix = jobset.group("")
    return f"jobset/{image.removeprefix(prefix)}" if image.startswith(prefix) else image


def _together(image: str) -> tuple[arguments.Target, str] | None:
    """The JobSet or group that ``image`` is of, with its epoch ("" for the newest), if it names
    one.
    """
    if (of_a_jobset := arguments.jobset_image(image)) is not None:
        return arguments.Target("jobset", of_a_jobset[0]), of_a_jobset[1]
    if (of_a_group := arguments.group_image(image)) is not None:
        return arguments.Target("group", of_a_group[0]), of_a_group[1]
    return None


def _opened(stack: contextlib.ExitStack, path: str | None, flags: int) -> int | None:
    if path is None:
        return None
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, _OUTPUT_MODE)
    except OSError as exc:
        raise errors.InvalidInput(
            f"cannot open {path}: {exc.strerror}", hint="name a file you may use", path=path
        ) from exc
    stack.callback(os.close, fd)
    return fd


def _take_back(outcome: RestoreOutcome) -> None:
    for _, tree in outcome.trees:
        tree.kill()
    raise _interrupted()


def _interrupted() -> errors.Interrupted:
    return errors.Interrupted(
        "interrupted: nothing of the image runs any more", hint="restore it again"
    )


def _wait(outcome: RestoreOutcome) -> list[int]:
    """Wait for every tree; signals to this program reach the trees' roots instead."""

    def pass_on(number: int) -> None:
        for _, tree in outcome.trees:
            tree.signal(number)

    with interrupts.caught(pass_on):
        return [tree.wait() for _, tree in outcome.trees]
