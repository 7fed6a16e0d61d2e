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
        *(exits.REFUSED, exits.FAILED, exits.DATA, exits.VOLUME, exits.ENVIRONMENT),
        *(exits.INTERRUPTED, exits.PIPE_CLOSED),
    ),
    example="ckpt-agent import /var/lib/kubelet/checkpoints/checkpoint-trainer-0.tar",
)
@click.argument("file", type=click.Path())
@click.option("--name", metavar="GROUP", help="The image's group [default: the pod's name].")
@click.option(
    "--storage",
    metavar="NAME",
    default="",
    help="In a cluster: where the image is to lie [default: where the namespace's images go].",
)
@pass_invocation
def verb(invocation: Invocation, file: str, name: str | None, storage: str) -> None:
    """Take FILE, an archive that a kubelet, containerd, CRI-O, podman or `export` wrote, into the
    store. One that is damaged or hostile is refused, and nothing of it is stored. In a cluster it
    is sent to an agent, and the image is for show, verify and export: what a stranger wrote is not
    restored with an agent's rights.
    """
    settings = invocation.settings()
    path = os.path.abspath(file)
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        incluster.take_in(invocation, settings, path, name, storage)
        return
    arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
    summary = wiring.take_in(settings, path, name)
    invocation.emit(documents.import_report(summary))
