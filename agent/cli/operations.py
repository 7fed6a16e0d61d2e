"""``ckpt-agent operations``: what the cluster's coordinator does and did."""

from __future__ import annotations

import click

from agent.cli import exits
from agent.cli.invocation import Invocation, Verb, pass_invocation

_ACTIONS = ("list", "show", "watch", "cancel")


@click.command(
    "operations",
    cls=Verb,
    short_help="List, show, watch or cancel the coordinator's operations.",
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
    example="ckpt-agent operations watch 3f2a9c4b5d6e7f801122 -n research",
)
@click.argument("action", type=click.Choice(_ACTIONS), default="list")
@click.argument("identifier", metavar="[ID]", required=False)
@click.option(
    "--group", metavar="GROUP", default="", help="Only of this group, such as jobset.NAME."
)
@pass_invocation
def verb(invocation: Invocation, action: str, identifier: str | None, group: str) -> None:
    """Say what the cluster's coordinator does and did in a namespace, newest first, or show,
    watch or cancel the operation ID.

    watch ends with the operation, and with its status. cancel asks it to give up: until a dump is
    committed every pod goes on as if nothing had been asked, and what is past that goes to its end.
    """
    if (action == "list") == (identifier is not None):
        raise click.UsageError("name the operation: show, watch or cancel ID")
    if group and action != "list":
        raise click.UsageError("--group goes with list")
    settings = invocation.settings()
    from agent.cli import bycoordinator

    if identifier is None:
        bycoordinator.list_all(invocation, settings, group)
    elif action == "show":
        bycoordinator.show(invocation, settings, identifier)
    elif action == "watch":
        bycoordinator.watch(invocation, settings, identifier)
    else:
        bycoordinator.cancel(invocation, settings, identifier)
