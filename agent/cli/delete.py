"""``ckpt-agent delete``: remove one image."""

from __future__ import annotations

import click

from agent import wiring
from agent.cli import arguments, documents, exits, output
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "delete",
    cls=Verb,
    short_help="Remove one image.",
    status=(exits.REFUSED, exits.FAILED, exits.DATA, exits.VOLUME, exits.PIPE_CLOSED),
    example="ckpt-agent delete training@20260131-235959-0a1b2c",
)
@click.argument("image", shell_complete=arguments.complete_image)
@arguments.storage
@pass_invocation
def verb(invocation: Invocation, image: str, storage: str) -> None:
    """Remove IMAGE and the space that only it used; other images are not affected.

    IMAGE must name its epoch: a group alone would remove whatever is newest at that moment.
    """
    if "@" not in image:
        raise click.UsageError(f"{image!r} names a group: name one image, as list -o name shows it")
    settings = invocation.settings()
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        incluster.delete(invocation, settings, image, storage)
        return
    arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
    store = wiring.store(settings)
    report = store.delete(*store.resolve(image))
    for reason in report.blocked:
        invocation.say(f"no space was freed: {reason}")
    invocation.say(f"freed {output.human_bytes(report.freed_bytes)}")
    invocation.emit(documents.prune_report(str(settings.store), report, dry_run=False))
