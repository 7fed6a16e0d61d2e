"""``ckpt-agent export``: an image as a checkpoint archive."""

from __future__ import annotations

import os
from typing import cast

import click

from agent import wiring
from agent.cli import arguments, documents, exits, progress
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.host import archivefile


@click.command(
    "export",
    cls=Verb,
    short_help="Write an image as a checkpoint archive.",
    status=(
        *(exits.REFUSED, exits.FAILED, exits.DATA, exits.VOLUME, exits.ENVIRONMENT),
        *(exits.INTERRUPTED, exits.PIPE_CLOSED),
    ),
    example="ckpt-agent export trainer-0 /tmp/trainer-0.tar --member trainer",
)
@click.argument("image", shell_complete=arguments.complete_image)
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--member", metavar="NAME", help="The container to export, if there are several.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["archive", "oci"]),
    default="archive",
    help="A checkpoint archive, or an OCI image with it, in a tar [default: archive].",
)
@click.option("--reference", metavar="NAME", help="What the OCI image is called.")
@arguments.storage
@pass_invocation
def verb(
    invocation: Invocation,
    image: str,
    file: str,
    member: str | None,
    form: str,
    reference: str | None,
    storage: str,
) -> None:
    """Write IMAGE to FILE as the archive that checkpointctl reads, and that containerd and CRI-O
    restore if a kubelet took it. The archive holds the memory with all secrets in it: it is made
    for its owner alone, and in a cluster it takes the right to "export" images. FILE appears when
    it is whole.
    """
    if reference is not None and form != "oci":
        raise click.UsageError("--reference is for --format oci")
    settings = invocation.settings()
    wanted = archivefile.Wanted(os.path.abspath(file), cast(archivefile.Form, form), reference)
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        written = incluster.export(invocation, settings, image, member, wanted, storage)
    else:
        arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
        with progress.for_reading(invocation.quiet, image) as show:
            written = wiring.export(settings, image, member, wanted, show)
    for path in written.left_out:
        invocation.say(f"not in the archive, which has no place for it: {path}")
    invocation.emit(documents.export_report(written))
