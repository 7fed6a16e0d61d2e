"""Writers, prunes and crashes in any order, against a dictionary of what was committed."""

from __future__ import annotations

import contextlib

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)

from agent.model.ids import EpochId
from agent.store import intents, layout
from agent.store.repository import EpochWriter, Store
from agent.store.retention import Retention
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import FaultyVolume, Stopped, stop_at
from tests.images import EMPTY, GROUP, NOW_S


class Writing:
    """A writer in the middle of its work, on its own way to the volume."""

    def __init__(self, inner: MemoryVolume, now_s: float, image: images.Image) -> None:
        self.volume = FaultyVolume(inner, None)
        self.stack = contextlib.ExitStack()
        self.epoch: EpochWriter = self.stack.enter_context(
            Store.open(self.volume).begin(GROUP, now_s=now_s)
        )
        self.image = image
        images.write(self.epoch, image)


class StoreMachine(RuleBasedStateMachine):
    """Everything committed and not deleted is always readable; nothing else ever is."""

    writers = Bundle("writers")

    @initialize()
    def make(self) -> None:
        self.inner = MemoryVolume()
        self.store = Store.open(self.inner, create=True)
        self.committed: dict[EpochId, images.Image] = {}
        self.now_s = NOW_S
        self.open: list[Writing] = []

    @rule(target=writers, first=st.integers(0, 400), pages=st.sampled_from([2, 60, 600]))
    def begin(self, first: int, pages: int) -> Writing:
        self.now_s += 1
        writing = Writing(self.inner, self.now_s, images.simple(first, pages))
        self.open.append(writing)
        return writing

    @rule(first=st.integers(0, 400), pages=st.sampled_from([2, 60, 600]))
    def dump(self, first: int, pages: int) -> None:
        self.commit(self.begin(first, pages))

    @rule(writing=writers)
    def flush(self, writing: Writing) -> None:
        for name in writing.image:
            with contextlib.suppress(KeyError):
                writing.epoch._members[name].finish()

    @rule(writing=consumes(writers))
    def commit(self, writing: Writing) -> None:
        writing.epoch.commit({})
        writing.stack.close()
        self.open.remove(writing)
        self.committed[writing.epoch.epoch] = writing.image

    @rule(writing=consumes(writers))
    def abort(self, writing: Writing) -> None:
        writing.stack.close()
        self.open.remove(writing)

    @rule(writing=consumes(writers), number=st.integers(0, 12), after=st.booleans())
    def die_while_committing(self, writing: Writing, number: int, after: bool) -> None:
        writing.volume._plan = stop_at(len(writing.volume.calls) + number, after=after)
        try:
            writing.epoch.commit({})
            writing.stack.close()
        except Stopped:
            with contextlib.suppress(Stopped):
                writing.stack.close()
        self.open.remove(writing)
        # Whether it came to the commit is what a later process sees.
        if writing.epoch.epoch in [summary.epoch for summary in self.store.epochs()]:
            self.committed[writing.epoch.epoch] = writing.image

    @rule(keep=st.integers(1, 3))
    def prune(self, keep: int) -> None:
        report = self.store.prune(Retention(keep_last=keep), now_s=self.now_s)
        assert report.blocked == ()
        kept = sorted(self.committed)[-keep:]
        self.committed = {epoch: self.committed[epoch] for epoch in kept}

    @rule(keep=st.integers(1, 3), number=st.integers(0, 30), after=st.booleans())
    def die_while_pruning(self, keep: int, number: int, after: bool) -> None:
        volume = FaultyVolume(self.inner, stop_at(number, after=after))
        with contextlib.suppress(Stopped):
            Store.open(volume).prune(Retention(keep_last=keep), now_s=self.now_s)
        # The dead deleter is this process, which lives: take its announcement away, as its age
        # or its death would.
        for announced in intents.all_announced(self.inner):
            if announced.intent is not None and announced.intent.purpose == "delete":
                intents.withdraw(self.inner, announced.attempt)
        left = [summary.epoch for summary in self.store.epochs()]
        assert set(sorted(self.committed)[-keep:]) <= set(left)
        self.committed = {epoch: self.committed[epoch] for epoch in left}

    @rule(number=st.integers(0, 10))
    def delete(self, number: int) -> None:
        if self.committed:
            epoch = sorted(self.committed)[number % len(self.committed)]
            self.store.delete(GROUP, epoch)
            del self.committed[epoch]

    @invariant()
    def exactly_the_committed_epochs_are_there_and_whole(self) -> None:
        if not hasattr(self, "committed"):
            return
        summaries = self.store.epochs()
        assert [summary.epoch for summary in summaries] == sorted(self.committed)
        for epoch, image in self.committed.items():
            assert self.store.verify(GROUP, epoch).good
            images.assert_epoch(self.store.read(GROUP, epoch), image)

    def teardown(self) -> None:
        if not hasattr(self, "committed"):
            return
        for writing in self.open:
            writing.stack.close()
        # With every writer gone, a prune leaves no more than the epochs need.
        late_s = max(info.modified_s for info in self.inner.list()) + 1.01 * intents.STALE_S
        self.store.prune(Retention(keep_last=100), now_s=late_s)
        assert not list(self.inner.list(layout.INTENTS))
        self.exactly_the_committed_epochs_are_there_and_whole()
        for epoch in self.committed:
            self.store.delete(GROUP, epoch)
        assert [info.name for info in self.inner.list()] == EMPTY


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
