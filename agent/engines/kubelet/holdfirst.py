"""A container's part in a cut of several pods, where its runtime freezes it by itself.

Nothing can be asked of a runtime between freezing and reading. So the network is stopped instead of
the programs: from when all members are told to stand still, none hears another over TCP, and each
is captured by its runtime at some moment while that lasts. docs/design/joint-epochs.md says why
that is one cut.

Promises: what the members say to each other is refused from ``frozen`` until all were captured, for
``HELD_S`` at most, by the kernel's own doing if need be, and no longer than half of what a program
has asked its connections to wait; a connection between them that would be in one image only gives
the capture up, and so does one that ends meanwhile.
Does not: hold datagrams, or what leads out of the group; nor stop anything.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator, Sequence

from agent import errors
from agent.engines.base import CaptureOptions, Cut, Disposition
from agent.host import addresses, clock, endpoints, hold, namespaces, proc, sockets
from agent.model import cut as model_cut
from agent.model.container import Container
from agent.model.cut import End

# Longer than a kubelet takes for a few GB on a local disk; what watches connections commonly gives
# them half a minute (as hold.LEASE_S).
HELD_S = 20.0
# Whose connections break when they are held for a few seconds is not held at all: the members come
# to know within so long that another has given up.
_LEAST_S = 4.0
# How long a first wait for the other members is; see Cut.poised.
_POISED_S = 1.0
_THERE = ("established", "fin-wait-1", "fin-wait-2", "close-wait", "closing", "last-ack")

Ends = tuple[str, str]


def check(container: Container, options: CaptureOptions, *, alone: bool = True) -> None:
    """Refuse what cannot be held; ``alone`` as ``apart`` has it.

    Raises:
        errors.ConnectionUnaccepted: it is not told who the others are, so that a connection which
            was not accepted yet would be left out of the image.
        errors.TargetUnsuitable: the container has no network of its own, or more of it than the
            others know, or a connection of it is given up soon by its program's own wish.
    """
    if not options.within:
        raise errors.ConnectionUnaccepted(
            "the kubelet engine has to know the addresses of all pods that are cut together, and"
            " can leave no connection out of an image that was not accepted yet",
            hint="try again in a moment, with fewer than 10,000 pods, or use the container engine",
        )
    theirs = proc.namespaces(container.pid)["net"]
    nodes = [proc.namespaces(os.getpid())["net"]]
    with contextlib.suppress(errors.PrivilegeMissing):
        nodes.append(proc.namespaces(1)["net"])
    if theirs in nodes:
        raise errors.TargetUnsuitable(
            f"container {container.name} uses the node's own network, which cannot be held",
            hint="do not set hostNetwork in the pod: its connections and ports cannot move",
        )
    own = addresses.of(container.pid)
    unknown = sorted(set(own) - options.within)
    if unknown:
        raise errors.TargetUnsuitable(
            f"container {container.name} has addresses besides its pod's ({', '.join(unknown)}):"
            " what it says from there is held by nobody",
            hint="use the container engine; a pod's addresses are those of its status",
        )
    for pid in proc.tree(container.pid):
        with contextlib.suppress(errors.NotFound):
            if proc.namespaces(pid)["net"] != theirs:
                raise errors.TargetUnsuitable(
                    f"process {pid} of container {container.name} has a network of its own within"
                    " the pod's, which is not held",
                    hint="use the container engine, or end that process",
                    pid=pid,
                )
    _allowed_s(container.pid, others(options.within, own), loopback=not alone)


def _allowed_s(pid: int, sources: frozenset[str], *, loopback: bool) -> float:
    """How long the connections can be held without their programs' being told.

    Raises:
        errors.TargetUnsuitable: for too short a time.
    """
    allowed_s = HELD_S
    for ends, patience_s in endpoints.patience(proc.tree(pid)):
        if not between([ends], sources, loopback=loopback):
            continue
        # Who hears nothing asks again at least once between half of the time and its end.
        allowed_s = min(allowed_s, patience_s / 2)
        if allowed_s < _LEAST_S:
            raise errors.TargetUnsuitable(
                f"the connection {' -> '.join(ends)} cannot be held: its program is told when the"
                f" other end was not heard for {patience_s:.0f} s",
                hint="use the container engine, or longer times for TCP_USER_TIMEOUT and keepalive"
                " (and no IP_RECVERR)",
                pid=pid,
            )
    return allowed_s


class Part:
    """A member that is apart from the others; ``apart`` makes it."""

    def __init__(
        self,
        cut: Cut,
        held: hold.Held,
        deadline: clock.Deadline,
        connections: Iterable[Ends],
        held_s: float = HELD_S,
    ) -> None:
        """``held_s`` is how long the hold may last, until ``deadline``."""
        self._cut = cut
        self._held = held
        self._held_s = held_s
        self._deadline = deadline
        self._connections = frozenset(connections)

    def deadline(self, of_all: clock.Deadline) -> clock.Deadline:
        """When the runtime has to be through."""
        return of_all.sooner(self._deadline.remaining_s)

    def check(self) -> None:
        """Raise if the runtime is not to be waited for any longer."""
        self._cut.check()
        if self._deadline.expired:
            raise errors.DeadlineExceeded(
                f"the kubelet did not capture the container within {self._held_s:.0f} s, for which"
                " the job's connections may be held",
                hint="the job goes on; use the container engine for what takes longer",
            )
        self._held.check()

    def let_through(self) -> None:
        """Hold nothing any more."""
        self._held.let_through()

    def failed(self, failure: BaseException) -> None:
        """Hold nothing any more, and let the other members go on, while the runtime may still have
        the container stand still.
        """
        try:
            self.let_through()
        finally:
            self._cut.fail(failure)

    def captured(self) -> None:
        """The container was captured, and runs: wait for the others, then let everything through.

        Raises:
            errors.DeadlineExceeded: it was not silent all the time.
            errors.CkptError: the capture is given up.
        """
        self._held.check()
        if self._cut.captured() is not Disposition.RESUME:
            raise errors.InvalidInput("the cut asked to end what runs on by itself")
        # While another was waited for: whoever was captured last is not known here.
        self._held.check()
        self.let_through()
        self._cut.released()
        self._cut.running()

    def check_ends(self, ends: Iterable[End]) -> None:
        """See that every connection with another member is in the image.

        Raises:
            errors.CutTorn: one has ended while it was held: its last words may be in no image.
        """
        found = {
            (model_cut.address(e.local, e.local_port), model_cut.address(e.remote, e.remote_port))
            for e in ends
        }
        lost = sorted(self._connections - found)
        if lost:
            names = [" -> ".join(each) for each in lost]
            raise errors.CutTorn(
                f"the connection {names[0]} ended while the members were captured",
                hint="nothing was kept, the job goes on; try again",
                reasons=names,
            )


def poise(cut: Cut) -> None:
    """Wait for the word to stand still; raises if the cut is given up."""
    cut.ready()
    wait_s = _POISED_S
    while not cut.poised(wait_s):
        wait_s *= 2


@contextlib.contextmanager
def apart(
    container: Container,
    who: proc.Identity,
    table: str,
    cut: Cut,
    options: CaptureOptions,
    *,
    alone: bool,
) -> Iterator[Part]:
    """The container hears no other member within the context, until ``Part.captured``: by the
    packet filter's ``table`` in the network of ``who``, its first process. ``alone``: no other
    container of its pod is captured, so that what stays within the pod goes on.

    Raises:
        errors.ConnectionUnaccepted: a connection between members is only beginning, or ending.
        errors.TargetUnsuitable: for too short a time; as ``check`` has it.
        errors.PrivilegeMissing | errors.EnvironmentUnfit: the kernel cannot hold them.
        errors.CkptError: the cut was given up.
    """
    sources = others(options.within, addresses.of(who.pid))
    allowed_s = _allowed_s(container.pid, sources, loopback=not alone)
    # Over a moment before the kernel ends the hold.
    until = clock.Deadline.after(allowed_s)
    with (
        namespaces.opened(who, "net") as network,
        hold.apart(table, sources, loopback=not alone, network=network, limit_s=allowed_s) as held,
    ):
        cut.frozen()
        known = list(endpoints.of_tree(proc.tree(container.pid)))
        _refuse_passing(container.pid, known, sources, loopback=not alone)
        connections = [
            (each.connection, each.state) for each in known if each.connection is not None
        ]
        part = Part(
            cut,
            held,
            until,
            between([ends for ends, state in connections if state in _THERE], sources, not alone),
            allowed_s,
        )
        cut.held()
        yield part


def others(within: Iterable[str], own: Iterable[str]) -> frozenset[str]:
    """The addresses of the other members."""
    return frozenset(within) - {model_cut.LOCALHOST, *own}


def between(known: Iterable[Ends], sources: Collection[str], loopback: bool) -> Sequence[Ends]:
    """Those of ``known`` connections with another end in ``sources``, or with ``loopback`` here."""

    def meant(remote: str, local: str) -> bool:
        there, here = (each.rpartition(":")[0].strip("[]") for each in (remote, local))
        return there in sources or (loopback and (there == here or model_cut.is_loopback(there)))

    return sorted({(local, remote) for local, remote in known if meant(remote, local)})


def _refuse_passing(
    pid: int, known: Sequence[sockets.Socket], sources: frozenset[str], *, loopback: bool
) -> None:
    """Refuse connections that are in one image only: none can begin now, and what is on the way
    arrives only after the cut.
    """
    listening = [each.inode for each in known if each.state == "listen"]
    unaccepted = sockets.unaccepted(pid, listening) if listening else []
    for found, what in ((unaccepted, "accepted yet"), (sockets.closing(pid), "closed yet")):
        lost = between(found, sources, loopback)
        if lost:
            raise errors.ConnectionUnaccepted(
                f"the connection {lost[0][1]} -> {lost[0][0]} was not {what}"
                + (f", nor {len(lost) - 1} more" if lost[1:] else ""),
                hint="the job goes on; try again in a moment",
                reasons=[f"{remote} -> {local}" for local, remote in lost],
            )
