"""``ckpt-agent diff``: what changed between two images of a group."""

from __future__ import annotations

import click

from agent import errors, wiring
from agent.cli import arguments, documents, exits
from agent.cli.invocation import Invocation, Verb, pass_invocation
from agent.model import ids
from agent.model.ids import EpochId, GroupName
from agent.store.repository import Store


@click.command(
    "diff",
    cls=Verb,
    short_help="Show what changed between two images.",
    status=(exits.REFUSED, exits.DATA, exits.VOLUME, exits.PIPE_CLOSED),
    example="ckpt-agent diff training",
)
@click.argument("image", shell_complete=arguments.complete_image)
@click.argument("newer", required=False, shell_complete=arguments.complete_image)
@pass_invocation
def verb(invocation: Invocation, image: str, newer: str | None) -> None:
    """Show how much of NEWER's memory differs from that of IMAGE, and which files do, by member;
    with one IMAGE, against the one before it. Only page tables are read. The images are of one
    group of a store of this host.
    """
    settings = invocation.settings()
    if invocation.in_cluster(settings):
        raise errors.InvalidInput(
            "diff compares images of a store of this host, not of a cluster",
            hint="show tells how much of an image is new",
        )
    store = wiring.store(settings)
    group, last = store.resolve(newer or image)
    if newer is None:
        first = _before(store, group, last)
    else:
        other, first = store.resolve(image)
        if other != group:
            raise errors.InvalidInput(
                f"{image} and {newer} are of different groups",
                hint="images of one group can be compared",
            )
    invocation.emit(documents.image_diff(store.diff(group, first, last)))


def _before(store: Store, group: GroupName, epoch: EpochId) -> EpochId:
    earlier = [
        each.epoch for each in store.epochs(group) if each.epoch < epoch and each.damage is None
    ]
    if not earlier:
        raise errors.NotFound(
            f"there is no image before {ids.image_name(group, epoch)}",
            hint="name two images",
        )
    return earlier[-1]
