"""What a hook over gRPC is told: the same as any other."""

from __future__ import annotations

from google.protobuf import json_format

from agent.model.hooks import Outcome, Phase, Told
from agent.model.pods import Placement
from agent.rpc import hookclient

NOW = Placement("job", "u2", "n2", ("10.0.0.2", "fd00::2"))
WAS = Placement("job", "u1", "n1", ("10.0.0.1",))


def test_a_message_has_what_a_request_has_for_every_phase_and_outcome() -> None:
    for phase in Phase:
        for outcome in (None, *Outcome):
            for was in (None, WAS):
                told = Told("ask", phase, "team", NOW, outcome, "job@e", was)
                found = json_format.MessageToDict(hookclient.message(told))
                assert found.pop("phase") == f"HOOK_PHASE_{phase.name}"
                named = f"HOOK_OUTCOME_{outcome.name}" if outcome else None
                assert found.pop("outcome", None) == named
                document = told.document()
                del document["phase"], document["outcome"]
                assert found == {key: each for key, each in document.items() if each is not None}
