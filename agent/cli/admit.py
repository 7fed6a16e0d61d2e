"""``ckpt-agent admit``: the admission service of a cluster."""

from __future__ import annotations

import logging
import threading

import click

from agent import services
from agent.cli import arguments, exits, interrupts
from agent.cli.invocation import Invocation, Verb, pass_invocation

# Unprivileged, and what admission webhooks commonly listen on.
_PORT = 8443


@click.command(
    "admit",
    cls=Verb,
    short_help="Serve a cluster's admission webhook and keep the certificates.",
    status=(exits.REFUSED, exits.ENVIRONMENT),
    example="ckpt-agent admit --port 8443",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=_PORT,
    show_default=True,
    help="Where to listen.",
)
@click.option("--image", metavar="IMAGE", help="What pods take hold from. Default: this pod's.")
@click.option(
    "--leaf-lifetime", type=arguments.span_s, metavar="SPAN", help="Life of server certificates."
)
@click.option(
    "--leaf-renew-before",
    type=arguments.span_s,
    metavar="SPAN",
    help="Replace them this long before their end.",
)
@click.option("--ca-lifetime", type=arguments.span_s, metavar="SPAN", help="Life of the authority.")
@click.option(
    "--ca-renew-before",
    type=arguments.span_s,
    metavar="SPAN",
    help="Make its successor this long before its end.",
)
@click.option(
    "--trust-overlap",
    type=arguments.span_s,
    metavar="SPAN",
    help="Trust old and new authority together for this long.",
)
@pass_invocation
def verb(
    invocation: Invocation,
    port: int,
    image: str | None,
    leaf_lifetime: float | None,
    leaf_renew_before: float | None,
    ca_lifetime: float | None,
    ca_renew_before: float | None,
    trust_overlap: float | None,
) -> None:
    """Add to opted-in pods what a restore needs, and keep the project's certificates.

    Runs in a pod of the Deployment ckpt-agent-admission until it is asked to stop. Several may
    run; one at a time keeps the certificates.
    """
    settings = invocation.settings(
        image=image,
        leaf_lifetime=leaf_lifetime,
        leaf_renew_before=leaf_renew_before,
        ca_lifetime=ca_lifetime,
        ca_renew_before=ca_renew_before,
        trust_overlap=trust_overlap,
    )
    logging.basicConfig(
        level=logging.WARNING if invocation.quiet else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    stop = threading.Event()
    with interrupts.caught(lambda number: stop.set()):
        services.admit(settings, port=port, stop=stop)
