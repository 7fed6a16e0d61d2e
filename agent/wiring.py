"""From settings to objects: with podengines the one place that names a concrete volume or engine.

Promises: nothing here decides anything; each function puts parts together and calls one of them.
Does not: print, parse or exit.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from agent import errors, podengines
from agent.engines.base import CaptureOptions, Engine, RestoreOptions
from agent.host import proc
from agent.model import ids
from agent.node import dump as node_dump
from agent.node import restore as node_restore
from agent.settings import Settings
from agent.store.repository import EpochSummary, Store
from agent.volumes.base import Volume
from agent.volumes.directory import DirectoryVolume

if TYPE_CHECKING:  # what a verb does not need is not loaded for it
    from agent.cluster.archives import File as ArchiveFile
    from agent.cluster.session import Session
    from agent.host import archivefile
    from agent.model import checkup, follow
    from agent.model import plan as model_plan
    from agent.model.archives import Written
    from agent.node import archives as node_archives
    from agent.node import watch as node_watch

log = logging.getLogger(__name__)


def prepare_grpc(*, silent: bool = True) -> None:
    """What gRPC must know before it is imported. It writes what it thinks of connections to
    standard error unless it is ``silent``.
    """
    if silent:
        # Errors are told by us.
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # Nobody uses it after a fork. With this on it stops and starts its threads around each, also
    # around one that fails in a thread that is in a pid namespace whose first process is dead:
    # threads cannot be started there, and it would abort the program.
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def volume(settings: Settings, *, create: bool = False) -> Volume:
    """The volume that ``settings.store`` names; its directory is made if ``create``."""
    return directory(settings.store.path, create)


def directory(path: str, create: bool) -> Volume:
    """The volume that is a directory; it is made if ``create``."""
    return DirectoryVolume(path, create=create)


def store(settings: Settings, *, create: bool = False) -> Store:
    """The store on it; made if ``create`` and there is none.

    Raises:
        errors.NotFound: no store there.
        errors.UnknownFormat | errors.Corrupt | errors.VolumeError: it cannot be used.
    """
    return Store.open(volume(settings, create=create), create=create)


def engine(settings: Settings) -> Engine:
    """The engine for process trees on this host.

    Raises:
        errors.CriuMissing: CRIU's Python messages are not installed.
    """
    with podengines.needing_pycriu():
        from agent.engines.criu.engine import CriuEngine
    return CriuEngine(criu=settings.criu, work_dir=settings.work_dir)


def dump(
    settings: Settings,
    pids: Sequence[int],
    name: str | None,
    options: CaptureOptions,
    *,
    followed: follow.Closure | None = None,
    stop: bool = False,
    cancel: node_dump.Cancel | None = None,
    progress: Callable[[node_dump.Progress], None] = lambda _: None,
) -> node_dump.DumpOutcome:
    """Dump the trees below ``pids``, or all members of what was ``followed`` from them, as one
    epoch of the group ``name``, by default named after the first of ``pids``. Raises what
    ``node.dump.dump`` does.
    """
    if len(set(pids)) != len(pids):
        raise errors.InvalidInput("a pid is given twice", hint="name each tree once")
    group = ids.group_name(name) if name else _default_group(pids[0])
    members = _members(pids if followed is None else followed.roots)
    chosen = engine(settings)  # before the store, which is made if there is none
    return node_dump.dump(
        store(settings, create=True),
        chosen,
        group,
        members,
        options,
        stop=stop,
        cancel=cancel,
        progress=progress,
    )


def watch(
    settings: Settings,
    pids: Sequence[int],
    name: str | None,
    options: CaptureOptions,
    stop: node_watch.Stop,
    *,
    follow_up: Callable[[], follow.Closure] | None = None,
    every_s: float | None = None,
    most: int | None = None,
    done: Callable[[node_dump.DumpOutcome], None] = lambda outcome: None,
    failed: Callable[[errors.CkptError], None] = lambda exc: None,
    late: Callable[[float, float], None] = lambda took_s, pause_s: None,
) -> node_watch.Watched:
    """Dump the trees below ``pids`` again and again as epochs of the group ``name``, with whom
    ``follow_up`` finds each time. Raises what ``node.watch.watch`` does.
    """
    if len(set(pids)) != len(pids):
        raise errors.InvalidInput("a pid is given twice", hint="name each tree once")
    group = ids.group_name(name) if name else _default_group(pids[0])
    chosen = engine(settings)
    kept_in = store(settings, create=True)

    def once(
        members: Sequence[node_dump.Member], options: CaptureOptions, cancel: node_dump.Cancel
    ) -> node_dump.DumpOutcome:
        return node_dump.dump(kept_in, chosen, group, members, options, cancel=cancel)

    from agent.node import watch as node_watch

    return node_watch.watch(
        once,
        pids,
        lambda: _members(pids if follow_up is None else follow_up().roots),
        options,
        stop,
        every_s=every_s,
        most=most,
        done=done,
        failed=failed,
        late=late,
    )


def restore(
    settings: Settings,
    image: str,
    options: RestoreOptions,
    *,
    progress: Callable[[node_restore.Progress], None] = lambda _: None,
) -> node_restore.RestoreOutcome:
    """Bring ``image`` back on this host. Raises what ``node.restore.restore`` does."""
    return node_restore.restore(
        store(settings), engine(settings), image, options, progress=progress
    )


def export(
    settings: Settings,
    image: str,
    member: str | None,
    wanted: archivefile.Wanted,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Written:
    """Write a member of ``image`` to a file as a checkpoint archive; ``progress`` gets bytes done
    and about how many in all. Raises what ``node.archives.exporting`` does, and
    ``errors.InvalidInput`` if no such file can be written there.
    """
    from agent.host import archivefile
    from agent.node import archives as node_archives

    done_bytes = 0
    with (
        node_archives.exporting(store(settings), image, member, formats().archived) as chosen,
        archivefile.writing(wanted) as file,
    ):
        file.begin(chosen.about)
        for piece in chosen.pieces():
            file.add(piece)
            done_bytes += len(piece)
            progress(done_bytes, max(done_bytes, chosen.about.expected_bytes))
        return file.finish(chosen.exported)


def take_in(settings: Settings, path: str, group: str | None) -> EpochSummary:
    """Store a checkpoint archive as an image. Raises what ``node.archives.take_in`` does, and
    ``errors.NotFound`` if there is no such file.
    """
    with podengines.needing_pycriu():
        from agent.engines.kubelet import intake
    from agent.node import archives as node_archives

    with intake.opened(path) as archive:  # before the store, which is made if there is none
        return node_archives.take_in(store(settings, create=True), archive, group)


def archive_file(path: str) -> contextlib.AbstractContextManager[ArchiveFile]:
    """A file that is a checkpoint archive as far as its headers tell.

    Raises:
        errors.NotFound: there is no such file.
        errors.Corrupt: it is no archive, or one that nobody should read on.
    """
    from agent.engines.kubelet import archive

    return archive.opened(path)


def formats() -> node_archives.Formats:
    """What knows checkpoint archives."""
    with podengines.needing_pycriu():
        from agent.engines.kubelet import export as kubelet_export
        from agent.engines.kubelet import intake
    from agent.node import archives as node_archives

    return node_archives.Formats(archived=kubelet_export.Outgoing, opened=intake.of)


def plan(
    settings: Settings, pids: Sequence[int], followed: follow.Closure | None = None
) -> model_plan.Plan:
    """What a dump of the trees below ``pids``, or of what was ``followed`` from them, would take.
    Raises what ``node.plan`` does.
    """
    from agent.node import plan as node_plan

    limit_bytes = settings.ghost_limit_bytes
    if followed is not None:
        return node_plan.plan_followed(followed, ghost_limit_bytes=limit_bytes)
    return node_plan.plan_dump(pids, ghost_limit_bytes=limit_bytes)


def written(pids: Sequence[int], span_s: float) -> model_plan.Written:
    """What the trees below ``pids`` write in ``span_s``. Raises what ``rate.measure`` does."""
    with podengines.needing_pycriu():
        from agent.engines.tracking import precopy, rate
    return rate.measure(pids, span_s, precopy.LOOK_S)


def followed(pids: Sequence[int]) -> follow.Closure:
    """Who must be cut with the trees below ``pids``. Raises what ``node.follow.close`` does."""
    from agent.node import follow as node_follow

    return node_follow.close(pids)


def doctor(settings: Settings) -> tuple[checkup.Check, ...]:
    """Whether this host can dump and restore, line by line."""
    from agent.node import doctor as node_doctor

    return node_doctor.examine(
        criu=lambda: criu(settings),
        places=[
            node_doctor.Place(
                str(settings.store), lambda: volume(settings).space(), lambda: store(settings)
            )
        ],
        work_dir=settings.work_dir,
        leftovers=lambda: leftovers(settings),
    )


@contextlib.contextmanager
def cluster(settings: Settings) -> Iterator[Session]:
    """The cluster that ``settings`` mean, as this caller. Raises what ``cluster.session`` does."""
    prepare_grpc()
    from agent.cluster import session

    with session.session(settings) as made:
        yield made


def criu(settings: Settings) -> checkup.Criu:
    """The CRIU that ``settings`` mean. Raises what ``probe`` does."""
    with podengines.needing_pycriu():
        from agent.engines.criu import probe
    from agent.model import checkup

    found = probe.probe(settings.criu)
    return checkup.Criu(found.path, found.version_text, found.lazy_pages)


def leftovers(settings: Settings) -> list[str]:
    """What operations left whose agent is dead."""
    with podengines.needing_pycriu():
        from agent.engines.criu import journal
    places = journal.Places(work_dir=settings.work_dir)
    entries = places.entries()
    known = {entry.name for entry in entries}
    dead = [entry.name for entry in entries if not proc.alive(entry.agent)]
    return dead + [name for name in places.scratch_names() if name not in known]


def _members(roots: Sequence[int]) -> list[node_dump.Member]:
    return [
        node_dump.Member(ids.member_name(f"tree-{number}"), pid) for number, pid in enumerate(roots)
    ]


def _default_group(pid: int) -> ids.GroupName:
    comm = proc.stat(pid).comm
    safe = "".join(c if c.isascii() and c.isalnum() else "-" for c in comm).strip("-") or "tree"
    return ids.group_name(f"{safe}-{pid}")
