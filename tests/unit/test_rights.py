"""Which right each call needs."""

from __future__ import annotations

import pytest

from agent import errors
from agent.model.access import Right
from agent.rpc import rights
from agent.rpc.v1 import coordinator_pb2, epochs_pb2, node_pb2

EPOCH = "20260131-235959-0a1b2c"


def named(course: str = "COURSE_RESTORE", **changes: str) -> epochs_pb2.TakePartRequest:
    made = epochs_pb2.TakePartRequest(
        namespace="team-a", group="jobset.train", epoch=EPOCH, course=course
    )
    for field, value in changes.items():
        setattr(made, field, value)
    return made


def test_there_is_a_right_for_every_method_and_for_no_other() -> None:
    services = [
        *node_pb2.DESCRIPTOR.services_by_name.values(),
        *epochs_pb2.DESCRIPTOR.services_by_name.values(),
        *coordinator_pb2.DESCRIPTOR.services_by_name.values(),
    ]
    methods = {(service.name, method.name) for service in services for method in service.methods}
    assert set(rights._RIGHTS) == methods
    with pytest.raises(errors.Forbidden):
        rights.needed("Epochs", "Erase", named(), "n1")


@pytest.mark.parametrize("course", ["COURSE_LEAVE_RUNNING", "COURSE_EVACUATE"])
def test_who_takes_part_in_a_dump_creates_an_image(course: str) -> None:
    assert rights.needed("Epochs", "TakePart", named(course), "n1") == Right(
        "create", "images", "team-a"
    )


def test_who_takes_part_in_a_restore_restores_that_very_image() -> None:
    wanted = Right("restore", "images", "team-a", f"jobset.train@{EPOCH}")
    assert rights.needed("Epochs", "TakePart", named(), "n1") == wanted
    decide = epochs_pb2.DecideRestoreRequest(
        namespace="team-a", group="jobset.train", epoch=EPOCH, wish="DECISION_ABANDONED"
    )
    assert rights.needed("Epochs", "DecideRestore", decide, "n1") == wanted


@pytest.mark.parametrize(
    "changes", [{"namespace": "a/b"}, {"group": "../train"}, {"epoch": "newest"}]
)
def test_a_name_that_can_mean_something_else_is_refused_before_anybody_is_asked(
    changes: dict[str, str],
) -> None:
    with pytest.raises(errors.InvalidInput):
        rights.needed("Epochs", "TakePart", named(**changes), "n1")


def test_what_begins_an_operation_needs_its_right_where_it_is_asked_for() -> None:
    asking = coordinator_pb2.Asking(namespace="team-a")
    for method, request, verb in (
        ("CreateEpoch", coordinator_pb2.CreateEpochRequest(asking=asking), "create"),
        ("Restore", coordinator_pb2.RestoreGroupRequest(asking=asking), "restore"),
        ("Migrate", coordinator_pb2.MigrateRequest(asking=asking), "restore"),
    ):
        assert rights.needed("Coordinator", method, request, "") == Right(verb, "images", "team-a")
