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
    "target",
    metavar="[pod/NAME|jobset/NAME|group/NAME]",
    type=arguments.dump_target,
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
@arguments.follow("on this host, or in the namespace,")
@click.option(
    "-l",
    "--selector",
    metavar="LABELS",
    default="",
    help="With group/NAME: its pods are all that match, as kubectl's -l.",
)
@click.option(
    "--measure",
    type=arguments.span_s,
    metavar="SPAN",
    help="Note for so long which memory the processes write: the stop is then what it would be.",
)
@arguments.containers
@arguments.coordinator("a JobSet, a group or a pod with --follow")
@pass_invocation
def verb(
    invocation: Invocation,
    target: arguments.Target | None,
    pids: tuple[int, ...],
    follow: bool,
    selector: str,
    measure: float | None,
    containers: tuple[str, ...],
    coordinator: bool | None,
) -> int:
    """Say what a dump of the trees below each PID, or of a pod in a cluster, would capture, how
    large it is, how long the stop would be, and what would fail and why. The processes are only
    looked at, unless --measure lets the kernel note what they write, as a dump does that copies
    memory ahead. Of a JobSet or a group of pods the cluster's coordinator says it.

    The exit status is 3 if a dump would be refused or fail.
    """
    arguments.check_target(
        invocation,
        target,
        pids,
        {"--container": containers, "--selector": selector},
        {"--measure": measure},
    )
    settings = invocation.settings(use_coordinator=coordinator)
    kind = arguments.followed(target.kind if target else "", follow=follow)
    asked = arguments.by_coordinator(settings, kind, said=coordinator)
    if target is not None:
        if (kind == "group") != bool(selector):
            raise click.UsageError("group/NAME and --selector LABELS go together")
        if kind == "pod":
            from agent.cli import incluster

            return incluster.plan(invocation, settings, target.name, containers)
        arguments.refuse({"--container": containers}, "is for a pod, not for a group of pods")
        if not asked:
            what = "a pod with --follow" if follow else f"a {kind}"
            raise click.UsageError(f"the coordinator plans for {what}: add --coordinator")
        from agent.cli import bycoordinator

        return bycoordinator.plan(invocation, settings, bycoordinator.target(target, selector))
    followed = wiring.followed(pids) if follow else None
    found = wiring.plan(settings, pids, followed)
    if measure and not found.blockers:
        from agent.model import plan as model_plan

        found = model_plan.measured(found, wiring.written(found.roots, measure))
    invocation.emit(documents.plan_report(found, followed))
    return exits.REFUSED if found.blockers else exits.DONE
