"""What a dump asks of where the tree lives: ``hosttree.HostTree`` answers for trees of this host,
the ``container`` engine for those inside a container.

Promises: the order of the calls is that of a dump (``dump``); everything is called in its thread
but ``gather`` and ``memory_flows``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from agent.engines.base import CaptureOptions
from agent.engines.criu import facts, journal, rpc
from agent.engines.criu.probe import Criu
from agent.host import proc
from agent.model.streams import MemberSink


class Subject(Protocol):
    """The tree that is dumped, and how CRIU reaches it. Processes are named by their numbers on
    this host, ``tree`` root first. ``ends_with_root``: whatever runs where CRIU runs is killed by
    the kernel when the root has ended.
    """

    tree: Sequence[proc.Identity]
    ends_with_root: bool
    criu: Criu

    @property
    def criu_kills(self) -> bool:
        """Whether CRIU is to kill a tree that is to stop; else the subject itself sees to it."""

    def entry(self) -> journal.About:
        """What the journal is to say of the operation besides the tree."""

    def started(
        self, images: str, pass_fds: Sequence[int], under: Sequence[str] = ()
    ) -> AbstractContextManager[tuple[rpc.Worker, str]]:
        """Start CRIU by the program ``under``, ready for one request; gives its name for the folder
        ``images`` as well.
        """

    def configure(self, opts: rpc.Request) -> None:
        """Set the options of a dump that depend on where the tree lives, ``pid`` among them."""

    def about_to_freeze(self, operation: journal.Operation) -> None:
        """CRIU is going to stop the tree; it still runs."""

    def frozen(self, pids: Sequence[int], operation: journal.Operation) -> None:
        """The tree, now ``pids``, stands still and nothing has been read; may raise."""

    def let_through(self) -> None:
        """Hold no connection any more: the tree has been read, and runs next."""

    def memory_flows(self, operation: journal.Operation) -> None:
        """The first pages arrive."""

    def gather(
        self, pids: Sequence[int], states: Mapping[int, str], maps: facts.Maps
    ) -> dict[str, Any]:
        """The facts of the tree, from /proc and, its mappings, from ``maps``; called in a thread
        while memory is streamed.
        """

    def collect(
        self, images: str, pids: Sequence[int], options: CaptureOptions, sink: MemberSink
    ) -> dict[str, Any]:
        """Store what travels besides memory and CRIU's images; more facts. May raise."""

    def about_to_stop(self) -> bool:
        """The epoch is committed, and CRIU is going to kill the tree or to let go of it; whether
        it ends, or only never runs on.
        """

    def killed(
        self, places: journal.Places, operation: journal.Operation, known: dict[str, Any]
    ) -> None:
        """The tree is gone, after a commit."""
