"""The memory of a group's pods is copied while they run; once that failed, the next checkpoint does
without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.engines.criu import hiding
from agent.model import ids
from agent.model.protocol import LEAVE_RUNNING
from agent.store.repository import Store
from agent.volumes.directory import DirectoryVolume
from tests.host.boxes import Boxes
from tests.host.groups import GROUP, Group, Member, group_in
from tests.host.test_container_network import echoing

_PROGRAM = """
import json, os, time
held = os.urandom(32 << 20)
number = 0
while True:
    number += 1
    print(json.dumps({'got': number, 'at': time.time()}), flush=True)
    time.sleep(0.01)
"""


def path_taken(group: Group, members: list[Member]) -> str:
    """By a checkpoint."""
    epoch = group.dump(members, LEAVE_RUNNING).image.epoch
    root = group.folder / "stores/default"
    store = Store.open(DirectoryVolume(str(root), create=False), create=False)
    reader = store.read(ids.group_name(GROUP), ids.epoch_id(epoch))
    (name,) = reader.members
    return str(reader.member(name).facts()["stop"]["path"])


def test_a_checkpoint_after_one_whose_short_stop_failed_takes_the_plain_way(
    boxes: Boxes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = hiding.Hiding._answer

    def spoiled(self: Any, call: Any) -> int | None:
        return None if answered(self, call) is None else -1

    with echoing(), group_in(boxes, tmp_path) as group:
        members = [group.add("w-0-0", "a", "10.77.0.2", "python3", "-c", _PROGRAM)]
        members[0].flows()
        with monkeypatch.context() as broken:
            broken.setattr(hiding.Hiding, "_answer", spoiled)
            with pytest.raises(errors.ShortStopFailed, match="w-0-0") as caught:
                group.dump(members, LEAVE_RUNNING)
            assert "again" in caught.value.hint
            members[0].flows()
            assert path_taken(group, members) == "plain"
        assert path_taken(group, members) == "precopy"
        members[0].flows()
