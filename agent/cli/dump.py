"""``ckpt-agent dump``: capture running process trees as one image."""

from __future__ import annotations

import os

import click

from agent import wiring
from agent.cli import arguments, documents, exits, interrupts, output, progress
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.engines.base import CaptureOptions
from agent.node.dump import Cancel
from agent.settings import Settings


@click.command(
    "dump",
    cls=Verb,
    short_help="Capture running process trees as one image.",
    status=(
        exits.REFUSED,
        exits.FAILED,
        exits.VOLUME,
        exits.ENVIRONMENT,
        exits.INTERRUPTED,
        exits.PIPE_CLOSED,
    ),
    example="ckpt-agent dump --pid 4711 --name training --include /srv/run7",
)
@click.argument(
    "target",
    metavar="[pod/NAME|jobset/NAME|group/NAME]",
    type=arguments.dump_target,
    required=False,
    shell_complete=arguments.complete_pod,
)
@arguments.roots
@arguments.follow("on this host, or in the namespace,")
@click.option("--stop", is_flag=True, help="End the processes once the image is committed.")
@click.option("--name", help="Group of the image [default: program and pid of the first root].")
@click.option(
    "--include",
    type=click.Path(),
    multiple=True,
    help="File or directory that travels with the image; may be repeated.",
)
@click.option(
    "-l",
    "--selector",
    metavar="LABELS",
    default="",
    help="With group/NAME: its pods are all that match, as kubectl's -l.",
)
@arguments.containers
@arguments.engine
@click.option(
    "--deadline",
    type=arguments.span_s,
    metavar="SPAN",
    help="Give up after this time [default: 10m].",
)
@arguments.pace
@arguments.coordinator("a JobSet, a group or a pod with --follow")
@arguments.queue
@pass_invocation
def verb(
    invocation: Invocation,
    target: arguments.Target | None,
    pids: tuple[int, ...],
    follow: bool,
    stop: bool,
    name: str | None,
    include: tuple[str, ...],
    selector: str,
    containers: tuple[str, ...],
    engine: str | None,
    deadline: float | None,
    precopy_cpu: str | None,
    precopy_rate: str | None,
    coordinator: bool | None,
    queue: bool,
) -> None:
    """Capture the process trees below each PID, or in a cluster the containers of a pod, of all
    pods of a JobSet or of all pods that a selector means, as one image and print its name.

    Memory is copied while the processes run, so that they stand still only for what they wrote
    last; where that cannot be, for all of it. They go on while what was held back is compressed and
    written. If anything fails, or on Ctrl-C, they go on and nothing is stored.
    """
    of_a_host = {"--name": name, "--include": include}
    of_a_host |= {"--precopy-cpu": precopy_cpu, "--precopy-rate": precopy_rate}
    arguments.check_target(
        invocation,
        target,
        pids,
        {"--container": containers, "--engine": engine, "--selector": selector},
        of_a_host,
    )
    settings = invocation.settings(
        dump_deadline=deadline,
        use_coordinator=coordinator,
        precopy_cpu=precopy_cpu,
        precopy_rate=precopy_rate,
    )
    kind = arguments.followed(target.kind if target else "", follow=follow)
    asked = arguments.by_coordinator(settings, kind, said=coordinator, queue=queue)
    if target is not None:
        if (kind == "group") != bool(selector):
            raise click.UsageError("group/NAME and --selector LABELS go together")
        if kind == "pod":
            from agent.cli import incluster

            incluster.dump(invocation, settings, target.name, containers, engine=engine, stop=stop)
            return
        arguments.refuse(
            {"--container": containers}, "is for one pod, not for several that are cut together"
        )
        if asked:
            from agent.cli import bycoordinator

            meant = bycoordinator.target(target, selector)
            arguments.refuse({"--engine": engine}, "is not for what the coordinator does")
            bycoordinator.dump(invocation, settings, meant, stop=stop, wait=queue)
        else:
            _dump_together(
                invocation, settings, target, selector, follow=follow, engine=engine, stop=stop
            )
        return
    options = CaptureOptions(
        deadline_s=settings.dump_deadline_s,
        include=tuple(os.path.abspath(path) for path in include),
        ghost_limit_bytes=settings.ghost_limit_bytes,
        precopy=settings.precopy,
        precopy_cpu_percent=settings.precopy_cpu_percent,
        precopy_bytes_per_s=settings.precopy_rate_bytes,
        log_level=settings.criu_log_level,
    )
    followed = wiring.followed(pids) if follow else None
    if followed is not None:
        followed.check()
        for each in followed.members:
            if each.because:
                invocation.say(
                    f"also cuts the tree of {each.root} ({each.program}): {each.because}"
                )
        for one in followed.leaving:
            invocation.say(f"leaves the cut: {one.link} of {one.pid} ({one.program}): {one.reason}")
    cancel = Cancel()

    def stop_asked(number: int) -> None:
        cancel.set()
        invocation.say("stopping; the job goes on")

    with (
        interrupts.caught(stop_asked),
        progress.for_dump(invocation.quiet, followed.roots if followed else pids) as show,
    ):
        outcome = wiring.dump(
            settings,
            pids,
            name,
            options,
            followed=followed,
            stop=stop,
            cancel=cancel,
            progress=show,
        )
    document = documents.dump_report(outcome)
    count = document["processes"]
    invocation.say(
        f"captured {output.human_bytes(document['rawBytes'])} from"
        f" {count} process{'es' if count > 1 else ''}, stopped for"
        f" {output.human_s(document['stopSeconds'])}, durable after"
        f" {output.human_s(document['durableSeconds'])}; new"
        f" {output.human_bytes(document['newBytes'])}, stored"
        f" {output.human_bytes(document['storedBytes'])}"
    )
    invocation.emit(document)


def _dump_together(
    invocation: Invocation,
    settings: Settings,
    target: arguments.Target,
    selector: str,
    *,
    follow: bool,
    engine: str | None,
    stop: bool,
) -> None:
    """This program is the coordinator."""
    if follow:
        from agent.cli import ingroup

        arguments.refuse({"--engine": engine}, "is not for a pod with whoever is connected to it")
        ingroup.dump_followed(invocation, settings, target.name, stop=stop)
    elif target.kind == "group":
        from agent.cli import ingroup

        ingroup.dump(invocation, settings, target.name, selector, engine=engine or "", stop=stop)
    else:
        from agent.cli import injobset

        injobset.dump(invocation, settings, target.name, engine=engine or "", stop=stop)
