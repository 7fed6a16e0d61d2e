"""A tree of this host as the subject of a dump: CRIU works beside it and sees what it sees.

Promises: what ``subject.Subject`` asks for.
Does not: decide when anything happens; ``dump`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pycriu import rpc_pb2

from agent.engines import ephemeral
from agent.engines.base import CaptureOptions
from agent.engines.criu import facts, journal, links, recovery, rpc
from agent.engines.criu.probe import Criu
from agent.host import netfilter, proc
from agent.model.streams import MemberSink


class HostTree:
    """The tree ``tree``, root first, in the pid and mount namespaces of this program."""

    ends_with_root = False
    criu_kills = True

    def __init__(self, criu: Criu, tree: Sequence[proc.Identity]) -> None:
        self.criu = criu
        self.tree = tree

    def entry(self) -> journal.About:
        """Nothing besides the tree."""
        return journal.About()

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], under: Sequence[str] = ()
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start CRIU."""
        with rpc.worker([*under, self.criu.path], pass_fds=pass_fds) as worker:
            yield worker, images

    def configure(self, opts: rpc.Request) -> None:
        """CRIU locks connections itself; terminals of outside are left outside."""
        opts.pid = self.tree[0].pid
        opts.shell_job = True
        opts.network_lock = rpc_pb2.NFTABLES
        opts.external.extend(sorted(facts.outside_ttys(who.pid for who in self.tree)))

    def about_to_freeze(self, operation: journal.Operation) -> None:
        """Note which tables are others': CRIU makes its own as soon as the tree is frozen."""
        operation.note_tables_before(netfilter.tables(recovery.TABLE_PREFIX))

    def frozen(self, pids: Sequence[int], operation: journal.Operation) -> None:
        """Nothing to do."""

    def let_through(self) -> None:
        """Nothing to do: CRIU lets go of its own lock."""

    def memory_flows(self, operation: journal.Operation) -> None:
        """Note CRIU's table: its code is in a process of the tree, so that it can be told apart
        from another CRIU's.
        """
        if operation.entry.criu is not None:
            operation.note_table(recovery.table_of(operation.entry.criu.pid))

    def gather(self, pids: Sequence[int], states: Mapping[int, str]) -> dict[str, Any]:
        """The facts of the tree."""
        return facts.gather(pids, states, self.criu)

    def collect(
        self, images: str, pids: Sequence[int], options: CaptureOptions, sink: MemberSink
    ) -> dict[str, Any]:
        """Store the ephemeral files."""
        links.collect(images, sink)
        collected = ephemeral.collect(pids, options.include, sink)
        return {"skipped": [list(each) for each in collected.skipped]}

    def about_to_stop(self) -> bool:
        """CRIU ends it."""
        return True

    def killed(
        self, places: journal.Places, operation: journal.Operation, known: dict[str, Any]
    ) -> None:
        """Keep CRIU's lock if peers outside of the tree wait behind it for the restore; without
        it they would be told that the connection is gone.
        """
        recovery.settle_tables(places, operation.entry, keep=bool(_outside_peers(known)))


def _outside_peers(known: dict[str, Any]) -> list[str]:
    """The remote ends of live TCP connections that lead out of the tree."""
    live = facts.connections(known)
    inside = set(live)
    return sorted(remote for local, remote in live if (remote, local) not in inside)
