"""``ckpt-agent watch``: epoch after epoch of running process trees."""

from __future__ import annotations

import os

import click

from agent import errors, wiring
from agent.cli import arguments, documents, exits, interrupts, output
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.engines.base import CaptureOptions
from agent.host import clock
from agent.model import follow as model_follow
from agent.node.dump import DumpOutcome
from agent.node.watch import Stop
from agent.store.retention import Retention

_AUTO = "auto"


def _every(value: str) -> float | None:
    return None if value == _AUTO else arguments.span_s(value)


@click.command(
    "watch",
    cls=Verb,
    short_help="Dump running process trees again and again.",
    status=(
        exits.REFUSED,
        exits.FAILED,
        exits.VOLUME,
        exits.ENVIRONMENT,
        exits.PIPE_CLOSED,
    ),
    example="ckpt-agent watch --pid 4711 --name training --every 30s --keep-last 10",
)
@click.option(
    "--pid",
    "pids",
    type=arguments.pid,
    metavar="PID",
    multiple=True,
    required=True,
    help="Root of a process tree; repeat it to cut several trees at one moment.",
)
@arguments.follow
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
@arguments.pace
@pass_invocation
def verb(
    invocation: Invocation,
    pids: tuple[int, ...],
    follow: bool,
    name: str | None,
    include: tuple[str, ...],
    every: float | None,
    count: int | None,
    keep_last: int | None,
    precopy_cpu: str | None,
    precopy_rate: str | None,
) -> int:
    """Capture the process trees below each PID again and again, each time for what was written
    since, and print a line for each image, until they end or Ctrl-C.

    Between two dumps the kernel notes what the processes write. A dump that fails is told on
    stderr, and the next one is made in its turn; the exit status tells of the last one.
    """
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
    stop = Stop()

    def stop_asked(number: int) -> None:
        stop.set()
        invocation.say("stopping; the job goes on")

    def done(outcome: DumpOutcome) -> None:
        document = documents.dump_report(outcome)
        invocation.say(
            f"stopped for {output.human_s(document['stopSeconds'])}, durable after"
            f" {output.human_s(document['durableSeconds'])}, stored"
            f" {output.human_bytes(document['storedBytes'])}"
        )
        invocation.emit(document)
        # What the configuration says of images to keep is prune's, which is asked for by name.
        if keep_last is not None:
            prune(outcome, keep_last)

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
        invocation.say(
            f"the dump took {output.human_s(took_s)}, longer than was to be between two: the next"
            f" begins in {output.human_s(pause_s)}"
        )

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
            every_s=every,
            most=count,
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
