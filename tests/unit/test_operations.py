"""Operations without a cluster: who may run next, what is one and the same, and how each goes on
that lost its coordinator.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.model import operations
from agent.model.access import Caller
from agent.model.operations import Job, Kind, Next, Operation, Stage, State
from agent.model.protocol import Decision

ADA = Caller("ada", ("staff",), "u1", {"scopes": ("x", "y")})
IMAGE = {"name": "jobset.train@20260131-235959-0a1b2c"}


def operation(**changes: Any) -> Operation:
    given: dict[str, Any] = {
        "id": "a",
        "namespace": "team",
        "kind": Kind.EPOCH,
        "group": "jobset.train",
        "jobset": "train",
        "request": {"target": {"jobset": "train"}},
        "caller": ADA,
        "created_s": 1.0,
    }
    return Operation(**{**given, **changes})


# Documents.


def test_a_document_is_the_operation_that_it_was_made_of() -> None:
    plain = operation()
    full = operation(
        kind=Kind.MIGRATE,
        state=State.RUNNING,
        stage=Stage.ATTEMPTED,
        epoch="e",
        storage="s",
        attempt="0123456789abcdef",
        image=IMAGE,
        figures={"stop_s": 0.5},
        pods=({"identity": "a"},),
        error={"code": "x"},
        takeovers=2,
        tries=3,
        cancelling=True,
    )
    for each in (plain, full):
        document = json.loads(json.dumps(each.document()))
        assert operations.read(document) == each
        # One that a later version wrote.
        assert operations.read({**document, "new": 1}) == each


@pytest.mark.parametrize("broken", [None, [], {}, {"kind": "epoch"}, "text", 7])
def test_what_is_no_operation_is_told(broken: Any) -> None:
    with pytest.raises(errors.Corrupt):
        operations.read(broken)


@pytest.mark.parametrize("field", ["id", "kind", "state", "stage", "caller", "pods", "request"])
def test_an_operation_that_lacks_something_or_has_another_kind_of_it_is_none(field: str) -> None:
    document = operation().document()
    if field not in ("id", "request"):
        for value in (7, None):
            with pytest.raises(errors.Corrupt):
                operations.read({**document, field: value})
    del document[field]
    with pytest.raises(errors.Corrupt):
        operations.read(document)


# Keys.


def test_a_key_means_one_operation_of_its_caller_in_its_namespace() -> None:
    ids = [
        operations.identity(caller, namespace, key)
        for caller in (ADA, dataclasses.replace(ADA, user="bob"), dataclasses.replace(ADA, uid=""))
        for namespace in ("team", "other")
        for key in ("k", "l", '["')
    ]
    assert len(set(ids)) == len(ids)
    assert operations.identity(dataclasses.replace(ADA, groups=()), "team", "k") == ids[0]
    known = operation()
    operations.same_request(known, operation(id="b", created_s=2.0))
    for other in ({"request": {"target": {"jobset": "other"}}}, {"kind": Kind.RESTORE}):
        with pytest.raises(errors.InvalidInput):
            operations.same_request(known, operation(**other))


def test_each_coordinator_is_later_than_the_one_before_whatever_its_clock_says() -> None:
    assert operations.ordered(operation(), 100.0) == 100.0
    for now_s in (0.0, 100.0, 100.5, 500.0):
        assert operations.ordered(operation(ordered_s=100.0), now_s) >= max(now_s, 102.0)


# Turns.


@st.composite
def _known(draw: st.DrawFn) -> list[Operation]:
    count = draw(st.integers(0, 8))
    return [
        operation(
            id=str(number),
            group=draw(st.sampled_from("ab")),
            namespace=draw(st.sampled_from("xy")),
            created_s=float(draw(st.integers(0, 3))),
            state=draw(st.sampled_from([State.QUEUED, State.SUCCEEDED, State.FAILED])),
        )
        for number in range(count)
    ]


@given(_known(), st.integers(1, 4), st.data())
def test_every_operation_has_its_turn_and_no_group_has_two(
    known: list[Operation], limit: int, data: st.DataObject
) -> None:
    """Begin what may begin and end any of them, until nothing is left."""
    begun: list[Operation] = []
    while True:
        for each in operations.runnable(known, limit):
            known[known.index(each)] = each.changed(state=State.RUNNING)
            begun.append(each)
        running = [each for each in known if each.state is State.RUNNING]
        assert len(running) <= limit
        assert len({(each.namespace, each.group) for each in running}) == len(running)
        if not running:
            break
        ending = data.draw(st.sampled_from(running))
        known[known.index(ending)] = ending.changed(state=State.SUCCEEDED)
    assert all(each.over for each in known)
    for place in {(each.namespace, each.group) for each in begun}:
        ages = [
            (each.created_s, each.id) for each in begun if (each.namespace, each.group) == place
        ]
        assert ages == sorted(ages)


@given(_known())
def test_what_is_in_the_way_has_not_ended_and_is_the_oldest(known: list[Operation]) -> None:
    found = operations.in_the_way(known, "x", "a")
    others = [
        each for each in known if (each.namespace, each.group) == ("x", "a") and not each.over
    ]
    assert (found is None) == (not others)
    if found is not None:
        assert found in others
        assert all(found.created_s <= each.created_s for each in others)


def test_what_ended_is_removed_when_it_is_old_or_there_is_too_much_of_it() -> None:
    known = [operation(id=str(age), state=State.SUCCEEDED, ended_s=100.0 - age) for age in range(5)]
    known.append(operation(id="runs", state=State.RUNNING, created_s=0.0))
    assert sorted(operations.removable(known, 100.0, 3.0, 10)) == ["3", "4"]
    assert sorted(operations.removable(known, 100.0, 50.0, 2)) == ["2", "3", "4"]
    assert operations.removable(known, 100.0, 50.0, 10) == []


def test_one_namespace_takes_neither_all_turns_nor_all_that_is_kept() -> None:
    loud = [
        operation(id=f"l{number}", namespace="loud", group=f"g{number}", created_s=float(number))
        for number in range(9)
    ]
    quiet = operation(id="quiet", namespace="quiet", created_s=100.0)
    assert [each.id for each in operations.runnable([*loud, quiet], 4)] == [
        *("l0", "l1", "l2"),
        "quiet",
    ]
    over = [each.changed(state=State.SUCCEEDED, ended_s=100.0) for each in loud]
    old = quiet.changed(state=State.SUCCEEDED, ended_s=50.0)
    assert "quiet" not in operations.removable([*over, old], 200.0, 1e6, 5)


# Takeovers: every case there is.


def every_case() -> list[tuple[Operation, Decision | None, Job | None]]:
    found = []
    for kind, stage, jobset, tries, cancelling in itertools.product(
        Kind, Stage, ("train", ""), range(1, operations.TRIES + 1), (False, True)
    ):
        if not jobset and (kind is Kind.MIGRATE or stage is Stage.INTENDED):
            continue
        if kind is Kind.EPOCH and stage in (Stage.INTENDED, Stage.ATTEMPTED):
            continue
        if kind is Kind.RESTORE and stage in (Stage.NAMED, Stage.COMMITTED):
            continue
        image = None if stage in (Stage.BEGUN, Stage.NAMED) else IMAGE
        made = operation(
            kind=kind,
            stage=stage,
            jobset=jobset,
            tries=tries,
            cancelling=cancelling,
            image=image,
            state=State.RUNNING,
        )
        asks = stage in (Stage.NAMED, Stage.ATTEMPTED)
        for decision in list(Decision) if asks else [None]:
            looks = operations.looks_at_job(made, decision)
            found += [(made, decision, job) for job in (list(Job) if looks else [None])]
    return found


def test_nothing_is_ended_but_what_stands_still_for_the_operation() -> None:
    """Bringing back ends what is there: it follows only where the job was seen to stand still."""
    for each, decision, job in every_case():
        if operations.goes_on(each, decision, job) is Next.BRING_BACK:
            assert job is Job.STANDS, (each, decision)
            assert each.kind is not Kind.EPOCH


def test_what_was_done_is_not_done_again() -> None:
    for each, decision, job in every_case():
        following = operations.goes_on(each, decision, job)
        if each.kind is Kind.EPOCH and (
            decision is Decision.COMMITTED or each.stage is Stage.COMMITTED
        ):
            assert following is Next.FINISH
        if each.stage is Stage.ATTEMPTED and decision is Decision.COMMITTED:
            assert following is Next.CONCLUDE
        if following in (Next.FINISH, Next.CONCLUDE):
            assert decision is Decision.COMMITTED or each.stage is Stage.COMMITTED


def test_a_job_that_stands_still_is_always_brought_back_whatever_was_asked_since() -> None:
    for each, decision, job in every_case():
        if job is Job.STANDS:
            assert operations.goes_on(each, decision, job) is Next.BRING_BACK


def test_it_is_begun_anew_only_where_nothing_is_left_of_it_and_not_for_ever() -> None:
    for each, decision, job in every_case():
        following = operations.goes_on(each, decision, job)
        if following is Next.BEGIN:
            assert each.tries < operations.TRIES
            assert not each.cancelling
            assert job is not Job.STANDS
            assert each.stage is not Stage.COMMITTED
            assert not (each.stage is Stage.ATTEMPTED and each.jobset)
        if following is Next.CANCEL:
            assert each.cancelling
            assert job is not Job.STANDS
        if following is Next.GIVE_UP:
            assert job is Job.RUNS or each.tries == operations.TRIES


def test_only_what_leaves_the_job_as_it_was_can_be_given_up() -> None:
    for each, _, _ in every_case():
        assert each.cancellable == (each.stage in (Stage.BEGUN, Stage.NAMED))
    assert not operation(state=State.SUCCEEDED).cancellable
