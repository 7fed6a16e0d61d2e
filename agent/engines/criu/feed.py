"""How an image becomes a tree's memory and files: what CRIU reads from a folder, and what is
poured into the tree once it stands.

Promises: when ``lay_out`` returns, every byte of the image has been read and verified once; where
memory is to come when the tree runs (``deferred``), that and what ``fill`` pours is only known to
be there, and verified when it is read. Memory of this program stays bounded; zero pages take no
disk; what is poured takes none either.
Does not: start anything.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from agent import errors
from agent.engines.criu import early, images, lazy, pour
from agent.model.streams import PAGE_BYTES, AddressSpace, MemberSource, PageRun


class Feed:
    """Lays one image out in ``folder``; with ``pouring``, memory that can be written into the
    standing tree is left out there; with ``defer_bytes`` as well, ``fill`` leaves out what can come
    when the tree runs (``lazy``), if it is as much as that. ``parties`` members share memory.
    """

    def __init__(
        self,
        source: MemberSource,
        known: dict[str, Any],
        folder: str,
        *,
        pouring: bool,
        defer_bytes: int | None = None,
        parties: int = 1,
    ) -> None:
        self._source = source
        self._known = known
        self._folder = folder
        self._pouring = pouring
        self._defer_bytes = defer_bytes if pouring else None
        self._parties = parties
        self._family: dict[int, pour.ProcessMemory] = {}
        self._deferred: dict[AddressSpace, lazy.Deferred] = {}
        self._shares: dict[AddressSpace, pour.Split] = {}
        self._early: early.Early | None = None

    def lay_out(self) -> None:
        """Write all images.

        Raises:
            errors.Corrupt | errors.Missing: the image is damaged.
            errors.RestoreFailed: no room in the folder.
        """
        if self._defer_bytes is not None:
            self._source.present()
        elif self._pouring:
            # Poured pages are read when processes stand already: too late to find damage.
            self._source.check()
        for name, content in self._source.metadata():
            _write_metadata(self._folder, name, content)
        if self._pouring:
            self._shares = self._split()
            if self._deferred:
                self._early = early.Early.of(self._source, self._shares, self._parties)
            elif self._defer_bytes is not None:
                self._source.check()
        stored = set(self._source.spaces())
        for pages_id, space in enumerate(self._spaces(), start=1):
            runs = list(self._source.runs(space)) if space in stored else []
            share = self._shares.get(space)
            if share is not None:
                # What CRIU may find marked so, in its lazy mode it would leave to us.
                runs = [
                    dataclasses.replace(run, flags=run.flags & ~lazy.PAGEMAP_LAZY)
                    for run in share.criu
                ]
            images.write_pagemap(self._folder, space, pages_id, runs)
            images.write_pages(self._folder, space, pages_id, self._source, runs)

    def fill(self, host_pid: Callable[[int], int], check: Callable[[], None]) -> int:
        """Write what was left out into the processes, found by ``host_pid`` from their numbers in
        the image; return the bytes written.

        Raises:
            pour.PourRefused: this kernel does not allow it; without ``pouring`` it works.
            errors.Corrupt | errors.Missing: the image was damaged meanwhile.
        """
        pids = {space: host_pid(space.id) for space in self._shares}
        if self._early is not None:
            found = self._early.take()
            return sum(pour.write(found[space], pids[space], check) for space in found)
        return pour.pour_all(self._source, self._shares, pids, check, self._parties)

    def close(self) -> None:
        """Read no more ahead; safe to repeat."""
        if self._early is not None:
            self._early.close()

    @property
    def deferred(self) -> dict[AddressSpace, lazy.Deferred]:
        """What is to come when the tree runs."""
        return self._deferred

    @property
    def numbers(self) -> list[int]:
        """The processes that have memory, by their numbers in the image."""
        return sorted(self._family)

    def process(self, number: int) -> pour.ProcessMemory:
        """What is known of one of them."""
        return self._family[number]

    def pour_early(self, space: AddressSpace, runs: Sequence[PageRun], pid: int) -> None:
        """Pour these deferred runs of a process after all; raises as ``fill``."""
        if runs:
            pour.pour(self._source, space, pour.Split((), tuple(runs), ()), pid, _nothing)

    def _split(self) -> dict[AddressSpace, pour.Split]:
        self._family = family = images.family(self._folder)
        found = {
            space: pour.split(family[space.id], family, self._source.runs(space))
            for space in self._source.spaces()
            if space.kind == "process" and space.id in family
        }
        if self._defer_bytes is None:
            return found
        shares, later = dict(found), {}
        for space, share in found.items():
            shares[space], deferred = lazy.defer(family[space.id], share)
            if deferred.runs:
                later[space] = deferred
        if sum(each.size_bytes for each in later.values()) < self._defer_bytes:
            return found
        self._deferred = later
        return shares

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


def _nothing() -> None:
    """Nobody looks after so few pages."""


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
