"""``ckpt-agent verify``: read images whole and name every damaged part."""

from __future__ import annotations

import click

from agent import errors, wiring
from agent.cli import arguments, documents, exits, progress
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.model import ids


@click.command(
    "verify",
    cls=Verb,
    short_help="Read images whole and name damaged parts.",
    status=(exits.REFUSED, exits.DATA, exits.VOLUME, exits.INTERRUPTED, exits.PIPE_CLOSED),
    example="ckpt-agent verify --all",
)
@click.argument("image", required=False, shell_complete=arguments.complete_image)
@click.option("--all", "everything", is_flag=True, help="Verify every image of the store.")
@arguments.storage
@pass_invocation
def verb(invocation: Invocation, image: str | None, everything: bool, storage: str) -> int:
    """Read IMAGE, or all images, as a restore would, and name every damaged part."""
    if (image is None) != everything:
        raise click.UsageError("give either an IMAGE or --all")
    settings = invocation.settings()
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        return incluster.verify(invocation, settings, image, storage)
    arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
    store = wiring.store(settings)
    if image is None:
        wanted = [(each.group, each.epoch) for each in store.epochs()]
    else:
        wanted = [store.resolve(image)]
    reports = []
    for group, epoch in wanted:
        name = ids.image_name(group, epoch)
        with progress.for_reading(invocation.quiet, name) as show:
            try:
                reports.append((name, store.verify(group, epoch, show)))
            except errors.NotFound:
                if image is not None:
                    raise
                # Removed since it was listed, as a watch does that keeps the last ones.
                invocation.say(f"{name} was deleted meanwhile")
    if not reports:
        invocation.say("no images")
    name = reports[0][0] if image else str(settings.store)
    document = documents.verify_report(name, reports)
    invocation.emit(document)
    return exits.DONE if document["good"] else exits.DATA
