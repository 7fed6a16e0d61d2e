"""A container's processes as the subject of a dump: CRIU works among them, inside the container.

A tree whose root is the first process of its pid namespace is no different: CRIU is in there as
well, and sees no namespace. It only cannot kill that process, which no signal from inside reaches.
Below hold the agent does it, from outside. Where it is the container's own, its end would be the
container's, which the kubelet starts anew: that one is frozen, until somebody deletes the pod.

Connections are held by a table of our own in the pod's network namespace, not by CRIU's: ours is
there only while a live connection is being read, the kernel itself ends it within seconds if
everybody who could remove it has died, and it has the name of the operation, by which recovery
finds it. It is made when the tree stands still, so that it is complete.

Promises: what ``subject.Subject`` asks for; a process of the container that would be missing from
the image fails the dump, and so does a connection that somebody who is cut as well has made, and
that the container has not accepted yet.
Does not: decide when anything happens; ``dump`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent import errors
from agent.engines.base import CaptureOptions
from agent.engines.container import facts, files, holding, inside, mountpoints, target
from agent.engines.container.ahead import Ahead
from agent.engines.container.bundle import Bundle
from agent.engines.criu import conflicts, journal, preflight, recovery, rpc
from agent.engines.criu.facts import Maps
from agent.engines.criu.spool import Spool
from agent.host import cgroups, clock, endpoints, hold, namespaces, proc, sockets, subprocesses
from agent.model import cut
from agent.model.hooks import RELEASE_GPU, TEARDOWN_RDMA
from agent.model.streams import MemberSink


class ContainerTree:
    """The tree of ``found``. ``deadline`` bounds how long connections can be held; ``within`` as in
    ``engines.base.CaptureOptions``.
    """

    # A hold that was not told to stop ends with it, and the pid namespace with hold.
    ends_with_root = True

    @property
    def criu_kills(self) -> bool:
        """Whether the root is one among others."""
        return self._target.inner != self.tree[0]

    def __init__(
        self,
        bundle: Bundle,
        found: target.Target,
        deadline: clock.Deadline,
        within: frozenset[str],
    ) -> None:
        self._bundle = bundle
        self._within = within
        self._target = found
        self._deadline = deadline
        self._held = contextlib.ExitStack()
        self._hold: hold.Held | None = None
        self._spool: Spool | None = None
        self._ahead: dict[str, Ahead] = {}
        self._there: mountpoints.Mounted | None = None
        self.tree: Sequence[proc.Identity] = found.tree
        self.criu = bundle.criu

    def entry(self) -> journal.About:
        """The container: rules are in its network namespace."""
        init = self._target.init
        return journal.About(container=init, network=proc.namespaces(init.pid)["net"])

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], under: Sequence[str] = ()
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start CRIU in the container; when it has let go, so does the hold."""
        with (
            self._held,
            inside.worker(
                self._bundle, self._target.inner, images, pass_fds, under=under
            ) as started,
        ):
            yield started

    def configure(self, opts: rpc.Request) -> None:
        """The root by its number inside; connections are ours to lock."""
        opts.pid = inside.number(self.tree[0].pid)
        opts.network_lock = rpc.LOCK_NOTHING
        # A connection that nobody has accepted yet is not the job's: it is left out of the image.
        opts.tcp_skip_in_flight = True

    def close(self) -> None:
        """Let go of what was read ahead, which the sink may read until now; safe to repeat."""
        if self._spool is not None:
            self._spool.close()

    def about_to_freeze(self, operation: journal.Operation) -> None:
        """Read what of the container's files is not being written to."""
        self._spool = Spool(operation.scratch)
        container, init = self._target.container, self._target.init
        self._ahead = files.look_ahead(container, init, self._spool, self._deadline)

    def frozen(self, pids: Sequence[int], operation: journal.Operation) -> None:
        """Look for processes that came since, and hold the tree's connections.

        Raises:
            errors.DumpFailed: there is one outside of the tree, or one that uses a device still.
            errors.ConnectionUnaccepted: one comes from somebody who stands still as well.
        """
        self._refuse_strays(pids)
        known = list(endpoints.of_tree(pids))
        if self._within:
            _refuse_unaccepted(pids, known, self._within)
        if self._target.container.hooks & {RELEASE_GPU, TEARDOWN_RDMA}:
            self._refuse_devices(pids)
        connections = [
            hold.Connection(*conflicts.endpoint(local), *conflicts.endpoint(remote))
            for local, remote in _live(known)
        ]
        name = recovery.hold_name(operation.entry)
        limit_s = self._deadline.remaining_s
        network = self._held.enter_context(namespaces.opened(self._target.init, "net"))
        self._hold = self._held.enter_context(
            hold.held(name, connections, network=network, limit_s=limit_s)
        )

    def let_through(self) -> None:
        """Let go of the tree's connections; what is left of the hold goes when CRIU has."""
        if self._hold is not None:
            self._hold.let_through()

    def memory_flows(self, operation: journal.Operation) -> None:
        """Nothing to do."""

    def gather(self, pids: Sequence[int], states: Mapping[int, str], maps: Maps) -> dict[str, Any]:
        """The facts of the tree and of what surrounds it."""
        # Beside CRIU: looked at when it is through, the tree would stand still for that.
        self._there = mountpoints.look(self._target.container)
        return facts.gather(self._target, pids, states, self._bundle.criu, maps)

    def collect(
        self, images: str, pids: Sequence[int], options: CaptureOptions, sink: MemberSink
    ) -> dict[str, Any]:
        """Store the container's files.

        Raises:
            errors.DeadlineExceeded: what was read of connections may not fit together.
        """
        self._refuse_strays(pids)
        container, init = self._target.container, self._target.init
        there = self._there or mountpoints.look(container)
        found = {
            "threads": [[pid, tids] for pid, tids in sorted(facts.threads(images).items())],
            **files.collect(
                container, init, self._stem(), sink, self._deadline, self._ahead, there
            ),
        }
        if self._hold is not None:
            self._hold.check()
        return found

    def about_to_stop(self) -> bool:
        """Let hold become a placeholder when its child is killed: a container that ended would be
        started anew by the kubelet, from the beginning, beside the one that is restored elsewhere.
        Without hold, the container stands still from now on.
        """
        init, root = self._target.init, self.tree[0]
        if not self._target.held:
            cgroups.freeze(self._target.groups)
            return False
        holding.stop(init, inside.number_for(init.pid, root.pid))
        if not self.criu_kills:
            subprocesses.signal_quietly(root.pid)
        return True

    def killed(
        self, places: journal.Places, operation: journal.Operation, known: dict[str, Any]
    ) -> None:
        """The container waits now, with the files of this very image in it."""
        places.note_filled(self._target.init, files.fingerprint(known))

    def _stem(self) -> proc.Identity | None:
        """The root if it is hold's other half, of which a placeholder may have another version."""
        return self.tree[0] if self.criu_kills else None

    def _refuse_devices(self, pids: Sequence[int]) -> None:
        """The hook that was to let go of them may have failed, or lied."""
        for pid in pids:
            try:
                preflight.refuse_devices(pid, ())
            except errors.TargetUnsuitable as exc:
                raise errors.DumpFailed(
                    f"after all pre hooks, {exc.message}",
                    hint=f"look at the hook {TEARDOWN_RDMA} or {RELEASE_GPU}",
                ) from exc

    def _refuse_strays(self, pids: Sequence[int]) -> None:
        left = target.strays(self._target.init, pids, self._target.groups)
        if left:
            raise errors.DumpFailed(
                f"processes of the container are not below its main one: "
                f"{target.described(left)}; they would be lost",
                hint="end them, or start them so that they stay children of the main process",
                pids=left,
            )


def _refuse_unaccepted(
    pids: Sequence[int], known: Sequence[sockets.Socket], within: frozenset[str]
) -> None:
    listening = [each.inode for each in known if each.state == "listen"]
    if not listening:
        return
    lost = cut.unaccepted(sockets.unaccepted(pids[0], listening), within)
    if lost:
        raise errors.ConnectionUnaccepted(
            f"the connection {lost[0]} was not accepted yet"
            + (f", nor {len(lost) - 1} more" if lost[1:] else ""),
            hint="the job goes on; try again in a moment",
            reasons=lost,
        )


def _live(known: Sequence[sockets.Socket]) -> list[tuple[str, str]]:
    """Both ends of live TCP connections, each as the tree's own end sees it."""
    return sorted({each.connection for each in known if each.connection is not None})
