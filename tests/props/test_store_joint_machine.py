"""Joint writers, committers, abandoners, deleters and crashes in any order, each cut into by the
others at any call of the volume: nothing committed is ever lost, nothing abandoned is ever
readable, and no epoch is ever decided in two ways."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.ids import EpochId, MemberName
from agent.model.protocol import Decision
from agent.store import intents
from agent.store.repository import JointWriter, Part, Store
from agent.store.retention import Retention
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.faults import Fault, FaultyVolume, Stopped
from tests.images import EMPTY, GROUP, NOW_S

RANKS = tuple(ids.member_name(f"rank-{number}") for number in range(3))
HOUR_S = 3600.0
# What a request may be on its way, by the room that FORMAT.md leaves.
ON_ITS_WAY_S = 0.9 * (intents.STALE_S - intents.WRITER_LIMIT_S)


class Writing:
    """One joint writer, on its own way to the volume."""

    def __init__(self, machine: JointMachine, epoch: EpochId, rank: MemberName, first: int) -> None:
        self.volume = FaultyVolume(machine.inner)
        self.stack = contextlib.ExitStack()
        self.image = images.simple(first, 12)[images.MEMBER]
        self.rank = rank
        self.epoch = epoch
        self.part: Part | None = None
        self.died = False
        store = Store.open(self.volume)
        self.writer: JointWriter = self.stack.enter_context(
            store.join(GROUP, epoch, now_s=clock.wall_s())
        )

    def finish(self) -> None:
        if self.part is None:
            images.write(self.writer, {self.rank: self.image})
            self.part = self.writer.finish()


@dataclasses.dataclass
class Epoch:
    """What an onlooker knows of a joint epoch."""

    decision: Decision | None = None
    perhaps_deleted: bool = False
    deleted: bool = False
    writings: list[Writing] = dataclasses.field(default_factory=list)

    def images(self) -> dict[bytes, images.MemberImage]:
        """What was handed out, by the digest of the member's manifest."""
        return {
            ref.digest: each.image
            for each in self.writings
            if each.part is not None
            for ref in each.part.members
        }


Disturbance = tuple[str, int, bool]
DISTURBANCES = st.one_of(
    st.just(("", 0, False)),
    st.tuples(
        st.sampled_from(
            ["die", "fail", "abandon", "prune", "delete", "commit", "finish", "join", "wait"]
        ),
        st.integers(0, 11),
        st.booleans(),
    ),
)
NUMBERS = st.integers(0, 1)


class JointMachine(RuleBasedStateMachine):
    """Each rule is one actor at work, disturbed once by another one, a fault or its death."""

    @initialize()
    def make(self) -> None:
        self.time_s = NOW_S
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(clock, "wall_s", lambda: self.time_s)
        self.patch.setattr(clock, "boottime_s", lambda: self.time_s)
        self.inner = MemoryVolume()
        self.store = Store.open(self.inner, create=True)
        self.epochs: dict[EpochId, Epoch] = {}

    # The actors

    @rule(number=NUMBERS, rank=st.sampled_from(RANKS), first=st.integers(0, 40),
          disturbance=DISTURBANCES)  # fmt: skip
    def join(self, number: int, rank: MemberName, first: int, disturbance: Disturbance) -> None:
        epoch = self._epoch(number) or self._name()
        self._join(epoch, rank, first)
        for writing in self._alive(epoch)[-1:]:
            with self._disturbed(writing.volume, disturbance, writing):
                writing.finish()

    @rule(first=st.integers(0, 40), dead=st.integers(0, 2))
    def all_but_the_commit(self, first: int, dead: int) -> None:
        epoch = self._name()
        for rank in RANKS[:2]:
            self._join(epoch, rank, first)
        for number, writing in enumerate(self.epochs[epoch].writings):
            writing.finish()
            if number < dead:
                self._bury(writing)

    @rule(number=NUMBERS, disturbance=DISTURBANCES)
    def commit(self, number: int, disturbance: Disturbance) -> None:
        epoch = self._epoch(number)
        if epoch is not None:
            self._commit(epoch, disturbance)

    @rule(number=NUMBERS, disturbance=DISTURBANCES)
    def abandon(self, number: int, disturbance: Disturbance) -> None:
        epoch = self._epoch(number)
        if epoch is None:
            return
        volume = FaultyVolume(self.inner)
        store = Store.open(volume)
        with self._disturbed(volume, disturbance):
            decided = store.abandon(GROUP, epoch)
            assert self.store.decision(GROUP, epoch) in (decided, None)

    @rule(number=NUMBERS, keep=st.booleans(), disturbance=DISTURBANCES)
    def close(self, number: int, keep: bool, disturbance: Disturbance) -> None:
        """As the participants do: keep what is known to be committed, drop the rest."""
        epoch = self._epoch(number)
        for writing in self._alive(epoch) if epoch else []:
            decided = self.store.decision(GROUP, writing.epoch)
            with self._disturbed(writing.volume, disturbance, writing):
                if decided is Decision.COMMITTED:
                    writing.writer.keep()
                elif not keep:
                    writing.writer.drop()

    @rule(number=NUMBERS)
    def die(self, number: int) -> None:
        epoch = self._epoch(number)
        for writing in self._alive(epoch) if epoch else []:
            self._bury(writing)

    @rule(number=NUMBERS, disturbance=DISTURBANCES)
    def delete(self, number: int, disturbance: Disturbance) -> None:
        epoch = self._epoch(number)
        if epoch is None:
            return
        volume = FaultyVolume(self.inner)
        store = Store.open(volume)
        with self._disturbed(volume, disturbance):
            self._delete(store, epoch)

    @rule(keep=st.sampled_from([1, 2, 100]), disturbance=DISTURBANCES)
    def prune(self, keep: int, disturbance: Disturbance) -> None:
        volume = FaultyVolume(self.inner)
        store = Store.open(volume)
        with self._disturbed(volume, disturbance):
            self._prune(store, keep)

    @rule(hours=st.sampled_from([1, 13, 25]))
    def wait(self, hours: int) -> None:
        self.time_s += hours * HOUR_S

    @rule(first=st.integers(0, 40))
    def dump_alone(self, first: int) -> None:
        """Somebody else's epoch in the same group, which the joint ones build on."""
        with self.store.begin(GROUP, now_s=self.time_s) as epoch:
            images.write(epoch, images.simple(first, 12))
            summary = epoch.commit({"alone": True})
        images.assert_epoch(self.store.read(GROUP, summary.epoch), images.simple(first, 12))

    # What they do

    def _name(self) -> EpochId:
        self.time_s += 1
        epoch = self.store.new_epoch(GROUP, now_s=self.time_s)
        self.epochs[epoch] = Epoch()
        return epoch

    def _join(self, epoch: EpochId, rank: MemberName, first: int) -> None:
        over = self.store.decision(GROUP, epoch) is not None
        with contextlib.suppress(errors.Conflict, errors.DeadlineExceeded):
            writing = Writing(self, epoch, rank, first)
            assert not over, "joined what is decided"
            self.epochs[epoch].writings.append(writing)

    def _commit(self, epoch: EpochId, disturbance: Disturbance) -> None:
        parts: dict[MemberName, Part] = {}
        for each in self.epochs[epoch].writings:
            if each.part is not None:
                parts[each.rank] = each.part
        if not parts:
            return
        volume = FaultyVolume(self.inner)
        store = Store.open(volume)
        with self._disturbed(volume, disturbance):
            summary = store.commit_joint(GROUP, epoch, list(parts.values()), {}, now_s=self.time_s)
            assert set(summary.members) == set(parts)
            self.epochs[epoch].decision = Decision.COMMITTED

    def _delete(self, store: Store, epoch: EpochId) -> None:
        if self.store.decision(GROUP, epoch) is Decision.COMMITTED:
            self._look()
            self.epochs[epoch].perhaps_deleted = True
            store.delete(GROUP, epoch)

    def _prune(self, store: Store, keep: int) -> None:
        self._look()
        if keep < 100:
            for each in self.epochs.values():
                each.perhaps_deleted |= each.decision is Decision.COMMITTED
        report = store.prune(Retention(keep_last=keep), now_s=self.time_s)
        assert report.blocked == ()

    def _bury(self, writing: Writing) -> None:
        writing.died = True
        writing.volume._plan = _end
        with contextlib.suppress(Stopped):
            writing.stack.close()
        self._bury_all(lambda found: found.attempt == writing.writer._attempt)

    def _bury_all(self, which: Callable[[intents.Announced], bool]) -> None:
        for found in intents.all_announced(self.inner):
            if which(found):
                modified_s = found.modified_s
                images.bury(self.inner, found.attempt)
                blob, _ = self.inner._blobs[f"intents/{found.attempt}"]
                self.inner._blobs[f"intents/{found.attempt}"] = (blob, modified_s)

    def _epoch(self, number: int) -> EpochId | None:
        recent = sorted(self.epochs)[-2:]
        return recent[number % len(recent)] if recent else None

    def _alive(self, epoch: EpochId) -> list[Writing]:
        return [each for each in self.epochs[epoch].writings if not each.died]

    # What comes between

    @contextlib.contextmanager
    def _disturbed(
        self, volume: FaultyVolume, disturbance: Disturbance, writing: Writing | None = None
    ) -> Iterator[None]:
        """Run what follows with one disturbance; errors of the tree and death are ways to end."""
        what, number, flag = disturbance
        at = len(volume.calls) + number
        known = {found.attempt for found in intents.all_announced(self.inner)}

        def plan(call: int, method: str, name: str) -> Fault | None:
            if call != at:
                return None
            if what == "die":
                return Fault(Stopped(), after=flag, ends_the_world=True)
            if what == "fail":
                return Fault(errors.VolumeError("I/O error"), after=flag)
            self._meanwhile(what, number, flag, writing)
            return None

        volume._plan = plan
        try:
            yield
        except Stopped:
            if writing is not None:
                self._bury(writing)
            else:
                self._bury_all(lambda found: found.attempt not in known)
        except errors.CkptError:
            pass
        if writing is not None and not writing.died:
            volume._plan = None
        elif writing is None:
            # A deleter or a committer that failed is still this process: have it end.
            self._bury_all(lambda found: found.attempt not in known and not self._mine(found))
        self._look()

    def _mine(self, found: intents.Announced) -> bool:
        return any(
            w.writer._attempt == found.attempt for e in self.epochs.values() for w in e.writings
        )

    def _meanwhile(self, what: str, number: int, flag: bool, busy: Writing | None) -> None:
        epoch = self._epoch(-1)
        if epoch is None:
            return
        others = [each for each in self._alive(epoch) if each is not busy]
        with contextlib.suppress(errors.CkptError):
            if what == "abandon":
                self.store.abandon(GROUP, epoch)
                for other in others if flag else []:
                    other.writer.drop()
            elif what == "prune":
                for other in others if flag else []:
                    self._bury(other)
                self._prune(self.store, 100)
            elif what == "delete":
                if self.store.decision(GROUP, epoch) is Decision.COMMITTED:
                    for other in others:
                        other.writer.keep()
                self._delete(self.store, epoch)
            elif what == "commit":
                self._commit(epoch, ("", 0, False))
                for other in others if flag else []:
                    other.writer.keep()
                if flag:
                    self._delete(self.store, epoch)
            elif what == "finish":
                for other in others:
                    other.finish()
            elif what == "join":
                self._join(epoch, RANKS[number % len(RANKS)], number)
            elif what == "wait":
                self.time_s += ON_ITS_WAY_S

    # What must hold

    def _look(self) -> None:
        """Compare what every epoch is with what it was."""
        for epoch, known in self.epochs.items():
            decided = self.store.decision(GROUP, epoch)
            if known.deleted or known.decision is Decision.ABANDONED:
                assert decided is not Decision.COMMITTED, "back from the dead"
            elif known.decision is Decision.COMMITTED and decided is not Decision.COMMITTED:
                assert known.perhaps_deleted, "a committed epoch is gone"
                known.deleted = True
            if known.decision is None:
                known.decision = decided

    @invariant()
    def what_is_there_is_whole_and_nothing_else_is_there(self) -> None:
        if not hasattr(self, "epochs"):
            return
        self._look()
        listed = {summary.epoch: summary for summary in self.store.epochs() if not summary.facts}
        assert set(listed) == {
            epoch
            for epoch, known in self.epochs.items()
            if known.decision is Decision.COMMITTED and not known.deleted
        }
        for summary in self.store.epochs():
            assert summary.damage is None
            assert self.store.verify(GROUP, summary.epoch).good
        for epoch in listed:
            reader = self.store.read(GROUP, epoch)
            written = self.epochs[epoch].images()
            for ref in reader._manifest.members:
                images.assert_member(reader.member(ref.member), written[ref.digest])

    def teardown(self) -> None:
        if not hasattr(self, "epochs"):
            return
        try:
            self._end()
        finally:
            self.patch.undo()

    def _end(self) -> None:
        for known in self.epochs.values():
            for writing in known.writings:
                if not writing.died:
                    writing.stack.close()
        for _ in range(2):  # first what the dead left, then what says that it was abandoned
            self.time_s += 25 * HOUR_S
            self._prune(self.store, 100)
        self.what_is_there_is_whole_and_nothing_else_is_there()
        assert list(self.inner.list("intents/")) == []
        for summary in self.store.epochs():
            self.epochs.get(summary.epoch, Epoch()).perhaps_deleted = True
            self.store.delete(GROUP, summary.epoch)
        assert [info.name for info in self.inner.list()] == EMPTY


def _end(call: int, method: str, name: str) -> Fault:
    return Fault(Stopped(), ends_the_world=True)


TestJointMachine = JointMachine.TestCase
TestJointMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
