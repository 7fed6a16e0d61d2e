"""A checkpoint archive that comes piece by piece becomes a file of one of the known forms.

Promises: the file stands under its name when it is whole and closed, and not before.
Does not: know where the pieces come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal

from agent import errors
from agent.host import newfile, ociimage
from agent.model.archives import Exported, Exporting, Written

Form = Literal["archive", "oci"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A file: its path, its form, and what an image in it is called (None: after the group)."""

    path: str
    form: Form = "archive"
    reference: str | None = None


class ArchiveFile:
    """A file that is being written."""

    def __init__(self, wanted: Wanted, out: BinaryIO) -> None:
        self._wanted = wanted
        self._out = out
        self._image: ociimage.OciImage | None = None
        self._put: Callable[[bytes | memoryview], object] = out.write
        self._written = Written("", "", wanted.path, 0, ())

    def begin(self, about: Exporting) -> None:
        """Say what comes.

        Raises:
            errors.InvalidInput: the form is none for it.
        """
        called = None
        if self._wanted.form == "oci":
            if not about.restorable:
                raise errors.InvalidInput(
                    f"{about.image} is not of a whole container, so no runtime restores it",
                    hint="export it as an archive to look at it; for a runtime, dump the pod with"
                    " --engine kubelet and export that image",
                )
            called = self._wanted.reference or ociimage.reference(about.image, about.member)
            known = ociimage.About(called, about.member, about.machine)
            self._image = ociimage.OciImage(self._out, known)
            self._put = self._image.add
        self._written = dataclasses.replace(
            self._written, image=about.image, member=about.member, reference=called
        )

    def add(self, piece: bytes | memoryview) -> None:
        """The next piece of the archive."""
        self._put(piece)

    def finish(self, exported: Exported) -> Written:
        """All of it has been added."""
        if self._image is not None:
            self._image.finish()
        return dataclasses.replace(
            self._written, size_bytes=self._out.tell(), left_out=exported.left_out
        )


@contextlib.contextmanager
def writing(wanted: Wanted) -> Iterator[ArchiveFile]:
    """The file; raises ``errors.InvalidInput`` if none can be written there."""
    if wanted.reference is not None:
        ociimage.check_reference(wanted.reference)
    with newfile.whole(wanted.path) as out:
        yield ArchiveFile(wanted, out)
