"""Hooks of pods that are cut together, and brought back together."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import errors
from agent.model.protocol import LEAVE_RUNNING
from tests.host.boxes import Boxes
from tests.host.groups import PROGRAM, Member, group_in
from tests.host.nodes import wait_for
from tests.host.test_container_network import echoing
from tests.host.test_hooks import LOG, noting

HOOKS = {
    "pre": [
        noting("group", scope="group"),
        noting("member", more="! [ -e /disk/fail ]"),
        {
            "name": "minor",
            "exec": ["sh", "-c", "[ ! -e /disk/minor ] || { echo why; false; }"],
            "onFailure": "ignore",
        },
    ],
    "post": [noting("resume"), noting("report", scope="group", when="decided")],
}


def noted(member: Member) -> list[str]:
    """What its hooks wrote since this was asked last."""
    path = member.box.root(LOG)
    lines = [line.strip() for line in path.read_text().splitlines()]
    path.write_text("")
    return lines


def test_hooks_of_a_group_surround_its_cut_and_its_restore(boxes: Boxes, tmp_path: Path) -> None:
    run = ("python3", "-c", PROGRAM)
    with echoing(), group_in(boxes, tmp_path) as group:
        group.hooks = HOOKS
        first = group.add("w-0-0", "a", "10.77.0.2", *run, "serve", "10.77.0.2")
        second = group.add("w-0-1", "b", "10.77.0.3", *run, "send", "10.77.0.2")
        members = [first, second]

        def idle() -> bool:
            return not any(node.operations.running() for node in group.nodes.values())

        for each in members:
            each.flows()
        second.box.root("/disk/minor").touch()
        done = group.dump(members, LEAVE_RUNNING)
        assert done.hook_problems == (
            "w-0-1: the hook 'minor' failed: it ended with status 1\nwhy",
        )
        second.box.root("/disk/minor").unlink()
        # Nobody waits for post hooks; nothing else is done to the pods while they run.
        wait_for(idle)
        assert noted(first) == [
            "group pre",
            "member pre",
            "resume post captured",
            "report post committed",
        ]
        assert noted(second) == ["member pre", "resume post captured"]

        second.box.root("/disk/fail").touch()
        with pytest.raises(errors.HookFailed, match="'member' failed: it ended with status 1 at w"):
            group.dump(members, LEAVE_RUNNING)
        wait_for(idle)
        # The other one's hook may have been begun or not.
        said = noted(first)
        assert said[-2:] == ["resume post aborted", "report post aborted"]
        assert said[0] == "group pre"
        assert noted(second) == ["member pre", "resume post aborted"]
        for each in members:
            each.flows()

        second.box.root("/disk/fail").unlink()
        epoch = group.dump(members).image.epoch
        new = [group.add("w-0-0", "b", "10.77.0.4"), group.add("w-0-1", "a", "10.77.0.5")]
        moved = {old.address: now.address for old, now in zip(members, new, strict=True)}
        group.restore(epoch, new, moved)
        wait_for(idle)
        # What was written before the stop came along; the pods that were ended heard no more.
        assert noted(new[0]) == [
            "group pre",
            "member pre",
            "resume post restored",
            "report post restored",
        ]
        assert noted(new[1]) == ["member pre", "resume post restored"]
        for each in new:
            each.flows()
