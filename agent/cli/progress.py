"""Progress on stderr: bars where it is a terminal, nothing otherwise.

Promises: stdout is not touched; a bar disappears when its work ends or fails; the rate and the
time left are shown where the total is known.
Does not: say anything that is not also in the result.
"""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from agent import errors
from agent.host import proc

if TYPE_CHECKING:
    import rich.progress

    from agent.node import dump, restore

_PHASES = {
    "waiting": "waiting for the placeholder",
    "capture": "capturing, the job stands still",
    "persist": "persisting, the job runs",
    "verify": "reading and verifying",
    "restore": "restoring",
    "fill": "running, its memory still comes",
}


@contextlib.contextmanager
def _bars(quiet: bool) -> Iterator[rich.progress.Progress | None]:
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Only here: most runs show none, and least of all those of a service.
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    columns = (
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, transient=True) as bars:
        yield bars


@contextlib.contextmanager
def for_dump(quiet: bool, pids: Sequence[int]) -> Iterator[Callable[[dump.Progress], None]]:
    """A callback for a dump of ``pids``; the total is what the kernel counts before it begins."""
    with _bars(quiet) as bars:
        if bars is None:
            yield lambda _: None
            return
        task = bars.add_task(_PHASES["capture"], total=_expected_bytes(pids))

        def show(now: dump.Progress) -> None:
            bars.update(
                task,
                completed=now.raw_bytes,
                description=_PHASES.get(now.phase, now.phase),
            )

        yield show


def _expected_bytes(pids: Sequence[int]) -> int | None:
    """What a capture will take, roughly; None if a process just went away."""
    try:
        kinds = [proc.resident(pid) for root in pids for pid in proc.tree(root)]
    except errors.CkptError:
        return None
    return sum(kind.anon + kind.shmem + kind.swap for kind in kinds)


@contextlib.contextmanager
def for_restore(quiet: bool) -> Iterator[Callable[[restore.Progress], None]]:
    """A callback for a restore: its phase, and how much memory has come since all runs."""
    with _bars(quiet) as bars:
        if bars is None:
            yield lambda _: None
            return
        task = bars.add_task(_PHASES["verify"], total=None)

        def show(now: restore.Progress) -> None:
            bars.update(
                task,
                description=_PHASES.get(now.phase, now.phase),
                completed=now.filled_bytes,
                total=now.total_bytes or None,
            )

        yield show


@contextlib.contextmanager
def for_pod(quiet: bool) -> Iterator[Callable[[str, int], None]]:
    """A callback for what an agent does with a pod: its phase, and bytes if there are any yet."""
    with _bars(quiet) as bars:
        if bars is None:
            yield lambda phase, raw_bytes: None
            return
        task = bars.add_task("asking the agent", total=None)

        def show(phase: str, raw_bytes: int) -> None:
            bars.update(task, completed=raw_bytes, description=_PHASES.get(phase, phase))

        yield show


@contextlib.contextmanager
def for_epoch(quiet: bool) -> Iterator[Callable[[enum.Enum], None]]:
    """A callback for the state that an epoch of several pods is in."""
    with _bars(quiet) as bars:
        if bars is None:
            yield lambda state: None
            return
        task = bars.add_task("asking the agents", total=None)
        yield lambda state: bars.update(task, description=str(state.value))


@contextlib.contextmanager
def for_steps(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A callback for the step that an operation of the coordinator is at."""
    with _bars(quiet) as bars:
        if bars is None:
            yield lambda step: None
            return
        task = bars.add_task("asking the coordinator", total=None)
        yield lambda step: bars.update(task, description=step)


@contextlib.contextmanager
def for_reading(quiet: bool, name: str) -> Iterator[Callable[[int, int], None]]:
    """A callback that takes bytes done and bytes in all."""
    with _bars(quiet) as bars:
        if bars is None:
            yield lambda done, total: None
            return
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
