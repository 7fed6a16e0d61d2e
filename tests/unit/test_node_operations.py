"""One operation a container at a time, a limited number in all, none while shutting down."""

from __future__ import annotations

import contextlib
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from agent import errors
from agent.host.clock import Deadline
from agent.node.dump import Cancel
from agent.node.operations import Operations

LIMIT = 3


def test_who_is_in_the_way_is_named() -> None:
    operations = Operations(LIMIT)
    with (
        operations.begin("dump", "pod ns/a", [("uid", "c")], Cancel()),
        pytest.raises(errors.TargetBusy, match="pod ns/a is being dumped right now"),
        operations.begin("restore", "pod ns/a", [("uid", "d"), ("uid", "c")], Cancel()),
    ):
        pass


def test_the_epoch_that_has_a_pod_is_named() -> None:
    operations = Operations(LIMIT)
    with (
        operations.begin("dump", "pod ns/a", ["a"], Cancel(), "dump of ns/jobset.train@1"),
        pytest.raises(errors.TargetBusy, match=r"right now \(dump of ns/jobset\.train@1\), since"),
        operations.begin("dump", "pod ns/a", ["a"], Cancel(), "dump of ns/jobset.train@2"),
    ):
        pass


def test_an_operation_that_failed_is_counted_out() -> None:
    operations = Operations(1)
    with pytest.raises(ZeroDivisionError), operations.begin("dump", "a", ["a"], Cancel()):
        raise ZeroDivisionError
    with operations.begin("dump", "a", ["a"], Cancel()):
        assert [each.what for each in operations.running()] == ["a"]


def test_what_is_done_at_one_instant_counts_once() -> None:
    operations = Operations(1)
    with (
        operations.begin("dump", "a", ["a"], Cancel(), "an epoch"),
        operations.begin("dump", "b", ["b"], Cancel(), "an epoch"),
    ):
        for other in ("", "another epoch"):
            with (
                pytest.raises(errors.Overloaded, match="does 1 operations already: dump of a, du"),
                operations.begin("dump", "c", ["c"], Cancel(), other),
            ):
                pass
        with (
            pytest.raises(errors.TargetBusy),
            operations.begin("dump", "b", ["b"], Cancel(), "an epoch"),
        ):
            pass


def test_the_end_waits_for_who_gives_up() -> None:
    operations = Operations(1)
    cancel = Cancel()
    entered = threading.Event()

    def work() -> None:
        with operations.begin("dump", "a", ["a"], cancel):
            entered.set()
            while True:
                try:
                    cancel.check()
                except errors.Interrupted:
                    return

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    assert not operations.wait_empty(Deadline.after(0.05))
    operations.close()
    assert operations.wait_empty(Deadline.after(10))
    thread.join()
    with (
        pytest.raises(errors.Overloaded, match="shutting down"),
        operations.begin("dump", "a", ["a"], Cancel()),
    ):
        pass


class Machine(RuleBasedStateMachine):
    """Begins and ends operations in any order; a set of keys in use is the model."""

    begun = Bundle("begun")

    def __init__(self) -> None:
        super().__init__()
        self.operations = Operations(LIMIT)
        self.used: list[frozenset[int]] = []

    @rule(target=begun, keys=st.frozensets(st.integers(0, 5), min_size=1, max_size=3))
    def begin(self, keys: frozenset[int]) -> object:
        context = self.operations.begin("dump", str(sorted(keys)), sorted(keys), Cancel())
        if any(keys & other for other in self.used):
            with pytest.raises(errors.TargetBusy):
                context.__enter__()
            return multiple()
        if len(self.used) >= LIMIT:
            with pytest.raises(errors.Overloaded):
                context.__enter__()
            return multiple()
        context.__enter__()
        self.used.append(keys)
        return (context, keys)

    @rule(one=consumes(begun))
    def end(self, one: tuple[contextlib.AbstractContextManager[object], frozenset[int]]) -> None:
        context, keys = one
        context.__exit__(None, None, None)
        self.used.remove(keys)

    @invariant()
    def what_runs_is_what_was_begun(self) -> None:
        assert [each.keys for each in self.operations.running()] == self.used


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
