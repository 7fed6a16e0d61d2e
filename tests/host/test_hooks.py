"""Hooks of pods: real containers, dumped and restored through the node API."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.model import optin
from agent.podengines import hold_state
from tests.fakes import cri
from tests.host import nodes
from tests.host.boxes import Box, Boxes
from tests.host.groups import BoxEngines
from tests.host.nodes import Node, wait_for

COUNTER = "i=0; while sleep 0.02; do i=$((i+1)); echo $i; done"
LOG = "/disk/hooks"


def noting(name: str, *, more: str = "", **fields: Any) -> dict[str, Any]:
    """A hook that writes a line about itself."""
    line = f'echo "$CKPT_AGENT_HOOK $CKPT_AGENT_PHASE $CKPT_AGENT_OUTCOME" >> {LOG}'
    return {"name": name, "exec": ["sh", "-c", f"{line}; {more or 'true'}"], **fields}


@dataclasses.dataclass
class Job:
    """A pod of one container that counts, with hooks, and its node."""

    node: Node
    boxes: Boxes
    box: Box
    pod: str
    uid: str

    def dump(self, **more: Any) -> Any:
        with self.node.caller(*nodes.VERBS) as agent:
            return agent.dump("default", self.pod, pod_uid=self.uid, deadline_s=60.0, **more)

    @property
    def noted(self) -> list[str]:
        """What the hooks wrote."""
        path = self.box.root(LOG)
        return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []

    def goes_on(self) -> None:
        """It counts, and nothing of a hook runs in it."""
        before = len(self.box.log.read_text().splitlines())
        wait_for(lambda: len(self.box.log.read_text().splitlines()) > before + 2)
        for pid in self.box.pids():
            path = Path(f"/proc/{pid}/environ")
            assert b"CKPT_AGENT_HOOK" not in (path.read_bytes() if path.exists() else b"")


class Jobs:
    def __init__(self, node: Node, boxes: Boxes) -> None:
        self.node = node
        self.boxes = boxes

    def start(self, name: str, hooks: dict[str, Any] | str, *argv: str, **options: Any) -> Job:
        box = self.boxes.start(name, *(argv or ("sh", "-c", COUNTER)), **options)
        return self.add(box, hooks)

    def add(self, box: Box, hooks: dict[str, Any] | str) -> Job:
        text = hooks if isinstance(hooks, str) else json.dumps(hooks)
        metadata = {"annotations": {optin.HOOKS: text}}
        uid = self.node.api.put(box.name, nodes.NODE, containers=("main",), metadata=metadata)
        config = json.loads((box.folder / "config.json").read_text())
        config["root"]["path"] = str(box.rootfs)
        info = {"sandboxID": uid, "pid": box.pid, "runtimeSpec": config}
        self.node.cri.containers.append(
            cri.FakeContainer(box.name, uid, "main", box.pid, info=info, execute=box.execute)
        )
        watch = self.node.watch
        wait_for(lambda: (found := watch.get("default", box.name)) and found.uid == uid)
        return Job(self.node, self.boxes, box, box.name, uid)


@pytest.fixture
def jobs(boxes: Boxes, tmp_path: Path) -> Iterator[Jobs]:
    engines = BoxEngines(boxes, tmp_path)
    with nodes.running(tmp_path, None, state=hold_state, engines=engines) as node:
        yield Jobs(node, boxes)


def test_commands_run_before_the_stop_and_after_it_each_once_and_in_order(jobs: Jobs) -> None:
    job = jobs.start(
        "job",
        {
            "pre": [noting("first", more="sleep 0.2"), noting("second")],
            "post": [noting("resume"), noting("report", when="decided")],
        },
    )
    outcome = job.dump()
    assert job.noted == [
        "first pre",
        "second pre",
        "resume post captured",
        "report post committed",
    ]
    assert outcome.stop_s < 10
    job.goes_on()
