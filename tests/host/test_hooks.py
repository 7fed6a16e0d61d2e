"""Hooks of pods: real containers, dumped and restored through the node API."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.model import optin
from agent.node import plan
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
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                assert b"CKPT_AGENT_HOOK" not in Path(f"/proc/{pid}/environ").read_bytes()


class Jobs:
    def __init__(self, node: Node, boxes: Boxes) -> None:
        self.node = node
        self.boxes = boxes

    def start(self, name: str, wanted: dict[str, Any] | str, *argv: str, **options: Any) -> Job:
        box = self.boxes.start(name, *(argv or ("sh", "-c", COUNTER)), **options)
        return self.add(box, wanted)

    def add(self, box: Box, wanted: dict[str, Any] | str) -> Job:
        text = wanted if isinstance(wanted, str) else json.dumps(wanted)
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
    job.dump()
    assert job.noted == [
        "first pre",
        "second pre",
        "resume post captured",
        "report post committed",
    ]
    job.goes_on()


def test_an_epoch_that_a_hook_gives_up_costs_nothing_and_later_hooks_do_not_begin(
    jobs: Jobs,
) -> None:
    job = jobs.start(
        "job",
        {
            "pre": [
                noting("first"),
                noting("bad", more="echo no; echo why >&2; exit 3"),
                noting("x"),
            ],
            "post": [noting("resume"), noting("report", when="decided")],
        },
    )
    with pytest.raises(errors.HookFailed) as failed:
        job.dump()
    assert "'bad' failed: it ended with status 3" in failed.value.message
    assert failed.value.facts["output"] == "why"
    assert job.noted == ["first pre", "bad pre", "resume post aborted", "report post aborted"]
    job.goes_on()


def test_a_failure_that_is_ignored_and_one_after_the_stop_are_told_and_fail_nothing(
    jobs: Jobs,
) -> None:
    job = jobs.start(
        "job",
        {
            "pre": [noting("bad", more="exit 3", onFailure="ignore")],
            "post": [noting("resume", more="echo secret; exit 4"), noting("last")],
        },
    )
    outcome = job.dump()
    assert job.noted == ["bad pre", "resume post captured", "last post captured"]
    assert [text.splitlines() for text in outcome.hook_problems] == [
        ["the hook 'bad' failed: it ended with status 3"],
        ["the hook 'resume' failed: it ended with status 4", "secret"],
    ]
    wait_for(lambda: len(jobs.node.api.events) >= 3)
    told = [event for event in jobs.node.api.events if event["reason"] == "HookFailed"]
    assert [event["type"] for event in told] == ["Warning", "Warning"]
    assert "secret" not in json.dumps(jobs.node.api.events)
    job.goes_on()


@pytest.mark.parametrize("policy", ["abort", "ignore"])
def test_a_hook_that_hangs_is_killed_at_its_deadline_with_all_that_it_started(
    jobs: Jobs, policy: str
) -> None:
    # One that ignores being asked, and one that has left for a session of its own.
    hang = "trap '' TERM; setsid sh -c 'sleep 1000 & sleep 1000' & while :; do sleep 1; done"
    hook = noting("hang", more=hang, deadlineSeconds=5.5, onFailure=policy)
    job = jobs.start("job", {"pre": [hook], "post": [noting("resume")]})
    if policy == "abort":
        with pytest.raises(errors.HookFailed, match=r"'hang' did not end within 5\.5 s"):
            job.dump()
        assert job.noted == ["hang pre", "resume post aborted"]
    else:
        job.dump()
        assert job.noted == ["hang pre", "resume post captured"]
    job.goes_on()


def test_what_a_hook_leaves_behind_is_ended(jobs: Jobs) -> None:
    leaving = noting("leaves", more="(sleep 1000 >/dev/null 2>&1 &)")
    job = jobs.start("job", {"pre": [leaving]})
    job.dump()
    job.goes_on()


def test_hooks_of_one_step_run_at_once(jobs: Jobs) -> None:
    # Each waits until the other is there.
    def meets(name: str, other: str) -> dict[str, Any]:
        wait = f"touch /disk/{name}; until [ -e /disk/{other} ]; do sleep 0.05; done"
        return {"name": name, "exec": ["sh", "-c", wait]}

    job = jobs.start("job", {"pre": [[meets("a", "b"), meets("b", "a")], noting("then")]})
    job.dump()
    assert job.noted == ["then pre"]
    job.goes_on()


def test_a_hook_that_kills_its_container_is_a_failure_of_the_dump_and_of_nothing_else(
    jobs: Jobs,
) -> None:
    killing = noting(
        "kills", more="kill -9 $(ps -o ppid= -p 3 2>/dev/null) 2>/dev/null; kill -9 -1"
    )
    job = jobs.start("job", {"pre": [killing], "post": [noting("resume")]})
    with pytest.raises(errors.CkptError):
        job.dump()
    job.box.wait()
    other = jobs.start("other", {"pre": [noting("first")]})
    other.dump()
    other.goes_on()


@pytest.mark.parametrize(
    "wanted",
    [
        "{",
        '{"pre": [{"name": "x"}]}',
        '{"pre": [{"name": "x", "exec": ["true"], "container": "no"}]}',
    ],
)
def test_hooks_that_make_no_sense_refuse_the_dump_before_anything_is_touched(
    jobs: Jobs, wanted: str
) -> None:
    job = jobs.start("job", wanted)
    with pytest.raises(errors.InvalidInput, match=r"annotation ckpt-agent\.dev/hooks") as refused:
        job.dump()
    assert refused.value.hint
    job.goes_on()


def test_a_command_has_no_more_rights_than_its_container_and_knows_where_it_is(jobs: Jobs) -> None:
    show = "id -u; grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status; echo $OWN"
    told = "echo $CKPT_AGENT_POD $CKPT_AGENT_NAMESPACE $CKPT_AGENT_NODE $CKPT_AGENT_IMAGE"
    hook = {"name": "show", "exec": ["sh", "-c", f"({show}; {told}) > /disk/shown"]}
    job = jobs.start("job", {"post": [hook]}, env=["OWN=container's"], capabilities=["CAP_KILL"])
    job.dump()
    shown = job.box.root("/disk/shown").read_text().splitlines()
    job.boxes.runc("exec", job.box.id, "sh", "-c", f"({show}) > /disk/plain")
    assert shown[:-1] == job.box.root("/disk/plain").read_text().splitlines()
    assert "CapEff:\t0000000000000020" in shown
    assert shown[-1] == "job default n1"


# Has a device open until a file says otherwise, as a hook makes it let go.
DEVICE = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
n = 0
while True:
    if os.path.exists('/disk/down') and fd >= 0:
        os.close(fd)
        fd = -1
        open('/disk/is-down', 'w')
    time.sleep(0.02)
    n += 1
    print(n, flush=True)
"""


@pytest.mark.parametrize(
    ("device", "hook"),
    [("/dev/infiniband/uverbs0", "teardown-rdma"), ("/dev/nvidia0", "release-gpu")],
)
def test_a_device_in_use_is_refused_without_a_hook_and_let_go_of_by_one(
    jobs: Jobs, device: str, hook: str
) -> None:
    waiting = f'until [ -e {device} ]; do sleep 0.05; done; exec python3 -c "$0" {device}'
    box = jobs.boxes.start("job", "sh", "-c", waiting, DEVICE)
    # No such device is here; what counts is the file's name. The null device has no state.
    box.root(device).parent.mkdir(exist_ok=True)
    os.mknod(box.root(device), stat.S_IFCHR | 0o666, os.makedev(1, 3))
    wait_for(lambda: box.log.read_text())
    job = jobs.add(box, {"pre": [{"name": "other", "exec": ["touch", "/disk/other"]}]})
    with pytest.raises(errors.TargetUnsuitable, match=device) as refused:
        job.dump()
    assert hook in refused.value.hint
    assert not box.root("/disk/other").exists()

    def planned(*hooks: str) -> list[str]:
        container = dataclasses.replace(box.container, hooks=frozenset(hooks))
        found = plan.plan_containers([container], lambda _: (), ghost_limit_bytes=1 << 20)
        return [each.code for each in found.blockers]

    assert ("gpu" in planned("other")) == (hook == "release-gpu")
    assert "gpu" not in planned(hook)

    lying = {"name": hook, "exec": ["true"]}
    with pytest.raises(errors.DumpFailed, match="after all pre hooks, process"):
        jobs.add(box, {"pre": [lying]}).dump()
    job.goes_on()

    down = "touch /disk/down; until [ -e /disk/is-down ]; do sleep 0.02; done"
    jobs.add(box, {"pre": [{"name": hook, "exec": ["sh", "-c", down]}]}).dump()
    job.goes_on()


STEPS = """
import sys, time
sys.path.insert(0, '/hooks')
from quiesce import Boundary
with Boundary('/disk/quiesce.sock', longest_s=60) as boundary:
    step = 0
    while True:
        step += 1
        time.sleep(0.02)
        print('step', step, flush=True)
        if found := boundary.reached():
            print('held', step, found.outcome, found.told['now']['pod'], flush=True)
"""


def test_a_training_loop_is_held_at_a_step_until_it_runs_again_here_and_in_another_pod(
    jobs: Jobs,
) -> None:
    def calling(name: str) -> dict[str, Any]:
        return {"name": name, "unix": {"socket": "/disk/quiesce.sock", "path": f"/{name}"}}

    source = str(Path(__file__).parents[2] / "hooks")
    mounts = [
        {"destination": "/hooks", "type": "bind", "source": source, "options": ["bind", "ro"]}
    ]
    wanted = {"pre": [calling("quiesce")], "post": [calling("resume")]}
    job = jobs.start("job", wanted, "python3", "-c", STEPS, mounts=mounts)
    wait_for(lambda: "step 3" in job.box.log.read_text())
    outcome = job.dump()
    assert outcome.hook_problems == ()
    wait_for(lambda: "held" in job.box.log.read_text())
    held = next(line for line in job.box.log.read_text().splitlines() if "held" in line)
    step = held.split()[1]
    assert held == f"held {step} captured job"
    job.goes_on()

    box = jobs.boxes.placeholder("other", mounts=mounts)
    other = jobs.add(box, wanted)
    with jobs.node.caller(*nodes.VERBS) as agent:
        image = f"job@{outcome.image.epoch}"
        done = agent.restore("default", image, "other", pod_uid=other.uid, deadline_s=60.0)
    assert done.hook_problems == ()
    # It stood where it was asked to stand, and was told at once where it is now.
    wait_for(lambda: len(box.log.read_text().splitlines()) > 3)
    assert box.log.read_text().splitlines()[0] == f"held {step} restored other"
    other.goes_on()
