"""Who must be cut together on one host, decided from who is connected with whom.

Promises: pure. The answer holds the named trees and those that they cannot be cut without, and no
other; each of its connections is inside, joins two members, or is named in ``leaving`` with the
reason. It does not depend on the order in which connections are given.
Does not: read anything, or see a connection that is made later.

Two kinds of connection: each end of a TCP connection may be in a member of its own. A unix stream,
or a socket that several processes hold, is one object that cannot be captured in halves: both sides
must be in *one* tree, the smallest that holds them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from agent import errors

# Each member has a CRIU and a thread of its own; more than this is a mistake rather than a job.
MEMBERS_MAX = 64
CURE = "dump from a root that holds both, or let the job close it before the dump"


@dataclasses.dataclass(frozen=True)
class Party:
    """A process that might take part. ``group`` is its process group; ``terminal``: it leads the
    session of a terminal, as a shell does; ``refused``: why it is never followed, "" if it may be.
    """

    pid: int
    parent: int
    group: int
    program: str
    terminal: bool = False
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection that some process holds. ``holders`` have this end of it, ``others`` the far
    one; ``whole``: it cannot be captured in halves.
    """

    name: str
    holders: frozenset[int]
    others: frozenset[int]
    whole: bool = False


@dataclasses.dataclass(frozen=True)
class Pulled:
    """A member: the root of its tree, and the connection that brought it in, "" if it was named."""

    root: int
    program: str
    because: str


@dataclasses.dataclass(frozen=True)
class Leaving:
    """A connection out of the set; ``blocks``: nothing can be captured because of it."""

    link: str
    pid: int
    program: str
    reason: str
    blocks: bool


@dataclasses.dataclass(frozen=True)
class Closure:
    """The whole answer; members in the order in which they were found, the named ones first."""

    members: tuple[Pulled, ...]
    leaving: tuple[Leaving, ...]

    @property
    def roots(self) -> tuple[int, ...]:
        """The roots of the trees to cut."""
        return tuple(each.root for each in self.members)

    def check(self) -> None:
        """Raise ``errors.TargetUnsuitable`` if a connection of it cannot be captured."""
        blocking = [each for each in self.leaving if each.blocks]
        if blocking:
            first = blocking[0]
            raise errors.TargetUnsuitable(
                f"process {first.pid} ({first.program}) has the {first.link}: {first.reason}",
                hint=CURE,
                pid=first.pid,
                connections=[each.link for each in blocking],
            )


def close(
    named: Iterable[int],
    parties: Mapping[int, Party],
    links: Iterable[Link],
    *,
    members_max: int = MEMBERS_MAX,
) -> Closure:
    """Follow the connections of the trees below ``named``, which are among ``parties``.

    Raises:
        errors.TargetUnsuitable: more than ``members_max`` trees would have to be cut.
    """
    found = _Search(parties, links)
    for pid in dict.fromkeys(named):
        found.cover(pid, "")
    found.run()
    members = found.members()
    if len(members) > members_max:
        raise errors.TargetUnsuitable(
            f"{len(members)} process trees are connected with each other, and at most"
            f" {members_max} are followed",
            hint="look at their connections one by one with plan --pid PID --follow, and name the"
            " trees to cut with --pid, without --follow",
            trees=len(members),
        )
    return Closure(members, tuple(found.leaving()))


class _Search:
    """Which trees are needed. Trees are joined as far as they must be before the next ones are
    taken in, and those all at once: so the order of connections does not matter.
    """

    def __init__(self, parties: Mapping[int, Party], links: Iterable[Link]) -> None:
        self._parties = parties
        self._children: dict[int, list[int]] = {}
        for pid in sorted(parties):
            self._children.setdefault(parties[pid].parent, []).append(pid)
        self._links: dict[int, list[Link]] = {}
        for link in sorted(links, key=lambda one: (one.name, sorted(one.holders))):
            for pid in link.holders:
                self._links.setdefault(pid, []).append(link)
        self._covered: dict[int, None] = {}
        self._todo: list[int] = []
        self._because: dict[int, str] = {}

    def cover(self, root: int, because: str) -> None:
        """Take the tree below ``root`` in."""
        if root in self._covered:
            return
        self._because[root] = because
        below = [root]
        while below:
            pid = below.pop()
            below.extend(self._children.get(pid, ()))
            if pid not in self._covered:
                self._covered[pid] = None
                self._todo.append(pid)

    def run(self) -> None:
        """Until nothing more is needed."""
        while True:
            self._join()
            wanted = list(self._next())
            if not wanted:
                return
            for root, because in wanted:
                self.cover(root, because)

    def _join(self) -> None:
        """Put both sides of what cannot be captured in halves into one tree, where that may be."""
        while self._todo:
            pid = self._todo.pop()
            for link in self._links.get(pid, ()):
                for other in sorted(link.others) if link.whole else ():
                    root = 0 if self._parties[other].refused else self._joint(pid, other)
                    if root:
                        self.cover(root, link.name)

    def _next(self) -> Iterator[tuple[int, str]]:
        """The trees at the far ends of all other connections, with one that leads there."""
        for pid in self._covered:
            for link in self._links.get(pid, ()):
                for other in sorted(link.others) if not link.whole else ():
                    if other not in self._covered and not self._parties[other].refused:
                        yield self._home(other), link.name

    def members(self) -> tuple[Pulled, ...]:
        """The trees that no other one holds."""
        return tuple(
            Pulled(root, self._parties[root].program, because)
            for root, because in self._because.items()
            if self._parties[root].parent not in self._covered
        )

    def leaving(self) -> Iterator[Leaving]:
        """The connections that are neither inside nor between two members."""
        seen = set()
        for pid in sorted(self._covered):
            for link in self._links.get(pid, ()):
                for each in self._leaving(pid, link):
                    if (each.link, each.reason) not in seen:
                        seen.add((each.link, each.reason))
                        yield each

    def _leaving(self, pid: int, link: Link) -> Iterator[Leaving]:
        program = self._parties[pid].program
        if not link.others:
            reason = "no process that can be seen here holds its other end"
            yield Leaving(link.name, pid, program, reason, blocks=False)
        for other in sorted(link.others):
            together = self._tree(pid) == self._tree(other)
            if together or (other in self._covered and not link.whole):
                continue
            who = f"process {other} ({self._parties[other].program})"
            reason = f"{who} has its other end and {self._parties[other].refused}"
            if not self._parties[other].refused:
                reason = f"{who} has its other end, and no tree that could be cut holds both"
            yield Leaving(link.name, pid, program, reason, blocks=link.whole)

    def _home(self, pid: int) -> int:
        """The topmost ancestor in the same process group without a gap: the job, as a shell or a
        service manager started it.
        """
        group = self._parties[pid].group
        while self._may_lead(parent := self._parties[pid].parent):
            if self._parties[parent].group != group:
                break
            pid = parent
        return pid

    def _joint(self, pid: int, other: int) -> int:
        """The root of the smallest tree that holds both; 0 if that may not be cut."""
        line = set(self._line(pid))
        for root in self._line(other):
            if root in line:
                return root if root in (pid, other) or self._may_lead(root) else 0
        return 0

    def _line(self, pid: int) -> Iterator[int]:
        """A process and its ancestors, nearest first."""
        while pid in self._parties:
            yield pid
            pid = self._parties[pid].parent

    def _may_lead(self, pid: int) -> bool:
        """Whether a process may come in for the sake of what is below it."""
        party = self._parties.get(pid)
        return party is not None and not party.refused and not party.terminal

    def _tree(self, pid: int) -> int:
        """The root of the member that a process is in; itself if it is in none."""
        while pid in self._covered and self._parties[pid].parent in self._covered:
            pid = self._parties[pid].parent
        return pid
