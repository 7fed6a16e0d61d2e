"""Whatever one does with a joint epoch, cut into at every call of the volume by what another one
does, who may be its deleter: all are told the same, and what is committed is whole."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable

import pytest

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.ids import EpochId
from agent.model.protocol import Decision
from agent.model.streams import AddressSpace
from agent.store import intents, layout
from agent.store.repository import JointWriter, Part, Store
from agent.store.retention import Retention
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume, Plan, Stopped, at, stop_at
from tests.images import EMPTY, GROUP, NOW_S

RANKS = tuple(ids.member_name(f"rank-{number}") for number in range(2))
SPACE = AddressSpace("process", 7)
# Some pages of its base, some of its own.
IMAGES = [
    {rank: images.MemberImage({SPACE: ((0, 0, (number, number + 1, number + 2)),)})
     for number, rank in enumerate(RANKS, step)}
    for step in (1, 3)
]  # fmt: skip
KEEP = Retention(keep_last=100)


@functools.cache
def committed() -> tuple[EpochId, tuple[tuple[str, bytes], ...]]:
    """A store with one joint epoch, and its name."""
    world = World.__new__(World)
    world.begin(MemoryVolume(), IMAGES[0])
    with world.stack:
        commit_and_end(world, world.store)
    return world.epoch, tuple(
        (each.name, world.inner.read(each.name)) for each in world.inner.list()
    )


class World:
    """A group with a committed joint epoch, and another one on top of it that is not decided."""

    def __init__(self, dead: int = 0) -> None:
        self.base, blobs = committed()
        volume = MemoryVolume()
        for name, content in blobs:
            volume.put(name, content)
        self.begin(volume, IMAGES[1])
        for writer in self.writers[:dead]:
            images.bury(self.inner, writer.finish().attempt)
        del self.writers[:dead]

    def begin(self, inner: MemoryVolume, image: images.Image) -> None:
        """Have the members of a new epoch written."""
        self.inner = inner
        self.store = Store.open(inner, create=True)
        self.volume = FaultyVolume(inner)  # of whoever is cut into
        self.stack = contextlib.ExitStack()
        self.told: set[Decision] = set()
        self.deleted = False
        self.parts: list[Part] = []
        self.writers: list[JointWriter] = []
        self.epoch = self.store.new_epoch(GROUP, now_s=NOW_S)
        for rank in RANKS:
            store = Store.open(self.volume)
            writer = self.stack.enter_context(store.join(GROUP, self.epoch, now_s=NOW_S))
            images.write(writer, {rank: image[rank]})
            self.writers.append(writer)
            self.parts.append(writer.finish())

    def act(self, action: Action, plan: Plan | None = None) -> int:
        """Do it, as far as it goes; ``plan`` counts from its first call. Return its calls."""
        before = len(self.volume.calls)
        if plan is not None:
            self.volume._plan = lambda call, method, name: plan(call - before, method, name)
        with contextlib.suppress(errors.CkptError, Stopped):
            action(self, Store.open(self.volume))
        return len(self.volume.calls) - before

    def die(self) -> None:
        """Whoever is not dead dies."""
        for found in intents.all_announced(self.inner):
            images.bury(self.inner, found.attempt)
        self.writers = []

    def assert_sound(self, where: str) -> None:
        """Whatever is decided by now: nothing is lost, and nothing of it left over at the end."""
        self.stack.close()
        decided = self.store.decision(GROUP, self.epoch)
        if self.deleted:  # by when all who wrote it knew
            assert decided is not Decision.COMMITTED, where
        else:
            assert self.told <= {decided}, f"{where}: told {self.told}, is {decided}"
        self.die()
        for _ in range(2):  # what the dead left, then what says that it was abandoned
            late_s = max(info.modified_s for info in self.inner.list()) + 1.01 * intents.STALE_S
            self.store.prune(KEEP, now_s=late_s)
        assert list(self.inner.list(layout.INTENTS)) == [], where
        for summary in self.store.epochs():
            report = self.store.verify(GROUP, summary.epoch)
            assert report.good, f"{where}: {report.damaged}"
            self.store.delete(GROUP, summary.epoch)
        with pytest.raises(errors.Conflict):
            self.store.commit_joint(GROUP, self.epoch, self.parts, {}, now_s=NOW_S)
        assert [info.name for info in self.inner.list()] == EMPTY, where


Action = Callable[[World, Store], None]


def commit(world: World, store: Store) -> None:
    store.commit_joint(GROUP, world.epoch, world.parts, {}, now_s=NOW_S)
    world.told.add(Decision.COMMITTED)


def commit_and_end(world: World, store: Store) -> None:
    commit(world, store)
    settle(world, store)


def abandon(world: World, store: Store) -> None:
    world.told.add(store.abandon(GROUP, world.epoch))


def settle(world: World, store: Store) -> None:
    """What members do whose coordinator is silent."""
    abandon(world, store)
    for writer in world.writers:
        writer.keep() if world.told == {Decision.COMMITTED} else writer.drop()


def drop_one(world: World, store: Store) -> None:
    for writer in world.writers[:1]:
        with contextlib.suppress(errors.Conflict):
            writer.drop()
            world.told.add(store.abandon(GROUP, world.epoch))


def prune(world: World, store: Store) -> None:
    assert store.prune(KEEP, now_s=clock.wall_s()).blocked == ()


def die_and_prune(world: World, store: Store) -> None:
    world.die()
    prune(world, store)


def delete_the_base(world: World, store: Store) -> None:
    store.delete(GROUP, world.base)


def commit_and_delete(world: World, store: Store) -> None:
    commit_and_end(world, store)
    store.delete(GROUP, world.epoch)
    world.deleted = True


def build_on_it(world: World, store: Store) -> None:
    commit_and_end(world, store)
    with store.begin(GROUP, now_s=NOW_S) as epoch:
        images.write(epoch, IMAGES[1])
        epoch.commit({})


OUTER = (commit, settle, prune, drop_one, delete_the_base, commit_and_delete)
INNER = (*OUTER, abandon, die_and_prune, build_on_it)
PAIRS = [
    *((outer, inner, 0) for outer in OUTER for inner in INNER),
    *((outer, inner, 2) for outer in (commit, prune, commit_and_delete) for inner in INNER),
]


@pytest.mark.parametrize(("outer", "inner", "dead"), PAIRS)
def test_all_are_told_the_same_whoever_comes_between(
    outer: Action, inner: Action, dead: int
) -> None:
    for number in itertools.count():
        world = World(dead)

        def plan(call: int, method: str, name: str, at: int = number, world: World = world) -> None:
            if call == at:
                with contextlib.suppress(errors.CkptError):
                    inner(world, world.store)

        calls = world.act(outer, plan)
        world.assert_sound(f"{inner.__name__} before call {number}")
        if number >= calls:
            break


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("lethal", [False, True])
@pytest.mark.parametrize("action", [*OUTER, abandon])
def test_any_call_may_fail_or_be_the_last(
    action: Action, lethal: bool, after: bool, dead: int
) -> None:
    failure = Fault(errors.VolumeError("I/O error"), after=after)
    for number in itertools.count():
        world = World(dead)
        plan = stop_at(number, after=after) if lethal else at(number, failure)
        calls = world.act(action, plan)
        decided = world.store.decision(GROUP, world.epoch)
        world.deleted = action is commit_and_delete and decided is not Decision.COMMITTED
        abandon(world, world.store)
        world.assert_sound(f"call {number}")
        if number >= calls:
            break
