"""``ckpt-agent export``: an image as a checkpoint archive."""

from __future__ import annotations

import os

import click

from agent import wiring
from agent.cli import arguments, documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "export",
    cls=Verb,
    short_help="Write an image as a checkpoint archive.",
    status=(
        *(exits.REFUSED, exits.DATA, exits.VOLUME, exits.ENVIRONMENT),
        *(exits.INTERRUPTED, exits.PIPE_CLOSED),
    ),
    example="ckpt-agent export trainer-0 /tmp/trainer-0.tar --member trainer",
)
@click.argument("image", shell_complete=arguments.complete_image)
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--member", metavar="NAME", help="The container to export, if there are several.")
@pass_invocation
def verb(invocation: Invocation, image: str, file: str, member: str | None) -> None:
    """Write IMAGE to FILE as the archive that checkpointctl reads, and that containerd and CRI-O
    restore if a kubelet took it. The archive holds the memory with all secrets in it: it is made
    for its owner alone.
    """
    settings = invocation.settings()
    arguments.refuse_cluster(invocation, settings)
    written = wiring.export(settings, image, member, os.path.abspath(file))
    for path in written.exported.left_out:
        invocation.say(f"not in the archive, which has no place for it: {path}")
    invocation.emit(documents.export_report(written))
