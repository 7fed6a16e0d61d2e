"""Which of an agent's sessions a coordinator's words reach: only those that its right was for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent import errors
from agent.model import ids
from agent.node.epochs import EpochService
from agent.node.service import Parts
from agent.node.storages import Found
from agent.rpc.calls import Call
from agent.rpc.v1 import epochs_pb2 as api
from agent.settings import Settings
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume

GROUP, EPOCH, ATTEMPT = "jobset.train", "20260131-235959-0a1b2c", "1" * 16


def told(service: EpochService, **changes: Any) -> str:
    """What the agent answers to a coordinator of the restore, or to one that differs from it."""
    request = api.TakePartRequest(
        **{
            "namespace": "team-a",
            "group": GROUP,
            "epoch": EPOCH,
            "course": api.COURSE_RESTORE,
            "pod": "w-0",
            "pod_uid": "u",
            "member": "w-0-0",
            "step": api.STEP_FILL,
            "token": 1,
            "wait_s": 5.0,
            "attempt": api.Attempt(id=ATTEMPT),
            **changes,
        }
    )
    return service.take_part(request, cast("Call", None)).problem


@pytest.fixture
def service() -> EpochService:
    """An agent that takes part in the restore of an image, which it does not find."""
    store = Store.open(MemoryVolume(), create=True)
    found = Found("default", store, ids.group_name(GROUP), ids.epoch_id(EPOCH))
    storages = SimpleNamespace(find=lambda *given: found)
    parts = SimpleNamespace(settings=Settings(), storages=storages, pods=None, work=None)
    made = EpochService(cast("Parts", parts))
    assert "there is no epoch" in told(made, step=api.STEP_PREPARE)
    return made


def test_the_coordinator_of_the_restore_is_heard_again(service: EpochService) -> None:
    assert "there is no epoch" in told(service)


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "team-b"},
        {"pod_uid": "v"},
        {"course": api.COURSE_EVACUATE},
        {"group": "jobset.other"},
        {"epoch": "20260131-235959-0a1b2d"},
        {"attempt": api.Attempt(id="2" * 16)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_one_that_differs_in_anything_is_not(
    service: EpochService, changes: dict[str, Any]
) -> None:
    assert told(service, **changes) == "this agent knows nothing of the epoch"


def test_a_dump_cannot_be_named_so_that_it_is_taken_for_the_restore(service: EpochService) -> None:
    with pytest.raises(errors.InvalidInput, match="epoch"):
        told(service, course=api.COURSE_EVACUATE, epoch=f"restore {ATTEMPT}")
