"""Images out of a store and into it, as files that other programs know.

Promises: an archive is written beside its name and gets the name when it is whole; an import that
fails leaves nothing in the store.
Does not: know the format of archives; the caller gives what does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Protocol

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.archives import Exported, Whose
from agent.model.streams import MemberSink, MemberSource
from agent.store.repository import EpochSummary, Store


@dataclasses.dataclass(frozen=True)
class Written:
    """An archive that was written, of which member of which image."""

    image: str
    member: str
    path: str
    exported: Exported


Writer = Callable[[MemberSource, Whose, BinaryIO], Exported]


class Archive(Protocol):
    """An archive that was opened and found to be one."""

    def whose(self) -> Whose:
        """What it says of itself."""

    def take_in(self, sink: MemberSink) -> None:
        """Give all of it to ``sink``; raises ``errors.Corrupt``."""


def export(store: Store, image: str, member: str | None, path: str, write: Writer) -> Written:
    """Write one member of ``image`` to the file ``path``; ``member`` may be None if there is only
    one.

    Raises:
        errors.NotFound: no such image or member.
        errors.InvalidInput: there are several members and none was named, or no place for a file.
        errors.Corrupt | errors.Missing: the image is damaged; no file was made.
    """
    group, epoch = store.resolve(image)
    reader = store.read(group, epoch)
    if member is None and len(reader.members) > 1:
        raise errors.InvalidInput(
            f"{image} has the members {', '.join(reader.members)}",
            hint="an archive holds one container: name it with --member",
        )
    name = reader.members[0] if member is None else ids.member_name(member)
    source = reader.member(name)
    source.check()
    whose = Whose(str(reader.facts.get("namespace") or ""), group, name, reader.summary.created_s)
    with _beside(path) as out:
        exported = write(source, whose, out)
    return Written(ids.image_name(group, epoch), name, path, exported)


def take_in(store: Store, archive: Archive, group: str | None) -> EpochSummary:
    """Store ``archive`` as a new epoch of ``group``, by default named after its pod.

    Raises:
        errors.InvalidInput: it names no pod that could name a group.
        errors.Corrupt: it cannot be used; nothing was stored.
        errors.VolumeError: likewise.
    """
    whose = archive.whose()
    name = ids.group_name(group or whose.pod or whose.container)
    facts: dict[str, Any] = {"engine": "import", "stop": False}
    if whose.namespace:
        facts["namespace"] = whose.namespace
    with store.begin(name, now_s=clock.wall_s()) as writer:
        archive.take_in(writer.member(ids.member_name(whose.container or "container")))
        return writer.commit(facts)


@contextlib.contextmanager
def _beside(path: str) -> Iterator[BinaryIO]:
    """A file that gets the name ``path`` when the context is left without an error."""
    unfinished = f"{path}.{secrets.token_hex(4)}.unfinished"
    try:
        # Whoever can read an image can read the secrets in its memory.
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise _unwritable(path, exc) from exc
    try:
        with open(fd, "wb", buffering=1 << 20) as out:
            yield out
            out.flush()
            os.fsync(fd)
        os.rename(unfinished, path)
    except OSError as exc:
        raise _unwritable(path, exc) from exc
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


def _unwritable(path: str, exc: OSError) -> errors.InvalidInput:
    return errors.InvalidInput(
        f"cannot write {path}: {exc.strerror}",
        hint="name a file in a directory with room that you may write to",
        path=path,
    )
