"""``ckpt-agent doctor``: whether this host can dump and restore."""

from __future__ import annotations

import os

import click

from agent import wiring
from agent.cli import documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation


@click.command(
    "doctor",
    cls=Verb,
    short_help="Check whether this host can dump and restore.",
    status=(exits.REFUSED, exits.ENVIRONMENT, exits.PIPE_CLOSED),
    example="ckpt-agent doctor -o json | jq '.checks[] | select(.status != \"ok\")'",
)
@pass_invocation
def verb(invocation: Invocation) -> int:
    """Check CRIU, kernel, privileges, space, store and leftovers.

    Each line is ok, degraded (something does not work, or slower) or missing (dumps or restores
    cannot work), with the consequence and the cure. Nothing is changed. In a cluster (-n,
    --context, --kubeconfig) the lines are the API server, the caller's rights, and each node's.
    """
    settings = invocation.settings()
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        return incluster.doctor(invocation, settings)
    checks = wiring.doctor(settings)
    document = documents.doctor_report(os.uname().nodename, checks)
    invocation.emit(document)
    return exits.ENVIRONMENT if document["status"] == "missing" else exits.DONE
