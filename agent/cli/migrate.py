"""``ckpt-agent migrate``: move a pod, or a JobSet, to other nodes of a cluster."""

from __future__ import annotations

import click

from agent.cli import arguments, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "migrate",
    cls=Verb,
    short_help="Move a pod or a JobSet to other nodes.",
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
    example="ckpt-agent migrate pod/trainer-0 --to node-2 -n research",
)
@click.argument(
    "target",
    metavar="pod/NAME|jobset/NAME",
    type=arguments.target,
    shell_complete=arguments.complete_pod,
)
@click.option(
    "--to",
    "nodes",
    required=True,
    multiple=True,
    metavar="NODE",
    shell_complete=arguments.complete_node,
    help="The node to move it to; for a JobSet, repeat it.",
)
@arguments.engine
@click.option(
    "--deadline",
    type=arguments.span_s,
    metavar="SPAN",
    help="Give the dump, and the restore, up after this time [default: 10m each].",
)
@arguments.coordinator("a JobSet")
@arguments.queue
@pass_invocation
def verb(
    invocation: Invocation,
    target: arguments.Target,
    nodes: tuple[str, ...],
    engine: str | None,
    deadline: float | None,
    coordinator: bool | None,
    queue: bool,
) -> None:
    """Checkpoint a pod, stop it, and bring it back on another node under its own name, with its
    memory, its files and its output going on.

    What stands against the move is looked for while the pod still runs, and nothing is deleted
    before the image is committed. If a later step fails, the message says what exists where and
    which command goes on.

    The pods of a JobSet move at one instant. Those that are on one node stay together; the nodes
    that they are on, in the order of the pods, go to the named ones in turn.
    """
    settings = invocation.settings(
        dump_deadline=deadline, restore_deadline=deadline, use_coordinator=coordinator
    )
    asked = arguments.by_coordinator(settings, target.kind, said=coordinator, queue=queue)
    if target.kind == "jobset":
        arguments.refuse({"--engine": engine}, "is for a pod, not for a JobSet")
        if asked:
            from agent.cli import bycoordinator

            bycoordinator.migrate(invocation, settings, target.name, nodes, wait=queue)
        else:
            from agent.cli import injobset

            injobset.migrate(invocation, settings, target.name, nodes)
        return
    node = arguments.one_node(nodes, "--to") or ""
    from agent.cli import incluster

    incluster.migrate(invocation, settings, target.name, node, engine=engine)
