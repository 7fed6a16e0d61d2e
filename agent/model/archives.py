"""Checkpoint archives as values: whose they are, and what became of an image in one.

Promises: values only.
Does not: know the format of archives.
"""

from __future__ import annotations

import dataclasses


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
class Exported:
    """An archive that was written. ``left_out`` are files of the image that it has no place for."""

    size_bytes: int
    left_out: tuple[str, ...]
