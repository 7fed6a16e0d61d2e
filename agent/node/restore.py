"""This host's half of a restore: read, verify, bring every member back at one instant.

Promises: what stands in the way is found at once, for all members, before the image is read; an
image is verified whole before any process starts; if the caller lets memory come later, all of it
must be there then, and every page is verified before a process sees it; what is read is not
deleted meanwhile; either all members of the epoch run again or none does. Whenever an image is
found to be damaged, nothing of it is left running, and the newest older good one is named.
Does not: choose the host, or print.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from agent import errors
from agent.engines.base import Engine, Fills, RestoredTree, RestoreOptions
from agent.host import clock
from agent.model import ids
from agent.model.streams import MemberSource
from agent.store.repository import EpochSummary, Store


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a restore has come. ``phase`` is verify, restore, fill (all runs, while memory still
    comes) or done; ``filled_bytes`` of ``total_bytes`` came since all runs.
    """

    phase: str
    filled_bytes: int = 0
    total_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class RestoreOutcome:
    """A running tree for every member. ``verified_s`` is from the request until the image was
    verified whole, or found there where memory may come late; ``running_s`` until all run;
    ``late_bytes`` of memory came in the ``late_s`` after that.
    """

    epoch: EpochSummary
    trees: tuple[tuple[ids.MemberName, RestoredTree], ...]
    verified_s: float
    running_s: float
    late_s: float = 0.0
    late_bytes: int = 0


def restore(
    store: Store,
    engine: Engine,
    image: str,
    options: RestoreOptions,
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> RestoreOutcome:
    """Bring ``image`` back; with ``options.fills`` its memory is looked for, and verified when it
    comes, if so much of it may come late. ``progress`` may raise then: what runs is ended.

    Raises:
        errors.NotFound: no such image.
        errors.DataError: the image is damaged; ``facts['older_good']`` names the newest older
            image of the group that is whole, or is empty.
        errors.RestoreConflict: something is in the way; every reason of every member is listed,
            and after how many seconds (``refused_after_s``).
        errors.Failed: undone; nothing of the image runs.
    """
    began_s = clock.monotonic_s()
    group, epoch = store.resolve(image)
    try:
        return _restored(store, engine, group, epoch, options, began_s, progress)
    except errors.DataError as exc:
        _offer_older(store, group, epoch, exc)
        raise


def _restored(
    store: Store,
    engine: Engine,
    group: ids.GroupName,
    epoch: ids.EpochId,
    options: RestoreOptions,
    began_s: float,
    progress: Callable[[Progress], None],
) -> RestoreOutcome:
    progress(Progress("verify"))
    with contextlib.ExitStack() as stack:
        reader = store.read(group, epoch)
        if not stack.enter_context(store.hold(reader)):
            # It may be deleted at any time: nothing runs that would need it.
            options = dataclasses.replace(options, fills=None)
        parties = len(reader.members)
        options = dataclasses.replace(options, parties=parties)
        sources = [(name, reader.member(name, parties=parties)) for name in reader.members]
        check_all(engine, sources, options, began_s)
        for _, source in sources:
            if options.fills is None:
                source.check()
            else:
                source.present()
        verified_s = clock.monotonic_s() - began_s
        progress(Progress("restore"))
        fills = stack.enter_context(options.fills or Fills())
        trees = _restore_all(engine, sources, options)
        running_s = clock.monotonic_s() - began_s
        if fills.total_bytes:
            _await_filled(fills, trees, progress)
    progress(Progress("done"))
    return RestoreOutcome(
        epoch=reader.summary,
        trees=tuple(trees),
        verified_s=verified_s,
        running_s=running_s,
        late_s=clock.monotonic_s() - began_s - running_s if fills.total_bytes else 0.0,
        late_bytes=fills.total_bytes,
    )


def _await_filled(
    fills: Fills,
    trees: Sequence[tuple[ids.MemberName, RestoredTree]],
    progress: Callable[[Progress], None],
) -> None:
    """Return when all memory is in; whatever comes instead ends the trees."""

    def filling() -> None:
        progress(Progress("fill", fills.filled_bytes, fills.total_bytes))

    try:
        filling()
        fills.wait(filling)
    except BaseException as exc:
        for _, tree in trees:
            tree.kill()
        if isinstance(exc, errors.DataError | errors.VolumeError):
            exc.message += "; the processes, which ran already, were ended"
        raise


def check_all(
    engine: Engine,
    sources: Sequence[tuple[ids.MemberName, MemberSource]],
    options: RestoreOptions,
    began_s: float,
) -> None:
    """Refuse with the reasons of all members together, and with how long that took since
    ``began_s``, on the monotonic clock; raises as ``Engine.check_restore``.
    """
    found: list[tuple[ids.MemberName, errors.RestoreConflict]] = []
    for name, source in sources:
        try:
            engine.check_restore(source, options)
        except errors.RestoreConflict as exc:
            found.append((name, exc))
    if not found:
        return
    spent_s = round(clock.monotonic_s() - began_s, 3)
    if len(found) == 1:
        conflict = found[0][1]
    else:
        conflict = errors.RestoreConflict(
            "; ".join(each.message for _, each in found),
            hint=found[0][1].hint,
            reasons=[f"{name}: {reason}" for name, each in found for reason in _reasons(each)],
        )
    conflict.facts["refused_after_s"] = spent_s
    raise conflict


def _reasons(conflict: errors.RestoreConflict) -> list[str]:
    told = conflict.facts.get("reasons")
    return [str(each) for each in told] if isinstance(told, list) else [conflict.message]


def _restore_all(
    engine: Engine, sources: Sequence[tuple[ids.MemberName, MemberSource]], options: RestoreOptions
) -> list[tuple[ids.MemberName, RestoredTree]]:
    gate = _Gate(len(sources), options.deadline_s)

    def one(named: tuple[ids.MemberName, MemberSource]) -> tuple[ids.MemberName, RestoredTree]:
        try:
            return named[0], engine.restore(named[1], options, gate)
        except BaseException:
            gate.abort()
            raise

    with ThreadPoolExecutor(len(sources), thread_name_prefix="member") as pool:
        futures = [pool.submit(one, named) for named in sources]
    failures = [exc for future in futures if (exc := future.exception())]
    if not failures:
        return [future.result() for future in futures]
    # Past the gate a member can only fail while it is being let go; the others must not go on.
    for future in futures:
        if not future.exception():
            future.result()[1].kill()
    raise next((e for e in failures if not isinstance(e, _TornGate)), failures[0])


class _TornGate(errors.RestoreFailed):
    """Another member of the group failed."""


class _Gate:
    """Where members wait for each other: with their files in place, when restored, and when their
    sockets hear each other, but none runs yet.
    """

    def __init__(self, parties: int, deadline_s: float) -> None:
        self._filled = threading.Barrier(parties)
        self._restored = threading.Barrier(parties)
        self._released = threading.Barrier(parties)
        self._deadline_s = deadline_s

    def filled(self) -> None:
        self._wait(self._filled)

    def restored(self) -> None:
        self._wait(self._restored)

    def released(self) -> None:
        self._wait(self._released)

    def abort(self) -> None:
        self._filled.abort()
        self._restored.abort()
        self._released.abort()

    def _wait(self, barrier: threading.Barrier) -> None:
        try:
            barrier.wait(self._deadline_s)
        except threading.BrokenBarrierError as exc:
            raise _TornGate(
                "another member of the group could not be restored",
                hint="the other member's error says why",
            ) from exc


def _offer_older(
    store: Store, group: ids.GroupName, epoch: ids.EpochId, damage: errors.DataError
) -> None:
    """Add the newest older good image to ``damage``; reading it whole is what makes it good. The
    damage is told in any case, also where the volume fails now.
    """
    damage.facts["older_good"] = ""
    try:
        older = [summary for summary in store.epochs(group) if summary.epoch < epoch]
        name = _newest_good(store, group, reversed(older))
    except errors.VolumeError as exc:
        damage.hint = (
            damage.hint or f"whether an older image is whole cannot be read: {exc.message}"
        )
        return
    if name:
        damage.facts["older_good"] = name
        damage.hint = f"the newest older good image is {name}"
    elif not older:
        damage.hint = damage.hint or "there is no older image of this group"
    else:
        damage.hint = damage.hint or "no older image of this group is whole"


def _newest_good(store: Store, group: ids.GroupName, summaries: Iterable[EpochSummary]) -> str:
    """The name of the first of these images that is whole; "" if none is."""
    for summary in summaries:
        try:
            good = summary.damage is None and store.verify(group, summary.epoch).good
        except errors.NotFound:
            continue  # it was deleted meanwhile
        if good:
            return ids.image_name(group, summary.epoch)
    return ""
