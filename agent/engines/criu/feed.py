"""How an image becomes a tree's memory and files: what CRIU reads from a folder, and what is
poured into the tree once it stands.

Promises: when ``lay_out`` returns, every byte of the image has been read and verified once. Memory
of this program stays bounded; zero pages take no disk; what is poured takes none either.
Does not: start anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from agent import errors
from agent.engines.criu import images, pour
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource


class Feed:
    """Lays one image out in ``folder``; with ``pouring``, memory that can be written into the
    standing tree is left out there.
    """

    def __init__(
        self, source: MemberSource, known: dict[str, Any], folder: str, *, pouring: bool
    ) -> None:
        self._source = source
        self._known = known
        self._folder = folder
        self._pouring = pouring
        self._shares: dict[AddressSpace, pour.Split] = {}

    def lay_out(self) -> None:
        """Write all images.

        Raises:
            errors.Corrupt | errors.Missing: the image is damaged.
            errors.RestoreFailed: no room in the folder.
        """
        if self._pouring:
            # Poured pages are read when processes stand already: too late to find damage.
            self._source.check()
        for name, content in self._source.metadata():
            _write_metadata(self._folder, name, content)
        if self._pouring:
            self._shares = self._split()
        stored = set(self._source.spaces())
        for pages_id, space in enumerate(self._spaces(), start=1):
            runs = list(self._source.runs(space)) if space in stored else []
            share = self._shares.get(space)
            if share is not None:
                runs = list(share.criu)
            images.write_pagemap(self._folder, space, pages_id, runs)
            images.write_pages(self._folder, space, pages_id, self._source, runs)

    def fill(self, host_pid: Callable[[int], int], check: Callable[[], None]) -> int:
        """Write what was left out into the processes, found by ``host_pid`` from their numbers in
        the image; return the bytes written.

        Raises:
            pour.PourRefused: this kernel does not allow it; without ``pouring`` it works.
            errors.Corrupt | errors.Missing: the image was damaged meanwhile.
        """
        return sum(
            pour.pour(self._source, space, share, f"/proc/{host_pid(space.id)}/mem", check)
            for space, share in self._shares.items()
        )

    def _split(self) -> dict[AddressSpace, pour.Split]:
        family = images.family(self._folder)
        return {
            space: pour.split(family[space.id], family, self._source.runs(space))
            for space in self._source.spaces()
            if space.kind == "process" and space.id in family
        }

    def _spaces(self) -> list[AddressSpace]:
        """All address spaces, also those without a page: CRIU wants a page map of each."""
        found = self._source.spaces()
        for kind, number in self._known.get("spaces", []):
            space = AddressSpace(kind, int(number))
            if space not in found:
                found.append(space)
        return found


def memory_bytes(source: MemberSource) -> int:
    """How much memory the tree had, zero pages included."""
    return sum(run.pages for space in source.spaces() for run in source.runs(space)) * PAGE_BYTES


def _write_metadata(folder: str, name: str, content: bytes) -> None:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise errors.Corrupt(f"the image has a file named {name!r}", part=name)
    try:
        fd = os.open(
            os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        with open(fd, "wb") as out:
            out.write(content)
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot write {name} to {folder}: {exc.strerror}",
            hint="free space there, or choose another work directory",
            path=folder,
        ) from exc
