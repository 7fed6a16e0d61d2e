"""A tree of this host as the subject of a dump: CRIU works beside it and sees what it sees.

Connections of a tree that is to run on are held by a table of our own, and only if there are any:
CRIU makes one in any case, and to take it away stops the tree for 10 ms more. Those of a tree that
is to end are locked by CRIU, whose table stays until the restore, and so are those in another
network namespace than this program's, of which CRIU takes care as a whole.

Promises: what ``subject.Subject`` asks for.
Does not: decide when anything happens; ``dump`` does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pycriu import rpc_pb2

from agent import errors
from agent.engines import ephemeral
from agent.engines.base import CaptureOptions
from agent.engines.criu import conflicts, facts, journal, links, recovery, rpc
from agent.engines.criu.probe import Criu
from agent.host import endpoints, hold, netfilter, proc
from agent.model.streams import MemberSink


class HostTree:
    """The tree ``tree``, root first, in the pid and mount namespaces of this program."""

    ends_with_root = False
    criu_kills = True

    def __init__(self, criu: Criu, tree: Sequence[proc.Identity]) -> None:
        self.criu = criu
        self.tree = tree
        self._criu_locks = True
        self._held = contextlib.ExitStack()
        self._hold: hold.Held | None = None

    def entry(self) -> journal.About:
        """Nothing besides the tree."""
        return journal.About()

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], under: Sequence[str] = ()
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start CRIU; when it has let go, so does the hold."""
        with self._held, rpc.worker([*under, self.criu.path], pass_fds=pass_fds) as worker:
            yield worker, images

    def configure(self, opts: rpc.Request) -> None:
        """Terminals of outside are left outside."""
        opts.pid = self.tree[0].pid
        opts.shell_job = True
        self._criu_locks = not (opts.leave_running and self._shares_network())
        opts.network_lock = rpc_pb2.NFTABLES if self._criu_locks else rpc.LOCK_NOTHING
        opts.external.extend(sorted(facts.outside_ttys(who.pid for who in self.tree)))

    def about_to_freeze(self, operation: journal.Operation) -> None:
        """Note which tables are others': CRIU makes its own as soon as the tree is frozen."""
        if self._criu_locks:
            operation.note_tables_before(netfilter.tables(recovery.TABLE_PREFIX))

    def frozen(self, pids: Sequence[int], operation: journal.Operation) -> None:
        """Hold the tree's connections, if CRIU does not."""
        if self._criu_locks:
            return
        live = {each.connection for each in endpoints.of_tree(pids) if each.connection}
        connections = [
            hold.Connection(*conflicts.endpoint(local), *conflicts.endpoint(remote))
            for local, remote in sorted(live)
        ]
        if connections:
            name = recovery.hold_name(operation.entry)
            self._hold = self._held.enter_context(hold.held(name, connections))

    def let_through(self) -> None:
        """Let go of the connections; what is left of the hold goes when CRIU has."""
        if self._hold is not None:
            self._hold.let_through()

    def memory_flows(self, operation: journal.Operation) -> None:
        """Note CRIU's table: its code is in a process of the tree, so that it can be told apart
        from another CRIU's.
        """
        if self._criu_locks and operation.entry.criu is not None:
            operation.note_table(recovery.table_of(operation.entry.criu.pid))

    def gather(
        self, pids: Sequence[int], states: Mapping[int, str], maps: facts.Maps
    ) -> dict[str, Any]:
        """The facts of the tree."""
        return facts.gather(pids, states, self.criu, maps)

    def collect(
        self, images: str, pids: Sequence[int], options: CaptureOptions, sink: MemberSink
    ) -> dict[str, Any]:
        """Store the ephemeral files.

        Raises:
            errors.DeadlineExceeded: what was read of connections may not fit together.
        """
        links.collect(images, sink)
        collected = ephemeral.collect(pids, options.include, sink)
        if self._hold is not None:
            self._hold.check()
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

    def _shares_network(self) -> bool:
        found = {proc.namespaces(os.getpid())["net"]}
        for who in self.tree:
            with contextlib.suppress(errors.NotFound):  # it has ended since
                found.add(proc.namespaces(who.pid)["net"])
        return len(found) == 1


def _outside_peers(known: dict[str, Any]) -> list[str]:
    """The remote ends of live TCP connections that lead out of the tree."""
    live = facts.connections(known)
    inside = set(live)
    return sorted(remote for local, remote in live if (remote, local) not in inside)
