"""``ckpt-agent node``: the agent of a cluster's node."""

from __future__ import annotations

import logging
import threading

import click

from agent import services
from agent.cli import arguments, documents, exits, interrupts
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.host import nativelog


@click.command(
    "node",
    cls=Verb,
    short_help="Serve a cluster's node: dump and restore its pods for others.",
    status=(exits.REFUSED, exits.ENVIRONMENT),
    example="ckpt-agent node --node-name worker-7 --store /var/lib/ckpt-agent/store",
)
@click.option("--health", is_flag=True, help="Only ask the agent that runs here whether it serves.")
@click.option("--node-name", metavar="NODE", help="The node's name in the cluster.")
@click.option("--runtime-socket", metavar="PATH", help="Where the container runtime listens.")
@click.option("--tls-dir", metavar="DIR", help="Holds tls.crt, tls.key and ca.crt.")
@click.option("--token-port", metavar="PORT", help="Port for callers with a token.")
@click.option("--certificate-port", metavar="PORT", help="Port for callers with a certificate.")
@click.option("--parallel", type=click.IntRange(min=1), help="Dumps and restores at once.")
@click.option(
    "--shutdown-grace",
    type=arguments.span_s,
    metavar="SPAN",
    help="How long operations may take to give up.",
)
@pass_invocation
def verb(
    invocation: Invocation,
    health: bool,
    node_name: str | None,
    runtime_socket: str | None,
    tls_dir: str | None,
    token_port: str | None,
    certificate_port: str | None,
    parallel: int | None,
    shutdown_grace: float | None,
) -> None:
    """Serve the gRPC API of this node until asked to stop.

    Runs in a pod of the DaemonSet ckpt-agent-node. Told to end, it gives up what it does; the pods
    that were being dumped go on.
    """
    settings = invocation.settings(
        node_name=node_name,
        runtime_socket=runtime_socket,
        tls_dir=tls_dir,
        token_port=token_port,
        certificate_port=certificate_port,
        parallel=parallel,
        shutdown_grace=shutdown_grace,
    )
    if health:
        services.node_health(settings)
        return
    level = logging.WARNING if invocation.quiet else logging.INFO
    stop = threading.Event()
    with nativelog.serving(level), interrupts.caught(lambda number: stop.set()):
        services.node(settings, documents, stop)
