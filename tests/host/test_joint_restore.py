"""A group of pods comes back at one instant in other pods with other addresses, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.boxes import Boxes
from tests.host.groups import PROGRAM, Group, Member, group_in
from tests.host.test_container_network import OUTSIDE, echo

__all__ = ["echo"]


@pytest.fixture
def group(boxes: Boxes, tmp_path: Path) -> Iterator[Group]:
    with group_in(boxes, tmp_path) as made:
        yield made


def talking(group: Group, port: int) -> list[Member]:
    """Two pods with a stream of numbers between them; the first also talks to somebody else."""
    run = ("python3", "-c", PROGRAM)
    members = [
        group.add("w-0-0", "a", "10.77.0.2", *run, "serve", "10.77.0.2", OUTSIDE, str(port)),
        group.add("w-0-1", "b", "10.77.0.3", *run, "send", "10.77.0.2"),
    ]
    for each in members:
        each.flows()
    return members


def test_a_stream_between_pods_goes_on_at_other_addresses(group: Group, echo: int) -> None:
    old = talking(group, echo)
    epoch = group.dump(old).image.epoch
    new = [group.add("w-0-0", "b", "10.77.0.4"), group.add("w-0-1", "a", "10.77.0.5")]
    moved = {"10.77.0.2": "10.77.0.4", "10.77.0.3": "10.77.0.5"}
    done = group.restore(epoch, new, moved)
    assert done.lost == {"w-0-0": (f"{OUTSIDE}:{echo}",)}
    for before, after in zip(old, new, strict=True):
        after.flows(10)
        assert after.lines[0]["got"] > before.lines[-1]["got"]
        assert all("got" in line for line in after.lines)
