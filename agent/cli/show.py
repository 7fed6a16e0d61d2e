"""``ckpt-agent show``: one image in detail."""

from __future__ import annotations

import click

from agent import wiring
from agent.cli import arguments, documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "show",
    cls=Verb,
    short_help="Show what an image holds.",
    status=(exits.REFUSED, exits.DATA, exits.VOLUME, exits.PIPE_CLOSED),
    example="ckpt-agent show training@20260131-235959-0a1b2c -o json",
)
@click.argument("image", shell_complete=arguments.complete_image)
@arguments.storage
@pass_invocation
def verb(invocation: Invocation, image: str, storage: str) -> None:
    """Show IMAGE (a name, or a group for its newest): processes, memory by kind, files, sockets,
    and how much of it is new against the image before it.
    """
    settings = invocation.settings()
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        incluster.show(invocation, settings, image, storage)
        return
    arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
    store = wiring.store(settings)
    group, epoch = store.resolve(image)
    earlier = [each for each in store.epochs(group) if each.epoch < epoch]
    reader = store.read(group, epoch)
    sources = [(name, reader.member(name)) for name in reader.members]
    invocation.emit(
        documents.image_detail(
            reader.summary,
            earlier[-1] if earlier else None,
            [(name, source.facts(), list(source.files())) for name, source in sources],
        )
    )
