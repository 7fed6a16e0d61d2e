"""What a caller may tell of a group in its image: a JobSet only if they might create it too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from agent import errors
from agent.model import jobset
from agent.model.access import Caller, Right
from agent.node.contribution import Contribution
from agent.node.epochs import EpochService
from agent.rpc import convert
from agent.rpc.calls import Call
from agent.rpc.v1 import epochs_pb2 as api
from agent.store.repository import Store
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.images import GROUP, NOW_S

if TYPE_CHECKING:
    from agent.node.service import Parts

JOBSET = {"apiVersion": jobset.API, "kind": "JobSet", "metadata": {"name": "train"}}


class Context:
    """A caller who waits for ever."""

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> None:
        raise AssertionError("nobody ends the call")

    def add_callback(self, callback: object) -> bool:
        return True


def committed(refusal: errors.CkptError | None) -> tuple[dict[str, Any], list[Right]]:
    """The facts of an image whose dump told of a JobSet, and which rights were asked for."""
    asked: list[Right] = []

    def authorize(caller: Caller, right: Right) -> None:
        assert caller.user == "ada"
        asked.append(right)
        if refusal is not None:
            raise refusal

    store = Store.open(MemoryVolume(), create=True)
    storages = SimpleNamespace(for_namespace=lambda *_: "default", make=lambda *_: store)
    parts = SimpleNamespace(settings=None, storages=storages, authorize=authorize)
    epoch = store.new_epoch(GROUP, now_s=NOW_S)
    with store.join(GROUP, epoch, now_s=NOW_S) as writer:
        images.write(writer, images.simple())
        given = Contribution(writer.finish().encode(), (), ())
        request = api.DecideEpochRequest(
            namespace="team",
            group=GROUP,
            epoch=epoch,
            wish=api.DECISION_COMMITTED,
            contributions=[given.encode()],
            facts=convert.to_struct({"jobset": "train", jobset.TEMPLATE: JOBSET}),
        )
        service = EpochService(cast("Parts", parts))
        answer = service.decide_epoch(request, iter(()), Call(Caller("ada"), Context()))
    assert answer.decision == api.DECISION_COMMITTED
    (summary,) = store.epochs(GROUP)
    return dict(summary.facts), asked


def test_a_jobset_is_kept_of_who_may_create_one() -> None:
    facts, asked = committed(None)
    assert facts[jobset.TEMPLATE] == JOBSET
    assert [str(each) for each in asked] == ["create jobsets.jobset.x-k8s.io in namespace team"]


@pytest.mark.parametrize("refusal", [errors.Forbidden("no"), errors.Unreachable("cannot be asked")])
def test_of_anybody_else_the_image_is_kept_without_it(refusal: errors.CkptError) -> None:
    facts, _ = committed(refusal)
    assert jobset.TEMPLATE not in facts
    assert facts["jobset"] == "train"
