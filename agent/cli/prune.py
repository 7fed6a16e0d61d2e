"""``ckpt-agent prune``: remove old images by rule."""

from __future__ import annotations

import click

from agent import wiring
from agent.cli import arguments, documents, exits, output
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.host import clock
from agent.model import ids
from agent.store.retention import Retention


@click.command(
    "prune",
    cls=Verb,
    short_help="Remove old images by rule.",
    status=(exits.REFUSED, exits.FAILED, exits.DATA, exits.VOLUME, exits.PIPE_CLOSED),
    example="ckpt-agent prune --keep-last 3 --keep-within 7d --dry-run",
)
@click.option("--keep-last", type=click.IntRange(min=1), help="Keep this many of each group.")
@click.option(
    "--keep-within", type=arguments.span_s, metavar="SPAN", help="Keep what is younger, such as 7d."
)
@click.option("--group", help="Prune only this group.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@arguments.storage
@pass_invocation
def verb(
    invocation: Invocation,
    keep_last: int | None,
    keep_within: float | None,
    group: str | None,
    dry_run: bool,
    storage: str,
) -> int:
    """Remove the images that no rule keeps, and the space that only they used.

    An image stays if either rule keeps it. Without a rule, here or in the configuration, nothing
    is removed. Dumps may run at the same time. In a cluster with several storages the images of
    each are counted by themselves.
    """
    settings = invocation.settings(keep_last=keep_last, keep_within=keep_within)
    if settings.keep_last is None and settings.keep_within_s is None:
        raise click.UsageError("say what to keep: --keep-last N, --keep-within SPAN, or both")
    if invocation.in_cluster(settings):
        from agent.cli import incluster

        return incluster.prune(invocation, settings, group, storage, dry_run=dry_run)
    arguments.refuse({"--storage": storage}, arguments.OF_A_CLUSTER)
    report = wiring.store(settings).prune(
        Retention(keep_last=settings.keep_last, keep_within_s=settings.keep_within_s),
        group=ids.group_name(group) if group else None,
        now_s=clock.wall_s(),
        dry_run=dry_run,
    )
    document = documents.prune_report(str(settings.store), report, dry_run=dry_run)
    for reason in report.blocked:
        invocation.say(f"no space was freed: {reason}")
    invocation.say(
        f"{'would free' if dry_run else 'freed'} {output.human_bytes(report.freed_bytes)};"
        f" images kept: {len(report.kept)}"
    )
    invocation.emit(document)
    return exits.DONE
