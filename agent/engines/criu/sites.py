"""Where on this host a tree is restored: in place with its old pids, or isolated in namespaces of
its own.

Promises: what ``restore.Site`` asks for.
Does not: decide when anything happens; ``restore`` does.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent import errors
from agent.engines.base import RestoredTree, RestoreOptions
from agent.engines.criu import conflicts, filelocks, journal, recovery, rpc, stdio, trees
from agent.engines.criu.probe import Criu
from agent.host import clock, hold, proc

# CRIU itself takes some pid; another attempt gets another one.
_STARTS = 20
_DEATH_S = 5.0


class _Beside:
    """What both have in common: this host's files, and standard streams as the caller says."""

    def __init__(self, criu: Criu, known: dict[str, Any], options: RestoreOptions) -> None:
        self._criu = criu
        self._known = known
        self._options = options
        self._root_pid = int(known["processes"][0]["pid"])
        self._numbers = conflicts.numbers(known)

    def entry(self) -> journal.About:
        """The names that the tree's processes will have."""
        return journal.About(programs=tuple(sorted(set(conflicts.programs(self._known)))))

    @contextlib.contextmanager
    def wired(self, images: str) -> Iterator[Mapping[str, int]]:
        """What replaces the tree's standard streams: what was asked for, and /dev/null where the
        other end stayed outside of the tree and nobody would read or write it. Refuses a tree
        whose locks on files others hold now.
        """
        filelocks.refuse_taken(images)
        asked = {0: self._options.stdin, 1: self._options.stdout, 2: self._options.stderr}
        by_number = {number: fd for number, fd in asked.items() if fd is not None}
        with contextlib.ExitStack() as owned:
            for each in self._known["stdio"]:
                number = int(each["fd"])
                if number in by_number or not each["external"]:
                    continue
                null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                owned.callback(os.close, null)
                by_number[number] = null
            redirected = stdio.redirect(images, self._root_pid, set(by_number))
            yield {stdio.key(n): fd for n, fd in by_number.items() if n in redirected}

    @contextlib.contextmanager
    def held(self, operation: journal.Operation) -> Iterator[None]:
        """Hold the tree's connections in this network namespace."""
        name = recovery.hold_name(operation.entry)
        with hold.held(name, conflicts.connections(self._known)):
            yield

    def configure(self, opts: rpc.Request) -> None:
        """The root becomes the child of whoever started CRIU."""
        opts.rst_sibling = True
        opts.shell_job = True

    def namespaces_made(self) -> None:
        """Nothing to do: CRIU makes none."""

    def complete(self, images: str) -> None:
        """Nothing to do."""


class InPlace(_Beside):
    """With the tree's old pids, the root as our own child."""

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], operation: journal.Operation
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start CRIU under a number that the tree does not need itself."""
        with contextlib.ExitStack() as stack:
            for _ in range(_STARTS):
                attempt = stack.enter_context(contextlib.ExitStack())
                worker = attempt.enter_context(rpc.worker([self._criu.path], pass_fds=pass_fds))
                if worker.child.pid not in self._numbers:
                    operation.note_criu(worker.child.pid)
                    yield worker, images
                    return
                attempt.close()
        raise errors.RestoreConflict(
            "the tree's pids are those that this host gives out next",
            hint="try again",
            reasons=["the next free pids of this host belong to the tree"],
        )

    def host_pid(self, number: int) -> int:
        """The same."""
        return number

    def settled(
        self, response: rpc.Response, worker: rpc.Worker, deadline: clock.Deadline
    ) -> RestoredTree:
        """The restored root may be in CRIU's session: it stays."""
        worker.end(alone=False)
        return trees.InPlace(int(response.restore.pid))

    def undo(self, places: journal.Places, operation: journal.Operation) -> None:
        """End and reap what came to be."""
        recovery.undo_restore(places, operation.entry)
        trees.reap(self._numbers)
        # What was no child of ours is init's to reap; until then a second attempt would collide.
        clock.wait_until(
            lambda: not any(proc.exists(number) for number in self._numbers),
            clock.Deadline.after(_DEATH_S),
        )


class Isolated(_Beside):
    """In fresh pid and mount namespaces, below a supervisor."""

    _supervised: trees.Isolated

    @contextlib.contextmanager
    def started(
        self, images: str, pass_fds: Sequence[int], operation: journal.Operation
    ) -> Iterator[tuple[rpc.Worker, str]]:
        """Start the supervisor and CRIU below it; all of it ends with the supervisor."""
        supervised = trees.supervise(self._criu.path, self._root_pid, self._numbers, pass_fds)
        try:
            self._supervised = supervised
            operation.note_criu(supervised.supervisor_pid)
            yield supervised.worker, images
        except BaseException:
            supervised.kill()
            raise

    def host_pid(self, number: int) -> int:
        """Below the supervisor."""
        return self._supervised.host_pid(number)

    def complete(self, images: str) -> None:
        """Know the root while it cannot end."""
        self._supervised.stands()

    def settled(
        self, response: rpc.Response, worker: rpc.Worker, deadline: clock.Deadline
    ) -> RestoredTree:
        """Let go of CRIU; the supervisor keeps the tree."""
        self._supervised.settle()
        return self._supervised

    def undo(self, places: journal.Places, operation: journal.Operation) -> None:
        """Let go of connections; the processes ended with the supervisor."""
        recovery.undo_restore(places, operation.entry)
