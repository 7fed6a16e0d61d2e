"""``ckpt-agent import``: a checkpoint archive becomes an image."""

from __future__ import annotations

import os

import click

from agent import wiring
from agent.cli import arguments, documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "import",
    cls=Verb,
    short_help="Store a checkpoint archive as an image.",
    status=(
        *(exits.REFUSED, exits.DATA, exits.VOLUME, exits.ENVIRONMENT),
        *(exits.INTERRUPTED, exits.PIPE_CLOSED),
    ),
    example="ckpt-agent import /var/lib/kubelet/checkpoints/checkpoint-trainer-0.tar",
)
@click.argument("file", type=click.Path())
@click.option("--name", metavar="GROUP", help="The image's group [default: the pod's name].")
@pass_invocation
def verb(invocation: Invocation, file: str, name: str | None) -> None:
    """Take FILE, an archive that a kubelet, containerd, CRI-O, podman or `export` wrote, into the
    store. One that is damaged or hostile is refused, and nothing of it is stored.
    """
    settings = invocation.settings()
    arguments.refuse_cluster(invocation, settings)
    summary = wiring.take_in(settings, os.path.abspath(file), name)
    invocation.emit(documents.import_report(summary))
