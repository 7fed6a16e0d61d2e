"""Checkpoint archives as values: whose they are, and what became of an image in one.

Promises: values only.
Does not: know the format of archives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Whose:
    """The container that an image is of, and when it was captured (seconds since 1970); unknown
    names are "".
    """

    namespace: str
    pod: str
    container: str
    created_s: float


@dataclasses.dataclass(frozen=True)
class Exporting:
    """An archive that is about to be written: of which member of which image, on which machine
    (``uname -m``; "" if the image does not tell) it ran, about how long it will be, and whether a
    container runtime can restore it.
    """

    image: str
    member: str
    machine: str
    expected_bytes: int
    restorable: bool


@dataclasses.dataclass(frozen=True)
class Exported:
    """An archive that was made. ``left_out`` are files of the image that it has no place for."""

    size_bytes: int
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Written:
    """An archive that is a file now; ``size_bytes`` are the file's, and ``reference`` is the name
    that it has as an image of a container registry, if it is one.
    """

    image: str
    member: str
    path: str
    size_bytes: int
    left_out: tuple[str, ...]
    reference: str | None = None


class Outgoing(Protocol):
    """The archive of a member."""

    expected_bytes: int
    left_out: tuple[str, ...]
    restorable: bool

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The archive from its beginning to its end; a piece is good until the next is asked for.

        Raises:
            errors.Corrupt | errors.Missing: the image is damaged.
        """
