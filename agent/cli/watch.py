"""``ckpt-agent watch``: epoch after epoch of running process trees, or of a pod."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from agent import errors, wiring
from agent.cli import arguments, documents, exits, interrupts, output
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.engines.base import CaptureOptions
from agent.host import clock
from agent.settings import Settings
from agent.store.retention import Retention

if TYPE_CHECKING:
    from agent.model import follow as model_follow
    from agent.node.dump import DumpOutcome

_AUTO = "auto"


def _every(value: str) -> float | None:
    return None if value == _AUTO else arguments.span_s(value)


@click.command(
    "watch",
    cls=Verb,
    short_help="Dump running process trees, or a pod, again and again.",
    status=(
        exits.REFUSED,
        exits.FAILED,
        exits.VOLUME,
        exits.ENVIRONMENT,
        exits.PIPE_CLOSED,
    ),
    example="ckpt-agent watch --pid 4711 --name training --every 30s --keep-last 10",
)
@click.argument(
    "target",
    metavar="[pod/NAME|jobset/NAME]",
    type=arguments.target,
    required=False,
    shell_complete=arguments.complete_pod,
)
@arguments.roots
@arguments.follow("on this host", "; looked for anew before each dump")
@click.option("--name", help="Group of the images [default: program and pid of the first root].")
@click.option(
    "--include",
    type=click.Path(),
    multiple=True,
    help="File or directory that travels with the images; may be repeated.",
)
@click.option(
    "--every",
    type=_every,
    metavar="SPAN|auto",
    default=_AUTO,
    show_default=True,
    help="From the beginning of one dump to that of the next; auto: a tenth of the time is dumps.",
)
@click.option("--count", type=click.IntRange(min=1), help="End after so many dumps.")
@click.option("--keep-last", type=click.IntRange(min=1), help="Remove older images of the group.")
@arguments.containers
@arguments.pace
@arguments.coordinator("a JobSet")
@pass_invocation
def verb(
    invocation: Invocation,
    target: arguments.Target | None,
    pids: tuple[int, ...],
    follow: bool,
    name: str | None,
    include: tuple[str, ...],
    every: float | None,
    count: int | None,
    keep_last: int | None,
    containers: tuple[str, ...],
    precopy_cpu: str | None,
    precopy_rate: str | None,
    coordinator: bool | None,
) -> int:
    """Capture the process trees below each PID, or in a cluster the containers of a pod, again and
    again, each time for what was written since, and print a line for each image, until they end or
    Ctrl-C. All pods of a JobSet are dumped again and again at one instant.

    Between two dumps the kernel notes what the processes write; of a JobSet nothing is kept
    between them. A dump that fails is told on stderr, and the next one is made in its turn, unless
    it is the first; the exit status tells of the last one.
    """
    of_a_host = {"--follow": follow, "--name": name, "--include": include}
    of_a_host |= {"--precopy-cpu": precopy_cpu, "--precopy-rate": precopy_rate}
    arguments.check_target(invocation, target, pids, {"--container": containers}, of_a_host)
    if target is not None:
        times = Times(every, count, keep_last)
        return _watch_in_cluster(invocation, target, containers, times, coordinator=coordinator)
    arguments.refuse({"--coordinator": coordinator}, "is for a JobSet")
    settings = invocation.settings(precopy_cpu=precopy_cpu, precopy_rate=precopy_rate)
    options = CaptureOptions(
        deadline_s=settings.dump_deadline_s,
        include=tuple(os.path.abspath(path) for path in include),
        ghost_limit_bytes=settings.ghost_limit_bytes,
        precopy=settings.precopy,
        precopy_cpu_percent=settings.precopy_cpu_percent,
        precopy_bytes_per_s=settings.precopy_rate_bytes,
        log_level=settings.criu_log_level,
    )
    times = Times(every, count, keep_last)
    return _watch(invocation, settings, pids, name, options, times, follow=follow)


@dataclasses.dataclass(frozen=True)
class Times:
    """How often, how many, and how many stay; None where nobody said."""

    every_s: float | None
    count: int | None
    keep_last: int | None


def _watch_in_cluster(
    invocation: Invocation,
    target: arguments.Target,
    containers: tuple[str, ...],
    times: Times,
    *,
    coordinator: bool | None,
) -> int:
    settings = invocation.settings(use_coordinator=coordinator)
    if target.kind == "jobset":
        from agent.cli import jobsetwatch

        arguments.refuse({"--container": containers}, "is for a pod, not for a JobSet")
        return jobsetwatch.watch(invocation, settings, target.name, times)
    from agent.cli import podwatch

    arguments.refuse({"--coordinator": coordinator}, "is for a JobSet")
    return podwatch.watch(invocation, settings, target.name, containers, times)


def _watch(
    invocation: Invocation,
    settings: Settings,
    pids: Sequence[int],
    name: str | None,
    options: CaptureOptions,
    times: Times,
    *,
    follow: bool,
) -> int:
    from agent.node.watch import Stop

    stop = Stop()

    def stop_asked(number: int) -> None:
        stop.set()
        invocation.say("stopping; the job goes on")

    def done(outcome: DumpOutcome) -> None:
        document = documents.dump_report(outcome)
        said_epoch(invocation, document)
        invocation.emit(document)
        # What the configuration says of images to keep is prune's, which is asked for by name.
        if times.keep_last is not None:
            prune(outcome, times.keep_last)

    def prune(outcome: DumpOutcome, keep_last: int) -> None:
        try:
            wiring.store(settings).prune(
                Retention(keep_last=keep_last, keep_within_s=settings.keep_within_s),
                group=outcome.epoch.group,
                now_s=clock.wall_s(),
                dry_run=False,
            )
        except errors.CkptError as exc:
            invocation.say(f"old images stay for now: {exc.message}")

    def failed(exc: errors.CkptError) -> None:
        invocation.say(f"a dump failed, the job goes on: {exc.message}")

    def late(took_s: float, pause_s: float) -> None:
        said_late(invocation, took_s, pause_s)

    def followed() -> model_follow.Closure:
        found = wiring.followed(pids)
        found.check()
        return found

    with interrupts.caught(stop_asked):
        found = wiring.watch(
            settings,
            pids,
            name,
            options,
            stop,
            follow_up=followed if follow else None,
            every_s=times.every_s,
            most=times.count,
            done=done,
            failed=failed,
            late=late,
        )
    invocation.say(
        f"{'the job has ended' if found.ended else 'the job goes on'}; images: {found.epochs},"
        f" failed dumps: {found.failures}"
    )
    if found.last_failed is not None:
        raise found.last_failed
    return exits.DONE


def said_epoch(invocation: Invocation, document: output.Document) -> None:
    """Tell of one of many dumps."""
    invocation.say(
        f"stopped for {output.human_s(document['stopSeconds'])}, durable after"
        f" {output.human_s(document['durableSeconds'])}, stored"
        f" {output.human_bytes(document['storedBytes'])}"
    )


def said_late(invocation: Invocation, took_s: float, pause_s: float) -> None:
    """Tell of a dump that took too long."""
    invocation.say(
        f"the dump took {output.human_s(took_s)}, longer than was to be between two: the next"
        f" begins in {output.human_s(pause_s)}"
    )
