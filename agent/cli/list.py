"""``ckpt-agent list``: the images of the store."""

from __future__ import annotations

import click

from agent import wiring
from agent.cli import arguments, documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.model import ids


@click.command(
    "list",
    cls=Verb,
    short_help="List images.",
    status=(exits.REFUSED, exits.DATA, exits.VOLUME, exits.PIPE_CLOSED),
    example="ckpt-agent list training -o name | tail -1",
)
@click.argument("group", required=False)
@arguments.storage
@pass_invocation
def verb(invocation: Invocation, group: str | None, storage: str) -> int:
    """List the images of GROUP, or of all groups, oldest first.

    A damaged image is listed as such. In a cluster (-n, --context, --kubeconfig) the images are
    those of a namespace, and each pod is a group. If a storage cannot be read, what is in the
    others is listed, and the exit status is 6.
    """
    settings = invocation.settings()
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        return incluster.list_images(invocation, settings, group, storage)
    arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
    epochs = wiring.store(settings).epochs(ids.group_name(group) if group else None)
    if not epochs:
        invocation.say("no images")
    invocation.emit(documents.image_list(str(settings.store), epochs))
    return exits.DONE
