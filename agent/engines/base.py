"""What an engine promises: one way to capture and restore the processes of a member.

A dump has two phases. *Capture*: the member stands still, its memory, metadata and files go into
a ``MemberSink``. *Persist*: it runs again while the store makes everything durable. The caller
takes part in the stop through a ``Cut``, where a group's members wait for each other, and where
``--stop`` commits before anything is killed.

Promises: whatever goes wrong before ``Cut.captured`` returned ``KILL``, the processes go on (or
stay stopped, if they were stopped before), and nothing of the capture is left on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from agent.model.streams import MemberSink, MemberSource


@dataclasses.dataclass(frozen=True)
class Promises:
    """What the planner chooses an engine by. ``cuts``: it asks the ``Cut``, so that several
    members can stand still together, and processes can be ended when the epoch is committed.
    ``holds_first``: it asks the ``Cut`` if it is told to (``CaptureOptions.hold_first``), and then
    several members are captured one by one while none hears another.
    """

    incremental: bool
    live_tcp: bool
    isolates: bool
    streams_memory: bool
    cuts: bool = True
    holds_first: bool = False


class Disposition(enum.Enum):
    """What becomes of the processes after the capture."""

    RESUME = "resume"
    KILL = "kill"


class Cut(Protocol):
    """The caller's part in the stop of one member, in the order in which it is asked. Raising from
    any but ``running`` gives the capture up; the processes go on.

    With ``CaptureOptions.hold_first`` the processes run on until the engine captures them, after
    ``held``, and again after that: from ``frozen`` to ``released`` it is the network between the
    members that stands still.
    """

    def check(self) -> None:
        """Raise if the capture is to be given up: asked while somebody else is waited for."""

    def fail(self, failure: BaseException) -> None:
        """The capture fails with this, but does not end yet: with ``CaptureOptions.hold_first``,
        when somebody else takes long to let go. The others need not stand still until then.
        """

    def ready(self) -> None:
        """All of the member that can be copied while it runs has been, once."""

    def poised(self, wait_s: float) -> bool:
        """What was written since ``ready`` has been copied as well: nothing but the word is missing
        to freeze the member, which is waited for. False if it may take longer than ``wait_s``: then
        this is asked again, and meanwhile more can be copied.
        """

    def frozen(self) -> None:
        """All processes of the member stand still; what others have sent it still arrives."""

    def held(self) -> None:
        """Nothing passes between the member and others any more, as far as the engine holds its
        connections before it reads them, and nothing has been read yet.
        """

    def captured(self) -> Disposition:
        """All of the member has been read; the processes still stand still. ``KILL`` may be
        returned only when the epoch is committed: with ``CaptureOptions.kill`` all of it is in the
        sink by now, otherwise when ``capture`` returns.
        """

    def released(self) -> None:
        """The connections are held no more and the processes run next; not asked before a kill."""

    def running(self) -> None:
        """The processes run again, or were killed."""


class Closes(Protocol):
    """Something that is let go of."""

    def close(self) -> None:
        """Let go of it, whatever fails; safe to repeat."""


class Kept:
    """What an engine keeps of members from one capture to the next, so that the next one reads
    only what was written since; whatever that is, by the member's root. It is good for nothing but
    the member of the same name in an epoch that builds on ``epoch``, what the last capture of all
    of them became. Leaving the context lets go of everything.
    """

    def __init__(self) -> None:
        self.epoch = ""
        self._parts: dict[int, Closes] = {}
        self._plainly: dict[int, int] = {}

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, *exc: object) -> None:
        self.forget()

    def take(self, root: int) -> Closes | None:
        """Hand out what is kept of a tree, which the caller then owns."""
        return self._parts.pop(root, None)

    def keep(self, root: int, part: Closes) -> None:
        """Keep ``part`` of a tree."""
        self._parts[root] = part

    def committed(self, epoch: str) -> None:
        """What was captured has become ``epoch``."""
        self.epoch = epoch

    def doubt(self, root: int, captures: int) -> None:
        """What was prepared for the stop of a tree was wrong by the time it came, and may be again:
        so many captures are to do without. Outlasts ``forget``.
        """
        self._plainly[root] = captures

    def doubted(self, root: int) -> bool:
        """Whether the capture that begins now is to do without; it counts as one."""
        left = self._plainly.pop(root, 0)
        if left > 1:
            self._plainly[root] = left - 1
        return left > 0

    def forget(self) -> None:
        """Let go of everything: the next capture begins anew."""
        parts, self._parts, self.epoch = self._parts, {}, ""
        with contextlib.ExitStack() as stack:
            for each in parts.values():
                stack.callback(each.close)


@dataclasses.dataclass(frozen=True)
class CaptureOptions:
    """How to capture.

    ``deadline_s`` bounds the whole capture. ``include`` are absolute directories or files that
    travel with the image besides the files open for writing. ``tcp_established`` keeps live TCP
    connections (otherwise their presence fails the dump). ``kill`` must be set for a cut that may
    answer ``KILL``: CRIU has to know beforehand, and then needs a definite no to let the tree go
    on. ``precopy``: copy memory while the member runs and stop it only for the rest, where that
    can be done; with ``kept`` only what was written since the capture before. Unless the member is
    to be killed, that takes at most ``precopy_cpu_percent`` of the cores that this program may use,
    as far as half of what is idle goes, and of one in any case, where the member computes, and
    ``precopy_bytes_per_s`` of memory (None for no limit), for a quarter of the deadline at most.
    ``held_bytes`` bounds what is held in memory while it stands still, to be stored when it runs
    again; with 0 nothing is, otherwise what is more goes to the local disk, within bounds
    (``criu/spool``).
    """

    deadline_s: float = 600.0
    include: tuple[str, ...] = ()
    tcp_established: bool = True
    # The addresses of all that is cut together, ``cut.LOCALHOST`` for this member's own loopback:
    # an engine that would leave a connection out of the image, since the member has not accepted
    # it yet, gives the capture up instead if it comes from one of them.
    within: frozenset[str] = frozenset()
    ghost_limit_bytes: int = 1 << 30
    kill: bool = False
    log_level: int = 2
    precopy: bool = False
    precopy_cpu_percent: int = 100
    precopy_bytes_per_s: int | None = None
    kept: Kept | None = None
    # Only for an engine that promises it, and with the addresses of all others in ``within``.
    hold_first: bool = False
    # What the agent takes for a dump in all stays below 256 MiB with it (bench.peak_memory).
    held_bytes: int = 96 << 20


@dataclasses.dataclass(frozen=True)
class CaptureReport:
    """What a capture was like. Times are seconds, from a monotonic clock."""

    stop_s: float
    freeze_s: float
    raw_bytes: int
    pids: tuple[int, ...]
    engine_facts: dict[str, Any] = dataclasses.field(default_factory=dict)


class FilePolicy(enum.Enum):
    """What to do where an ephemeral file of the image differs from what is there now."""

    REFUSE = "refuse"
    ROLLBACK = "rollback"
    KEEP = "keep"


# How long one tree is waited for before the next is looked at.
_LOOK_S = 0.1


class Filling(Protocol):
    """A tree that runs while its memory still comes."""

    total_bytes: int

    @property
    def filled_bytes(self) -> int:
        """How much of it has come."""

    def wait(self, timeout_s: float) -> bool:
        """Wait until all of it is in, or the tree has ended; False if that takes longer.

        Raises:
            errors.Corrupt | errors.Missing | errors.VolumeError: the rest cannot be had.
            errors.DeadlineExceeded | errors.RestoreFailed: it could not be filled.
            After any of them the tree has been ended: nothing ran on with what is missing.
        """

    def give_up(self) -> None:
        """End the tree unless it is complete; safe to repeat."""


class Fills:
    """The trees of a restore that run while their memory still comes. Leaving the context ends
    those that are not complete. A tree of which less than ``least_bytes`` could come late gets all
    of it first.
    """

    def __init__(self, least_bytes: int = 0) -> None:
        self.least_bytes = least_bytes
        self._fills: list[Filling] = []

    def __enter__(self) -> Fills:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.ExitStack() as stack:
            for each in self._fills:
                stack.callback(each.give_up)

    def add(self, filling: Filling) -> None:
        """One tree more."""
        self._fills.append(filling)

    @property
    def filled_bytes(self) -> int:
        """How much has come of what was to come."""
        return sum(each.filled_bytes for each in self._fills)

    @property
    def total_bytes(self) -> int:
        """How much was to come when the trees began to run."""
        return sum(each.total_bytes for each in self._fills)

    def wait(self, look: Callable[[], None]) -> None:
        """Return when all are complete; raises as ``Filling.wait``. ``look`` is called again and
        again and may raise.
        """
        left = self._fills
        while left := [each for each in left if not each.wait(_LOOK_S)]:
            look()


@dataclasses.dataclass(frozen=True)
class RestoreOptions:
    """How to restore.

    ``isolate``: in fresh pid and mount namespaces instead of in place with the same pids.
    ``files``: what to do where an ephemeral file of the image differs from what is there now:
    refuse, roll back to the image (the other is kept aside under another name), or keep.
    ``stdin|stdout|stderr``: open descriptors that replace the tree's own, or None.
    ``accept_changed``: paths whose changed size or time is accepted (binaries, libraries).
    ``moved``: addresses of all hosts of a group, old to new, where its members move together;
    connections between them go on, but for the ``halves`` ("local -> remote" as they were): whose
    other end is in no member, since nobody had accepted it yet. ``fills``: let the tree run before
    its memory is complete, where that can be done and is worth it, and tell there. ``parties``: so
    many members are restored by this program at the same time, and share what memory that takes.
    """

    isolate: bool = False
    files: FilePolicy = FilePolicy.REFUSE
    stdin: int | None = None
    stdout: int | None = None
    stderr: int | None = None
    deadline_s: float = 600.0
    accept_changed: bool = False
    log_level: int = 2
    moved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    halves: frozenset[str] = frozenset()
    fills: Fills | None = None
    parties: int = 1


class Gate(Protocol):
    """The caller's part in a restore. Raising gives the restore up; nothing of it runs."""

    def filled(self) -> None:
        """The member's files are in place, and no process of it was started. Engines whose members
        may share files ask it; every member then does.
        """

    def restored(self) -> None:
        """The tree stands complete, its sockets still silent, and none of it has run yet."""

    def released(self) -> None:
        """Its sockets hear others again, and the tree runs next: what a member says that runs
        before another one hears would be lost, and said again only a second later.
        """


class RestoredTree(Protocol):
    """A tree that runs again. Closing it lets go of it; the tree runs on."""

    @property
    def pid(self) -> int:
        """The root's pid as this host sees it."""

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for the root's end; return its exit status, or 128 + N if signal N ended it.

        Raises:
            errors.DeadlineExceeded: it still runs.
        """

    def signal(self, number: int) -> None:
        """Send a signal to the root; a no-op if it has ended."""

    def kill(self) -> None:
        """End every process of the tree and reap what is ours; a no-op if it has ended."""


class Engine(Protocol):
    """One way to capture and restore."""

    name: str
    promises: Promises

    def capture(
        self, pid: int, sink: MemberSink, cut: Cut, options: CaptureOptions
    ) -> CaptureReport:
        """Capture the tree below ``pid``; returns when it runs again, or was killed.

        Raises:
            errors.TargetUnsuitable | errors.TargetBusy: refused; nothing was touched.
            errors.TargetExited | errors.DumpFailed | errors.CriuFailed |
            errors.DeadlineExceeded: given up; the tree is as before.
            errors.VolumeError: from the sink; likewise.
        """

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        """Return if nothing stands in the way of restoring the member here and now; touches
        nothing of it and reads no more than its facts, so that a refusal is quick.

        Raises:
            errors.RestoreConflict: with every reason.
            errors.Corrupt | errors.Missing | errors.UnknownFormat: the facts cannot be used.
        """

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> RestoredTree:
        """Bring a member's processes back; they run when this returns.

        Raises:
            errors.Corrupt | errors.Missing: the image is damaged; no process was started.
            errors.RestoreConflict: refused with every reason; no process was started.
            errors.RestoreFailed | errors.CriuFailed: undone; nothing of the tree runs.
        """
