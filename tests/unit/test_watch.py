"""Epoch after epoch: how often, what is kept between two, and how it ends."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Kept
from agent.model import ids
from agent.node import watch
from agent.node.dump import Cancel, DumpOutcome, Member


class Part:
    """Something that an engine keeps."""

    closed = False

    def close(self) -> None:
        self.closed = True


class Dumps:
    """Dumps that only remember what they were given; each keeps something for the next one."""

    def __init__(self, *fail: errors.CkptError | None) -> None:
        self.fail = list(fail)
        self.begun: list[tuple[str, bool]] = []
        self.parts: list[Part] = []

    def __call__(
        self, members: Sequence[Member], options: CaptureOptions, cancel: Cancel
    ) -> DumpOutcome:
        kept = cast("Kept", options.kept)
        had = kept.take(members[0].pid)
        self.begun.append((kept.epoch, had is not None))
        self.parts.append(Part())
        kept.keep(members[0].pid, self.parts[-1])
        problem = self.fail.pop(0) if self.fail else None
        if problem is not None:
            raise problem
        epoch = SimpleNamespace(epoch=f"e{len(self.begun)}")
        return cast("DumpOutcome", SimpleNamespace(epoch=epoch))


@pytest.fixture
def job() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as made:
        yield made
        made.kill()


def watched(dumps: Dumps, pid: int, **options: Any) -> watch.Watched:
    member = Member(ids.member_name("tree-0"), pid)
    given = {"every_s": 0.01, **options}
    return watch.watch(dumps, [pid], lambda: [member], CaptureOptions(), watch.Stop(), **given)


@pytest.mark.parametrize(
    ("every_s", "took_s", "pause_s"),
    [(30, 1, 29), (30, 45, 45), (None, 2, 18), (None, 0.01, 1)],
)
def test_the_pause_between_two(every_s: float | None, took_s: float, pause_s: float) -> None:
    assert watch.pause_s(every_s, took_s) == pytest.approx(pause_s)


def test_epochs_that_take_longer_than_is_to_be_between_two_leave_as_much_time_again() -> None:
    """Whatever a volume takes, what is written meanwhile is stored in the end."""
    told: list[tuple[float, float]] = []
    watched(
        Dumps(),
        os.getpid(),
        most=3,
        every_s=1e-9,
        late=lambda took, pause: told.append((took, pause)),
    )
    assert len(told) == 3
    assert all(pause == took > 1e-9 for took, pause in told)


def test_each_goes_on_from_the_one_before() -> None:
    dumps = Dumps()
    assert watched(dumps, os.getpid(), most=3) == watch.Watched(3, 0, None, ended=False)
    assert dumps.begun == [("", False), ("e1", True), ("e2", True)]
    assert dumps.parts[-1].closed


def test_after_one_that_failed_the_next_begins_anew() -> None:
    told: list[errors.CkptError] = []
    dumps = Dumps(None, errors.VolumeFull("no room"), None)
    found = watched(dumps, os.getpid(), most=4, failed=told.append)
    assert (found.epochs, found.failures, found.last_failed) == (3, 1, None)
    assert dumps.begun == [("", False), ("e1", True), ("", False), ("e3", True)]
    assert [str(each) for each in told] == ["no room"]
    assert dumps.parts[1].closed


def test_the_last_ones_failure_is_told() -> None:
    found = watched(Dumps(None, errors.VolumeFull("no room")), os.getpid(), most=2)
    assert isinstance(found.last_failed, errors.VolumeFull)


def test_if_the_first_fails_there_is_no_watch() -> None:
    dumps = Dumps(errors.TargetUnsuitable("never"))
    with pytest.raises(errors.TargetUnsuitable):
        watched(dumps, os.getpid())
    assert dumps.parts[0].closed


def test_it_ends_with_the_trees(job: subprocess.Popen[bytes]) -> None:
    dumps = Dumps()

    def end(outcome: DumpOutcome) -> None:
        if len(dumps.begun) == 2:
            job.kill()
            job.wait()

    assert watched(dumps, job.pid, done=end) == watch.Watched(2, 0, None, ended=True)
    assert dumps.parts[-1].closed


def test_a_tree_that_ends_during_a_dump_is_no_failure(job: subprocess.Popen[bytes]) -> None:
    dumps = Dumps(None, errors.TargetExited("gone"))

    def end(outcome: DumpOutcome) -> None:
        job.kill()
        job.wait()

    assert watched(dumps, job.pid, done=end).ended


def test_one_that_is_asked_to_stop_during_a_dump_ends(job: subprocess.Popen[bytes]) -> None:
    dumps = Dumps(None, errors.Interrupted("asked"))
    assert watched(dumps, job.pid) == watch.Watched(1, 0, None, ended=False)


def test_of_other_members_nothing_is_kept() -> None:
    dumps, stop = Dumps(), watch.Stop()
    roots = iter([[os.getpid()], [os.getppid(), os.getpid()], [os.getppid(), os.getpid()]])

    def members() -> list[Member]:
        return [Member(ids.member_name(f"tree-{i}"), pid) for i, pid in enumerate(next(roots))]

    watch.watch(dumps, [os.getpid()], members, CaptureOptions(), stop, every_s=0.01, most=3)
    assert dumps.begun == [("", False), ("", False), ("e2", True)]


def test_it_goes_on_when_one_has_ended_that_was_only_followed(job: subprocess.Popen[bytes]) -> None:
    dumps = Dumps()

    def members() -> list[Member]:
        own = Member(ids.member_name("tree-0"), os.getpid())
        return [own, Member(ids.member_name("tree-1"), job.pid)] if job.poll() is None else [own]

    def end(outcome: DumpOutcome) -> None:
        job.kill()
        job.wait()

    found = watch.watch(
        dumps,
        [os.getpid()],
        members,
        CaptureOptions(),
        watch.Stop(),
        every_s=0.01,
        most=3,
        done=end,
    )
    assert found == watch.Watched(3, 0, None, ended=False)
    assert dumps.begun == [("", False), ("", False), ("e2", True)]
