"""Images out of a store and into it, as archives that other programs know.

Promises: an archive says whose it is before its first piece; an import that fails leaves nothing in
the store.
Does not: know the format of archives (the caller gives what does), or where they come from and go
to.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.archives import Exported, Exporting, Outgoing, Whose
from agent.model.streams import MemberSink, MemberSource
from agent.store.repository import EpochReader, EpochSummary, Store

# What an image says of its engine that came as an archive, from whoever it was.
IMPORTED = "import"

Archived = Callable[[MemberSource, Whose], Outgoing]


class Archive(Protocol):
    """An archive that was opened and found to be one."""

    def whose(self) -> Whose:
        """What it says of itself."""

    def take_in(self, sink: MemberSink, check: Callable[[], None]) -> None:
        """Give all of it to ``sink``, calling ``check`` often, which gives up by raising; raises
        ``errors.Corrupt``.
        """


@dataclasses.dataclass(frozen=True)
class Formats:
    """What knows archives: how a member becomes one, and how one is opened that an open descriptor
    holds.
    """

    archived: Archived
    opened: Callable[[int], Archive]


@contextlib.contextmanager
def exporting(store: Store, image: str, member: str | None, archived: Archived) -> Iterator[Export]:
    """One member of ``image``; ``member`` may be None if there is only one. While the context lasts
    the image is not deleted, if the volume takes a note of that.

    Raises:
        errors.NotFound: no such image or member.
        errors.InvalidInput: there are several members and none was named.
        errors.Corrupt | errors.Missing: the image is damaged.
    """
    group, epoch = store.resolve(image)
    reader = store.read(group, epoch)
    with store.hold(reader):
        yield Export(reader, image, member, archived)


class Export:
    """One member of the image that ``reader`` reads; made by ``exporting``."""

    def __init__(
        self, reader: EpochReader, image: str, member: str | None, archived: Archived
    ) -> None:
        if member is None and len(reader.members) > 1:
            raise errors.InvalidInput(
                f"{image} has the members {', '.join(reader.members)}",
                hint="an archive holds one container: name it with --member",
            )
        name = reader.members[0] if member is None else ids.member_name(member)
        source = reader.member(name)
        namespace = str(reader.facts.get("namespace") or "")
        found = reader.summary
        whose = Whose(namespace, found.group, name, found.created_s)
        self._outgoing = archived(source, whose)
        self.about = Exporting(
            image=ids.image_name(found.group, found.epoch),
            member=name,
            machine=str(source.facts().get("machine") or ""),
            expected_bytes=self._outgoing.expected_bytes,
            restorable=self._outgoing.restorable,
        )
        self._written_bytes = 0

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The archive; see ``model.archives.Outgoing``."""
        for piece in self._outgoing.pieces():
            self._written_bytes += len(piece)
            yield piece

    @property
    def exported(self) -> Exported:
        """What became of it, once all pieces were taken."""
        return Exported(self._written_bytes, self._outgoing.left_out)


def take_in(
    store: Store, archive: Archive, group: str | None, check: Callable[[], None] = lambda: None
) -> EpochSummary:
    """Store ``archive`` as a new epoch of ``group``, by default named after its pod; ``check`` is
    called often and gives up by raising.

    Raises:
        errors.InvalidInput: it names no pod that could name a group.
        errors.Corrupt: it cannot be used; nothing was stored.
        errors.VolumeError: likewise.
    """
    whose = archive.whose()
    name = group_of(whose, group)
    facts: dict[str, Any] = {"engine": IMPORTED, "stop": False}
    if whose.namespace:
        facts["namespace"] = whose.namespace
    with store.begin(name, now_s=clock.wall_s()) as writer:
        archive.take_in(writer.member(ids.member_name(whose.container or "container")), check)
        check()
        return writer.commit(facts)


def group_of(whose: Whose, group: str | None) -> ids.GroupName:
    """The group that an archive becomes an image of.

    Raises:
        errors.InvalidInput: it has no name that could name a group, and none was given.
    """
    return ids.group_name(group or whose.pod or whose.container)
