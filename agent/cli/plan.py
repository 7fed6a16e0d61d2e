"""``ckpt-agent plan``: what a dump would take, without touching the job."""

from __future__ import annotations

import click

from agent import wiring
from agent.cli import arguments, documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "plan",
    cls=Verb,
    short_help="Say what a dump would take, without touching the job.",
    status=(exits.REFUSED, exits.ENVIRONMENT, exits.PIPE_CLOSED),
    example="ckpt-agent plan --pid 4711",
)
@click.argument(
    "pod",
    metavar="[pod/NAME]",
    type=arguments.pod,
    required=False,
    shell_complete=arguments.complete_pod,
)
@click.option(
    "--pid",
    "pids",
    type=arguments.pid,
    metavar="PID",
    multiple=True,
    help="Root of a process tree; may be repeated.",
)
@arguments.follow
@arguments.containers
@pass_invocation
def verb(
    invocation: Invocation,
    pod: str | None,
    pids: tuple[int, ...],
    follow: bool,
    containers: tuple[str, ...],
) -> int:
    """Say what a dump of the trees below each PID, or of a pod in a cluster, would capture, how
    large it is, how long the stop would be, and what would fail and why. The processes are only
    looked at.

    The exit status is 3 if a dump would be refused or fail.
    """
    arguments.check_target(invocation, pod, pids, {"--container": containers}, {"--follow": follow})
    settings = invocation.settings()
    if pod is not None:
        from agent.cli import incluster

        return incluster.plan(invocation, settings, pod, containers)
    followed = wiring.followed(pids) if follow else None
    found = wiring.plan(settings, pids, followed)
    invocation.emit(documents.plan_report(found, followed))
    return exits.REFUSED if found.blockers else exits.DONE
