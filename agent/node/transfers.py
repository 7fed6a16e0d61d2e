"""Archives of images to callers of the node API and from them.

Promises: memory is bounded whatever the archive's size, and the room on the node's disk is the
archive's announced size; a caller who sends or reads too slowly is given up; transfers are limited
among themselves, so that slow callers keep no dump or restore waiting; an archive is only looked at
when all of it is here.
Does not: know gRPC, or ask who the caller is.
"""

from __future__ import annotations

from collections.abc import Iterator

from agent import errors
from agent.host import clock, spool
from agent.model import ids
from agent.node import archives
from agent.node.dump import Cancel
from agent.node.operations import Operations
from agent.node.storages import Found, Storages
from agent.rpc.calls import Call
from agent.rpc.v1 import node_pb2 as api
from agent.settings import Settings
from agent.store.repository import EpochSummary

# A terabyte at 100 MB/s.
_EXPORT_S = 3 * 3600.0
# Whoever sends an archive has this long, and a second a MiB: an uplink of 10 Mbit/s.
_UPLOAD_S = 60.0
_UPLOAD_BYTES_PER_S = 1 << 20
# Large against what a message costs, small against the memory that 24 callers may have in flight.
_PIECE_BYTES = 256 << 10


class Transfers:
    """The archives of an agent: as many on their way at once as it does dumps and restores;
    ``operations`` is what those that are here compete with.
    """

    def __init__(
        self, formats: archives.Formats, settings: Settings, operations: Operations
    ) -> None:
        self._formats = formats
        self._settings = settings
        self._moving = Operations(settings.parallel)
        self._operations = operations

    def export(self, found: Found, member: str, call: Call) -> Iterator[api.ExportImageEvent]:
        """The archive of an image's member.

        Raises:
            errors.NotFound | errors.InvalidInput: there is no such member, or none was named.
            errors.Overloaded: too many archives are on their way.
            errors.Corrupt | errors.Missing | errors.VolumeError: the image cannot be read.
        """
        cancel = Cancel("the archive was not read to its end")
        with (
            self._moving.begin("export", f"image {found.image}", [], cancel),
            call.ending_after(call.allowed_s(0.0, _EXPORT_S)),
            archives.exporting(
                found.store, found.image, member or None, self._formats.archived
            ) as made,
        ):
            about = made.about
            begun = api.ExportBegun(
                image=about.image,
                member=about.member,
                machine=about.machine,
                expected_bytes=about.expected_bytes,
                restorable=about.restorable,
            )
            yield api.ExportImageEvent(begun=begun)
            for piece in _even(made.pieces()):
                cancel.check()
                yield api.ExportImageEvent(content=piece)
            outcome = api.ExportOutcome(
                size_bytes=made.exported.size_bytes, left_out=made.exported.left_out
            )
            yield api.ExportImageEvent(outcome=outcome)

    def take_in(
        self,
        first: api.ImportImageRequest,
        more: Iterator[api.ImportImageRequest],
        storages: Storages,
        call: Call,
    ) -> tuple[EpochSummary, str]:
        """Store the archive that comes in ``more``; return its image and the name of its storage.

        Raises:
            errors.InvalidInput: the request does not fit what comes, or names no group.
            errors.Overloaded: too many archives are on their way, or too much is being done.
            errors.EnvironmentUnfit: the node has no room for it.
            errors.Corrupt: it cannot be used; nothing was stored.
            errors.VolumeError: likewise.
        """
        namespace = ids.namespace_name(first.namespace)
        group = ids.group_name(first.group) if first.group else None
        if first.size_bytes <= 0 or first.content:
            raise errors.InvalidInput(
                "the first message of an import has to say how long the archive is",
                hint="set size_bytes, and send the content in the messages after it",
            )
        name = storages.for_namespace(namespace, first.storage)
        cancel = Cancel("the archive was not stored: nobody waits for it")
        call.on_gone(cancel.set)
        what = f"an archive of {first.size_bytes >> 20} MiB for {namespace}"
        with self._moving.begin("import", what, [], cancel):
            patience_s = _UPLOAD_S + first.size_bytes / _UPLOAD_BYTES_PER_S
            until = clock.Deadline.after(call.allowed_s(0.0, patience_s))

            def pieces() -> Iterator[bytes]:
                for message in more:
                    cancel.check()
                    until.check("the import")
                    yield message.content

            with (
                call.ending_after(until.remaining_s) as came,
                spool.spooled(
                    self._settings.work_dir,
                    first.size_bytes,
                    pieces(),
                    kept_free_percent=self._settings.work_kept_free_percent,
                ) as fd,
            ):
                came()
                archive = self._formats.opened(fd)
                image = str(archives.group_of(archive.whose(), group))
                with self._operations.begin("import", f"image {namespace}/{image}", [], cancel):
                    store = storages.make(namespace, name)
                    summary = archives.take_in(store, archive, group, cancel.check)
        return summary, name


def _even(pieces: Iterator[bytes | memoryview]) -> Iterator[bytes]:
    """The same bytes in pieces of one size, but for the last."""
    gathered = bytearray()
    for piece in pieces:
        view = memoryview(piece)
        while view:
            room = _PIECE_BYTES - len(gathered)
            gathered += view[:room]
            view = view[room:]
            if len(gathered) == _PIECE_BYTES:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)
