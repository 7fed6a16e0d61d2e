"""Images of a cluster as files here, and files as images there.

Promises: a file stands under its name when it is whole, wherever it broke off before.
Does not: check what is in an archive; the agent does, and trusts nobody.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import BinaryIO, Protocol

from agent.cluster.session import Session
from agent.host import archivefile
from agent.model.archives import Exporting, Written
from agent.rpc import client, results

Progress = Callable[[int, int], None]


class File(Protocol):
    """A file that was found to be an archive."""

    size_bytes: int

    def content(self) -> BinaryIO:
        """All of it, from its beginning."""


def export(
    session: Session,
    image: str,
    member: str | None,
    wanted: archivefile.Wanted,
    *,
    storage: str = "",
    cancel: threading.Event,
    progress: Progress,
) -> Written:
    """Write a member of ``image`` to a file; ``progress`` gets bytes done and about how many in
    all.

    Raises:
        errors.InvalidInput: no file can be written there, or there are several members.
        errors.CkptError: what the agent raised.
    """

    def ask(agent: client.Agent) -> Written:
        with archivefile.writing(wanted) as file:
            done_bytes, total_bytes = 0, 0

            def begun(about: Exporting) -> None:
                nonlocal total_bytes
                total_bytes = about.expected_bytes
                file.begin(about)

            def content(piece: bytes) -> None:
                nonlocal done_bytes
                file.add(piece)
                done_bytes += len(piece)
                progress(done_bytes, max(done_bytes, total_bytes))

            exported = agent.export(
                session.namespace,
                image,
                member or "",
                storage=storage,
                begun=begun,
                content=content,
                cancel=cancel,
            )
            return file.finish(exported)

    return session.any_agent(ask)


def take_in(
    session: Session,
    archive: File,
    group: str | None,
    *,
    storage: str = "",
    cancel: threading.Event,
    progress: Progress,
) -> results.Image:
    """Store ``archive`` as an image; ``progress`` gets bytes sent and in all. Raises what the agent
    raised.
    """

    def ask(agent: client.Agent) -> results.Image:
        return agent.take_in(
            session.namespace,
            archive.content(),
            archive.size_bytes,
            group=group or "",
            storage=storage,
            cancel=cancel,
            progress=lambda sent_bytes: progress(sent_bytes, archive.size_bytes),
        )

    return session.any_agent(ask)
