"""``ckpt-agent coordinator``: what checkpoints and restores groups for others."""

from __future__ import annotations

import logging
import os
import threading

import click

from agent import errors, services
from agent.cli import arguments, exits, interrupts
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.host import nativelog

# Between the end of what it was and that of its process: the error is told.
_LAST_S = 2.0


@click.command(
    "coordinator",
    cls=Verb,
    short_help="Checkpoint, restore and move groups of pods for schedulers and people.",
    status=(exits.REFUSED, exits.ENVIRONMENT),
    example="ckpt-agent coordinator --parallel 8",
)
@click.option("--tls-dir", metavar="DIR", help="Holds tls.crt, tls.key and ca.crt.")
@click.option("--token-port", metavar="PORT", help="Port for callers with a token.")
@click.option("--certificate-port", metavar="PORT", help="Port for callers with a certificate.")
@click.option("--probe-port", metavar="PORT", help="Port for the kubelet's probes.")
@click.option("--parallel", type=click.IntRange(min=1), help="Operations at once.")
@click.option(
    "--operation-deadline",
    type=arguments.span_s,
    metavar="SPAN",
    help="How long operations may take whose callers do not say.",
)
@click.option(
    "--shutdown-grace",
    type=arguments.span_s,
    metavar="SPAN",
    help="How long operations may take to give up.",
)
@pass_invocation
def verb(
    invocation: Invocation,
    tls_dir: str | None,
    token_port: str | None,
    certificate_port: str | None,
    probe_port: str | None,
    parallel: int | None,
    operation_deadline: float | None,
    shutdown_grace: float | None,
) -> None:
    """Serve the coordinator's gRPC API until asked to stop.

    Runs in pods of the Deployment ckpt-agent-coordinator. One of them serves at a time; when it
    ends, another goes on with its operations.
    """
    settings = invocation.settings(
        tls_dir=tls_dir,
        coordinator_token_port=token_port,
        coordinator_certificate_port=certificate_port,
        probe_port=probe_port,
        coordinator_parallel=parallel,
        operation_deadline=operation_deadline,
        shutdown_grace=shutdown_grace,
    )
    level = logging.WARNING if invocation.quiet else logging.INFO
    stop = threading.Event()
    try:
        with nativelog.serving(level), interrupts.caught(lambda number: stop.set()):
            services.coordinator(settings, stop)
    except errors.CkptError as exc:
        # Python waits for the threads of calls that wait for somebody else, for minutes perhaps:
        # another replica leads, and this one is to be started anew.
        last = threading.Timer(_LAST_S, os._exit, (exc.exit_status,))
        last.daemon = True
        last.start()
        raise
