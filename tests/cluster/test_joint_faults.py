"""Faults while the pods of a JobSet stand still together, on the real cluster: whoever is left runs
again soon, nothing of the epoch can be restored, and the job trains on without a gap.

Most tests share one JobSet, which must have outlived them all. To meet it standing still, CRIU is
stopped at one of the nodes as soon as the kernel says that it traces the rank there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.cli import exits
from agent.host import clock
from agent.model import optin
from tests.cluster import leftovers
from tests.cluster.cluster import Cluster, Node
from tests.cluster.midway import begun, meet, processes, stands, told
from tests.cluster.ownvolume import OwnVolume
from tests.cluster.test_cli_cluster import CHECKOUT, ckpt
from tests.cluster.test_faults import cut_off, ready
from tests.cluster.test_jobset import Training, jobset
from tests.cluster.test_jobset_restore import pods, training
from tests.cluster.test_node_agent import (
    agent_pids,
    agent_pod,
    operations,
    reasons,
    wait_until_ready,
)

Json = dict[str, Any]

# A member that hears nothing lets go after five seconds, its coordinator waits three for one that
# is silent and half as long for one that is gone; an agent that stands still is ended after ten.
# The rest is what a busy machine takes.
SOON_S = 25.0
# While this file is there, an epoch waits before it stops anybody.
PAUSE = "/tmp/pause"
PAUSING = {
    "name": "pause",
    "exec": ["sh", "-c", f"while [ -e {PAUSE} ]; do sleep 0.05; done"],
    "deadlineSeconds": 120,
}
# What this file says happens to a hook.
SPOIL = "/tmp/spoil"
SPOILED = {
    "name": "spoiled",
    "exec": [
        *("sh", "-c"),
        f"case $(cat {SPOIL} 2>/dev/null) in fails) exit 3;; hangs) exec sleep 600;; esac",
    ],
    "deadlineSeconds": 2,
}


class Ranks:
    """The training with its ranks by the node that they are on."""

    def __init__(self, cluster: Cluster, namespace: str, document: Json | None = None) -> None:
        self.cluster, self.namespace = cluster, namespace
        self.training = Training(cluster, namespace, document)
        self.missed: list[str] = []

    def dump(self, *more: str) -> subprocess.Popen[str]:
        return begun(self.cluster, "dump", "jobset/train", "-n", self.namespace, *more)

    def on(self, node: Node) -> list[int]:
        """The processes of the pod on a node, hold first."""
        (name,) = (
            each["metadata"]["name"]
            for each in self.training.pods().values()
            if each["spec"]["nodeName"] == node.name
        )
        return processes(self.cluster, self.namespace, name)

    def images(self) -> list[str]:
        return self.training.images()

    def names(self) -> list[str]:
        return [each["metadata"]["name"] for each in self.training.pods().values()]

    def paused(self) -> subprocess.Popen[str]:
        """An epoch that waits before it stops anybody, until ``PAUSE`` is gone from all pods."""
        for name in self.names():
            self.cluster.kubectl("exec", name, "-n", self.namespace, "--", "touch", PAUSE)
        dump = self.dump()
        meet(dump, lambda: all(map(operations, self.cluster.nodes.values())))
        return dump

    def go_on(self) -> None:
        for name in self.names():
            self.cluster.kubectl("exec", name, "-n", self.namespace, "--", "rm", PAUSE)


def runs_soon(cluster: Cluster, *pids: int) -> float:
    """Wait until all of them run; how long that took, in seconds."""
    began_s = time.monotonic()
    cluster.wait_for("the ranks to run", lambda: not any(map(stands, pids)), SOON_S, 0.05)
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    return time.monotonic() - began_s


@dataclasses.dataclass
class Standing:
    """An epoch that cannot go on: its program, and the CRIU that was stopped."""

    dump: subprocess.Popen[str]
    criu: int


@contextlib.contextmanager
def standing(ranks: Ranks, at: Node) -> Iterator[Standing]:
    """While all ranks stand still for an epoch: the one of ``at`` until the context is left, the
    other because it waits for that.
    """
    *_, here = ranks.on(at)
    *_, there = ranks.on(ranks.cluster.other_node(at.name))
    for _ in range(5):
        dump = ranks.dump()
        criu = 0
        while dump.poll() is None and not criu:
            criu = stands(here)
            time.sleep(0.0005)
        if criu:
            _signal([criu], signal.SIGSTOP)
            try:
                both = clock.wait_until(lambda: bool(stands(there)), clock.Deadline.after(3))
                if both and stands(here):
                    yield Standing(dump, criu)
                    return
            finally:
                _signal([criu], signal.SIGCONT)
        # It was met too late.
        said = told(dump)
        ranks.missed += [said["name"]] if dump.returncode == exits.DONE else []
    pytest.fail("the ranks were never met standing still")


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@pytest.fixture(scope="module")
def ranks(agents: Cluster) -> Iterator[Ranks]:
    """Two ranks, one on each node, that train without end."""
    name = f"joint-{secrets.token_hex(4)}"
    agents.kubectl("create", "namespace", name)
    account = ("serviceaccount", "default", "-n", name)
    agents.wait_for("the default ServiceAccount", lambda: agents.get(*account), 30)
    try:
        document = jobset(name)
        (job,) = document["spec"]["replicatedJobs"]
        metadata = job["template"]["spec"]["template"]["metadata"]
        metadata["annotations"] = {optin.HOOKS: json.dumps({"pre": [PAUSING, SPOILED]})}
        yield Ranks(agents, name, document)
    finally:
        agents.kubectl("delete", "namespace", name, "--wait=false")
        agents.kubectl("delete", "pods", "--all", "-n", name, "--timeout=90s")


@pytest.fixture
def unharmed(agents: Cluster, ranks: Ranks) -> Iterator[None]:
    """After the test no step is missing or came twice, no image is more than there was, and both
    nodes have what they had before.
    """
    before, images, missed = leftovers.of_all(agents), ranks.images(), len(ranks.missed)
    yield
    ranks.training.goes_on()
    assert ranks.images() == [*images, *ranks.missed[missed:]]
    leftovers.assert_none(agents, before)


def test_a_node_that_is_cut_off_and_the_others_run_again_by_themselves(
    agents: Cluster, ranks: Ranks, unharmed: None
) -> None:
    node = agents.node("n2")
    every = [pid for each in agents.nodes.values() for pid in ranks.on(each)]
    with contextlib.ExitStack() as stack:
        with standing(ranks, node) as met:
            stack.enter_context(cut_off(agents, "n2"))
        # CRIU works on; what it has to say to the coordinator arrives no more.
        runs_soon(agents, *every)
        said = told(met.dump)
        assert met.dump.returncode in (exits.FAILED, exits.ENVIRONMENT), said
        assert said["facts"]["member"].startswith("worker-0-"), said
        assert said["hint"], said
    for each in agents.nodes.values():
        ready(agents, each, "kubelet")


def test_when_an_agent_is_killed_the_others_run_again_and_then_its_own_rank(
    agents: Cluster,
    ranks: Ranks,
    unharmed: None,
    record_property: Callable[[str, object], None],
) -> None:
    node = agents.node("n2")
    (agent,) = agent_pids(node)
    restarts = _restarts(agents, "n2")
    others, own = ranks.on(agents.node("n1")), ranks.on(node)
    with standing(ranks, node) as met:
        os.kill(agent, signal.SIGKILL)
        others_s = runs_soon(agents, *others)
    # Its CRIU was stopped until now, and nobody tells it any more to go on.
    own_s = runs_soon(agents, *own)
    record_property("others_run_after_s", round(others_s, 3))
    print(f"the other rank ran {others_s:.2f} s after the kill, its own {own_s:.2f} s after CRIU")
    said = told(met.dump)
    assert met.dump.returncode in (exits.FAILED, exits.ENVIRONMENT), said
    agents.wait_for("a new agent", lambda: _restarts(agents, "n2") == restarts + 1, 60)
    wait_until_ready(agents, "n2")


def test_an_epoch_is_of_the_pods_that_there_were_when_it_was_asked_for(
    agents: Cluster, ranks: Ranks
) -> None:
    """The JobSet is scaled meanwhile, by its Job: a JobSet's own number of pods never changes."""
    before = leftovers.of_all(agents)
    dump, names = ranks.paused(), ranks.names()
    _scale(agents, ranks, 3)
    for name in names:
        agents.kubectl("exec", name, "-n", ranks.namespace, "--", "rm", PAUSE)
    taken = told(dump)
    assert dump.returncode == exits.DONE, taken
    assert [each["name"] for each in taken["members"]] == [
        "worker-0-0.trainer",
        "worker-0-1.trainer",
    ]
    assert ckpt(agents, "verify", taken["name"], "-n", ranks.namespace).document()["good"]
    # From now on it is not what the JobSet says, and which of them belong together nobody knows.
    refused = told(ranks.dump())
    assert refused["code"] == "target-unsuitable"
    assert "3 of its 2 pods run" in refused["message"]
    ranks.training.goes_on()
    _scale(agents, ranks, 2)
    assert told(ranks.dump())["name"] in ranks.images()
    ranks.training.goes_on()
    leftovers.assert_none(agents, before)


def _scale(cluster: Cluster, ranks: Ranks, pods: int) -> None:
    text = json.dumps({"spec": {"parallelism": pods, "completions": pods}})
    words = ("patch", "job", "train-worker-0", "-n", ranks.namespace, "--type=merge", "-p", text)
    cluster.kubectl(*words)
    cluster.wait_for(f"{pods} ranks", lambda: len(ranks.training.pods()) == pods, 60)


def test_an_agent_that_stands_still_does_not_keep_its_rank_from_running(
    agents: Cluster, ranks: Ranks, unharmed: None
) -> None:
    """Nobody but the kernel can tell that it does; then it is started anew."""
    node = agents.node("n2")
    (agent,) = agent_pids(node)
    restarts = _restarts(agents, "n2")
    every = [pid for each in agents.nodes.values() for pid in ranks.on(each)]
    with standing(ranks, node) as met:
        os.kill(agent, signal.SIGSTOP)
    runs_soon(agents, *every)
    said = told(met.dump)
    assert met.dump.returncode in (exits.FAILED, exits.ENVIRONMENT), said
    agents.wait_for("a new agent", lambda: _restarts(agents, "n2") == restarts + 1, 60)
    wait_until_ready(agents, "n2")


def _restarts(cluster: Cluster, node: str) -> int:
    (status,) = agent_pod(cluster, node)["status"]["containerStatuses"]
    return int(status["restartCount"])


def test_of_two_epochs_at_once_one_is_refused_and_names_the_other(
    agents: Cluster, ranks: Ranks
) -> None:
    before = leftovers.of_all(agents)
    had = ranks.images()
    first = ranks.paused()
    second = ranks.dump()
    refused = told(second)
    ranks.go_on()
    taken = told(first)
    assert (first.returncode, second.returncode) == (exits.DONE, exits.REFUSED), (taken, refused)
    assert refused["code"] == "target-busy"
    assert taken["name"] in refused["message"]
    # Both in the very same instant.
    both = [ranks.dump() for _ in range(2)]
    ends = [(told(each), each.returncode) for each in both]
    images = [said["name"] for said, status in ends if status == exits.DONE]
    lost = [said["code"] for said, status in ends if status != exits.DONE]
    assert images, ends
    assert set(lost) <= {"target-busy"}, ends
    assert sorted(ranks.images()) == sorted([*had, taken["name"], *images])
    assert ckpt(agents, "verify", "--all", "-n", ranks.namespace).document()["good"]
    ranks.training.goes_on()
    leftovers.assert_none(agents, before)


def test_a_hook_that_fails_or_hangs_in_one_pod_gives_the_epoch_up_and_is_named(
    agents: Cluster, ranks: Ranks, unharmed: None
) -> None:
    where = ("-n", ranks.namespace, "--", "sh", "-c")
    first, other = sorted(ranks.training.pods().items())
    name = other[1]["metadata"]["name"]
    for how, why in (("fails", "ended with status 3"), ("hangs", "2 s")):
        agents.kubectl("exec", name, *where, f"echo {how} > {SPOIL}")
        dump = ranks.dump()
        said = told(dump)
        assert (dump.returncode, said["code"]) == (exits.FAILED, "hook-failed"), said
        assert "'spoiled'" in said["message"]
        assert why in said["message"]
        assert said["facts"]["member"] == "worker-0-1"
        assert said["hint"]
    agents.kubectl("exec", name, *where, f"rm {SPOIL}")

    def heard() -> bool:
        told = [
            reasons(agents, ranks.namespace, each["metadata"]["uid"]) for _, each in (first, other)
        ]
        return all("CheckpointFailed" in each for each in told)

    agents.wait_for("the events of both pods", heard, 20)


def test_a_volume_that_gets_full_for_one_of_them_when_all_run_again_commits_nothing(
    agents: Cluster, ranks: Ranks, unharmed: None
) -> None:
    node = agents.node("n2")
    (agent,) = agent_pids(node)
    volume = OwnVolume(agent, ranks.namespace)
    every = [pid for each in agents.nodes.values() for pid in ranks.on(each)]
    with volume.mounted("96m"), contextlib.ExitStack() as stack:
        with standing(ranks, node) as met:
            stack.enter_context(volume.full())
        runs_soon(agents, *every)
        said = told(met.dump)
        assert (met.dump.returncode, said["code"]) == (exits.VOLUME, "volume-full"), said
        assert said["hint"]


@pytest.mark.parametrize("ahead_s", [600, -600])
def test_a_coordinator_whose_clock_is_wrong_takes_the_newest_epoch_all_the_same(
    agents: Cluster, ranks: Ranks, ahead_s: int
) -> None:
    before = ranks.images()
    script = (
        "import time; from agent.host import clock;"
        f" clock.wall_s = lambda: time.time() + {ahead_s};"
        " from agent.cli.main import main; main()"
    )
    words = (sys.executable, "-c", script, "dump", "jobset/train", "-n", ranks.namespace)
    environment = {"PYTHONPATH": str(CHECKOUT), "CKPT_AGENT_OUTPUT": "json"}
    done = agents.run_in_control_plane(*words, environment=environment)
    assert ranks.images() == [*before, json.loads(done.stdout)["name"]]
    ranks.training.goes_on()


def test_a_node_that_dies_leaves_the_others_running_until_jobset_restarts_them(
    agents: Cluster, namespace: str
) -> None:
    document = jobset(namespace)
    document["spec"]["failurePolicy"] = {"maxRestarts": 3}
    ranks = Ranks(agents, namespace, document)
    before = leftovers.of_all(agents)
    node = agents.node("n2")
    (agent,) = agent_pids(node)
    lost, left = ranks.on(node), ranks.on(agents.node("n1"))
    old = {each["metadata"]["uid"] for each in ranks.training.pods().values()}
    with contextlib.ExitStack() as stack:
        with standing(ranks, node) as met:
            # No word of its end gets out.
            stack.enter_context(cut_off(agents, "n2"))
            _signal([agent, met.criu, *lost], signal.SIGKILL)
        runs_soon(agents, *left)
        said = told(met.dump)
        assert met.dump.returncode in (exits.FAILED, exits.ENVIRONMENT), said
    for each in agents.nodes.values():
        ready(agents, each, "kubelet")
    assert ranks.images() == ranks.missed

    def anew() -> bool:
        found = {each["metadata"]["uid"] for each in ranks.training.pods().values()}
        return len(found) == 2 and not found & old

    agents.wait_for("JobSet to start its pods anew", anew, 90)
    ranks.training.goes_on()
    leftovers.assert_none(agents, before)
    again = ckpt(agents, "dump", "jobset/train", "-n", namespace).document()
    assert ckpt(agents, "verify", again["name"], "-n", namespace).document()["good"]


def test_a_jobset_that_is_suspended_while_it_stands_still_comes_to_rest(
    agents: Cluster, namespace: str
) -> None:
    ranks = Ranks(agents, namespace)
    before = leftovers.of_all(agents)
    every = [pid for each in agents.nodes.values() for pid in ranks.on(each)]
    with standing(ranks, agents.node("n2")) as met:
        _suspend(agents, namespace, suspended=True)
        agents.wait_for("the end of the ranks", lambda: all(map(_gone, every)), 60)
    said = told(met.dump)
    assert met.dump.returncode in (exits.FAILED, exits.ENVIRONMENT), said
    assert ranks.images() == ranks.missed
    agents.wait_for("no pods", lambda: not pods(agents, namespace), 60)
    _suspend(agents, namespace, suspended=False)
    agents.wait_for("two ranks", lambda: len(ranks.training.pods()) == 2, 60)
    ranks.training.goes_on()
    leftovers.assert_none(agents, before)


def _gone(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def _suspend(cluster: Cluster, namespace: str, *, suspended: bool) -> None:
    text = json.dumps({"spec": {"suspend": suspended}})
    cluster.kubectl("patch", "jobset", "train", "-n", namespace, "--type=merge", "-p", text)


def test_one_that_starts_over_or_ends_meanwhile_is_neither_cut_nor_kept_from_it(
    agents: Cluster, namespace: str
) -> None:
    """Its pods are replaced by JobSet before they are stopped, and then come to their end."""
    document = training(namespace, 150)
    document["spec"]["failurePolicy"] = {"maxRestarts": 3}
    (job,) = document["spec"]["replicatedJobs"]
    metadata = job["template"]["spec"]["template"]["metadata"]
    metadata["annotations"] = {optin.HOOKS: json.dumps({"pre": [PAUSING]})}
    ranks = Ranks(agents, namespace, document)
    before = leftovers.of_all(agents)
    old = {each["metadata"]["uid"] for each in ranks.training.pods().values()}
    dump = ranks.paused()
    lost = ranks.names()[0]
    agents.kubectl("delete", "pod", lost, "-n", namespace, "--grace-period=0", "--force")
    said = told(dump)
    assert dump.returncode in (exits.REFUSED, exits.FAILED, exits.ENVIRONMENT), said
    assert said["facts"]["member"].startswith("worker-0-"), said

    def anew() -> bool:
        found = {each["metadata"]["uid"] for each in ranks.training.pods().values()}
        return len(found) == 2 and not found & old

    agents.wait_for("JobSet to start its pods anew", anew, 90)
    ranks.training.goes_on()
    dump = ranks.paused()
    said = told(dump)
    assert dump.returncode in (exits.REFUSED, exits.FAILED, exits.ENVIRONMENT), said
    assert said["facts"]["member"].startswith("worker-0-"), said

    def done() -> bool:
        found = agents.get("jobset", "train", "-n", namespace)["status"]
        return bool(found.get("terminalState") == "Completed")

    agents.wait_for("the end of the training", done, 60)
    assert ranks.images() == []
    leftovers.assert_none(agents, before)


def test_a_jobset_that_is_deleted_while_it_stands_still_is_gone(
    agents: Cluster, ranks: Ranks
) -> None:
    """The one that the others share: this is its end."""
    had, missed = ranks.images(), len(ranks.missed)
    every = [pid for each in agents.nodes.values() for pid in ranks.on(each)]
    with standing(ranks, agents.node("n2")) as met:
        agents.kubectl("delete", "jobset", "train", "-n", ranks.namespace, "--wait=false")
        agents.wait_for("the end of the ranks", lambda: all(map(_gone, every)), 60)
    said = told(met.dump)
    assert met.dump.returncode in (exits.FAILED, exits.ENVIRONMENT), said
    assert ranks.images() == [*had, *ranks.missed[missed:]]
    agents.wait_for("no pods", lambda: not pods(agents, ranks.namespace), 60)
    for node in agents.nodes.values():
        agents.wait_for("the end of the epoch", lambda node=node: not operations(node), 30)  # type: ignore[misc]
        assert not leftovers.crius(node)
