"""What an agent's calls give, as plain values.

Promises: sizes in bytes, times in seconds; nothing of gRPC's messages is in them.
Does not: call anybody.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from agent import errors
from agent.model.pods import Placement
from agent.rpc import convert
from agent.rpc.v1 import node_pb2


@dataclasses.dataclass(frozen=True)
class Image:
    """One image as a listing shows it; sizes in bytes. ``storage`` is where it lies, by name."""

    group: str
    epoch: str
    created_s: float
    members: tuple[str, ...]
    raw_bytes: int
    new_bytes: int
    stored_bytes: int
    pages: int
    zero_pages: int
    damage: str | None
    storage: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """Images, and the storages that could not be looked at, with why: some may lie there too."""

    images: list[Image]
    unread: dict[str, str]


@dataclasses.dataclass(frozen=True)
class ImageDetail:
    """One image with its document for people and what a move needs; ``pod_template`` is None if
    it is not of a pod. ``obstacles`` are why it can be restored into no pod at all; ``pods`` is
    where each pod of a group was, by what the group calls it, and ``jobset`` what they were.
    """

    image: Image
    document: dict[str, Any]
    pod_template: dict[str, Any] | None
    pod_uid: str
    node: str
    restored_into: str
    obstacles: tuple[str, ...] = ()
    pods: Mapping[str, Placement] = dataclasses.field(default_factory=dict)
    jobset: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Captured:
    """One container of a dump."""

    name: str
    stop_s: float
    raw_bytes: int
    processes: int


@dataclasses.dataclass(frozen=True)
class DumpOutcome:
    """A committed dump of a pod; ``hook_problems`` are of hooks that gave nothing up."""

    image: Image
    stop_s: float
    durable_s: float
    engine: str
    stopped: bool
    members: tuple[Captured, ...]
    pod_template: dict[str, Any] | None
    hook_problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Watched:
    """How a watch of a pod ended: ``epochs`` were committed, ``failures`` were not, the last of
    them ``last_failed``; ``ended``: the containers are no more.
    """

    epochs: int
    failures: int
    last_failed: errors.CkptError | None
    ended: bool


@dataclasses.dataclass(frozen=True)
class RestoreOutcome:
    """A placeholder that runs the image's processes; seconds from the request. ``was`` and ``now``
    are where they were when the image was taken, and where they are.
    """

    image: Image
    waited_s: float
    verified_s: float
    running_s: float
    was: Placement
    now: Placement
    hook_problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class VerifyOutcome:
    """What reading an image whole found; ``damaged`` are parts and their problems."""

    good: bool
    read_bytes: int
    damaged: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Check:
    """A line of a node's check-up; ``status`` is ok, degraded or missing."""

    name: str
    status: str
    found: str
    consequence: str
    cure: str


def placement(found: node_pb2.Placement) -> Placement:
    """Where a pod's processes run, of its message."""
    return Placement(found.pod, found.pod_uid, found.node, tuple(found.addresses))


def image(found: node_pb2.Image) -> Image:
    """An image of its message."""
    return Image(
        group=found.group,
        epoch=found.epoch,
        created_s=convert.from_timestamp(found.created_at),
        members=tuple(found.members),
        raw_bytes=found.raw_bytes,
        new_bytes=found.new_bytes,
        stored_bytes=found.stored_bytes,
        pages=found.pages,
        zero_pages=found.zero_pages,
        damage=found.damage or None,
        storage=found.storage,
    )
