"""The command line where the coordinator does the work: two replicas over real TLS, through
a port-forward; what is under way is followed from one to the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from agent import errors
from agent.cli import bycoordinator, exits, interrupts
from agent.cluster import operations
from agent.rpc import convert, status
from agent.rpc.v1 import coordinator_pb2 as api
from agent.rpc.v1 import node_pb2
from tests.fakes import apiserver, coordinator
from tests.fakes.authority import Authority
from tests.unit import test_cli_pods
from tests.unit.test_cli_pods import World

authority, world, run = test_cli_pods.authority, test_cli_pods.world, test_cli_pods.run

LABELS = {"app.kubernetes.io/name": "ckpt-agent-coordinator"}
IMAGE = coordinator.image("jobset.train")
FIGURES = api.EpochFigures(
    stop_s=0.4,
    durable_s=1.2,
    connections=3,
    leaving=["train-worker-0-1 10.0.0.1:5 8.8.8.8:53"],
    members=[
        node_pb2.MemberOutcome(name=name, stop_s=0.4, raw_bytes=1 << 19, processes=2)
        for name in ("worker-0-0.trainer", "worker-0-1.trainer")
    ],
)
BACK = api.RestoredPod(
    identity="worker-0-0",
    was=node_pb2.Placement(pod="train-worker-0-0-a", node="n1", addresses=["10.0.0.1"]),
    now=node_pb2.Placement(pod="train-worker-0-0-b", node="n2", addresses=["10.0.0.2"]),
    lost=["8.8.8.8:53"],
)
RUNNING = {"state": api.OPERATION_STATE_RUNNING, "step": "preparing"}
DUMPED = {"state": api.OPERATION_STATE_SUCCEEDED, "image": IMAGE, "figures": FIGURES}
CAME_BACK = {"state": api.OPERATION_STATE_SUCCEEDED, "image": IMAGE, "pods": [BACK]}


@pytest.fixture
def cluster(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[coordinator.Cluster]:
    """A coordinator whose replica ``a`` serves, beside ``b``."""
    monkeypatch.setattr(operations, "_AGAIN_S", 0.02)
    found = coordinator.Cluster(tokens={apiserver.TOKEN})
    ours = Authority("ckpt-agent")
    world.api.config_maps["ckpt-agent", "ckpt-agent-ca"] = {"ca.crt": ours.pem.decode()}
    with contextlib.ExitStack() as stack:
        for name in ("b", "a"):
            pod = f"coordinator-{name}"
            world.api.add_pod(pod, "n1", namespace="ckpt-agent", metadata={"labels": LABELS})
            address = stack.enter_context(coordinator.running(found, name, ours))
            world.api.backends[pod, 7543] = address
        yield found


def only(cluster: coordinator.Cluster) -> api.Operation:
    (found,) = cluster.operations.values()
    return found


def test_a_dump_is_followed_to_its_image(run: Any, cluster: coordinator.Cluster) -> None:
    cluster.script = [RUNNING, {"step": "freezing"}, DUMPED]
    ran = run("dump", "jobset/train", "--coordinator", "--stop", "-n", "default", "-o", "json")
    assert ran.status == exits.DONE, ran.err
    document = ran.document()
    assert document["name"] == IMAGE.name
    assert (document["jobset"], document["operation"]) == ("train", only(cluster).id)
    assert (document["stopSeconds"], document["processes"], document["stopped"]) == (0.4, 4, True)
    assert "pod train-worker-0-1 is connected to 8.8.8.8:53" in ran.err
    (request,) = [request for _, method, request in cluster.calls if method == "EPOCH"]
    assert (request.target.jobset, request.stop) == ("train", True)
    assert request.asking.deadline_s == 600
    assert request.asking.when_busy == api.WHEN_BUSY_UNSPECIFIED
    assert len(request.asking.idempotency_key) == 32
    assert run("dump", "jobset/train", "--coordinator", "--quiet").out == f"{IMAGE.name}\n"


def test_a_setting_asks_the_coordinator_and_a_flag_does_not(
    run: Any, cluster: coordinator.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.script = [DUMPED]
    monkeypatch.setenv("CKPT_AGENT_USE_COORDINATOR", "true")
    assert run("dump", "group/solver", "-l", "app=s", "--queue").status == exits.DONE
    ((_, _, request),) = [each for each in cluster.calls if each[1] == "EPOCH"]
    assert (request.target.selector.group, request.target.selector.labels) == ("solver", "app=s")
    assert request.asking.when_busy == api.WHEN_BUSY_WAIT
    ran = run("dump", "jobset/train", "--no-coordinator")
    assert (ran.status, len(cluster.operations)) == (exits.REFUSED, 1)
    assert "JobSet default/train" in ran.err


def test_a_jobset_is_dumped_again_and_again_until_it_has_ended(
    run: Any, cluster: coordinator.Cluster, world: World
) -> None:
    cluster.script = [DUMPED]
    words = ("watch", "jobset/train", "--coordinator", "--every", "1s", "-n", "default")
    world.api.jobsets["default", "train"] = {
        "metadata": {"name": "train", "namespace": "default", "uid": "u"},
        "status": {},
    }
    ran = run(*words, "--count", "2")
    assert (ran.status, ran.out) == (exits.DONE, f"{IMAGE.name}\n" * 2)
    assert "the job goes on; images: 2, failed dumps: 0" in ran.err
    assert len({each.id for each in cluster.operations.values()}) == 2
    ended = [{"type": "Completed", "status": "True"}]
    world.api.jobsets["default", "train"]["status"] = {"conditions": ended}
    assert "the JobSet has ended; images: 1" in run(*words).err
    del world.api.jobsets["default", "train"]
    assert "the JobSet has ended; images: 1" in run(*words).err
    why = status.message(errors.DumpFailed("a hook said no"))
    cluster.script = [{"state": api.OPERATION_STATE_FAILED, "error": why}]
    assert run(*words).status == exits.FAILED
    assert run("watch", "pod/job", "--coordinator").status == exits.USAGE
    assert run("watch", "jobset/train", "-c", "main").status == exits.USAGE
    assert run("watch", "group/solver").status == exits.USAGE


def test_a_watch_ends_though_its_dump_could_not_be_given_up_any_more(
    run: Any, cluster: coordinator.Cluster, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.api.jobsets["default", "train"] = {
        "metadata": {"name": "train", "namespace": "default", "uid": "u"},
        "status": {},
    }

    def dump(*args: object, **options: object) -> None:
        with interrupts.caught(lambda number: None):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(bycoordinator, "dump", dump)
    words = ("watch", "jobset/train", "--coordinator", "--every", "1s", "--count", "2")
    ran = run(*words, "-n", "default")
    assert ran.status == exits.DONE
    assert "the job goes on; images: 1, failed dumps: 0" in ran.err


def test_who_is_connected_with_a_pod_is_found_by_the_coordinator(
    run: Any, cluster: coordinator.Cluster
) -> None:
    cluster.script = [DUMPED]
    words = ("--follow", "--coordinator")
    document = run("dump", "pod/front", *words, "-o", "json").document()
    assert (document["group"], document["followed"]) == ("followed.front", "front")
    ((_, _, request),) = [each for each in cluster.calls if each[1] == "EPOCH"]
    assert request.target.followed == "front"
    assert run("plan", "pod/front", *words, "-o", "json").document()["name"] == "pod/front"
    assert run("dump", "jobset/train", *words).status == exits.USAGE
    assert run("plan", "jobset/train", *words).status == exits.USAGE
    assert run("plan", "pod/front", "--follow").status == exits.USAGE
    assert run("dump", "pod/front", "--coordinator").status == exits.USAGE


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("restore", "jobset/train", "--node", "n2", "--replace"), "RESTORE"),
        (("migrate", "jobset/train", "--to", "n2"), "MIGRATE"),
    ],
)
def test_a_job_comes_back_by_the_coordinator(
    run: Any, cluster: coordinator.Cluster, arguments: tuple[str, ...], kind: str
) -> None:
    cluster.script = [RUNNING, CAME_BACK]
    ran = run(*arguments, "--coordinator", "-o", "json")
    assert ran.status == exits.DONE, ran.err
    assert ran.document()["operation"] == kind.lower()
    (pod,) = ran.document()["pods"]
    assert (pod["was"]["node"], pod["now"]["node"]) == ("n1", "n2")
    assert "worker-0-0 lost its connection to 8.8.8.8:53" in ran.err
    ((_, _, request),) = [each for each in cluster.calls if each[1] == kind]
    assert list(request.nodes) == ["n2"]


def test_an_operation_that_failed_ends_as_if_the_command_had_done_it(
    run: Any, cluster: coordinator.Cluster
) -> None:
    why = errors.CutTorn("the cut does not fit together", hint="try again", reasons=["a-b"])
    failed = {"state": api.OPERATION_STATE_FAILED, "error": status.message(why)}
    cluster.script = [RUNNING, failed]
    ran = run("dump", "jobset/train", "--coordinator", "-o", "json")
    assert (ran.status, ran.out) == (exits.FAILED, "")
    told = json.loads(ran.err[ran.err.index("{") :])
    assert (told["code"], told["facts"], told["retryable"]) == (
        "cut-torn",
        {"reasons": ["a-b"]},
        True,
    )


def test_whoever_may_not_is_told_so_at_once(run: Any, cluster: coordinator.Cluster) -> None:
    cluster.refuses = errors.Forbidden("ada may not create images", hint="ask")
    ran = run("dump", "jobset/train", "--coordinator")
    assert ran.status == exits.REFUSED
    assert "ada may not create images" in ran.err
    assert not cluster.operations


def test_a_replica_that_dies_is_followed_by_the_next(
    run: Any, cluster: coordinator.Cluster, world: World
) -> None:
    def dies() -> None:
        assert cluster.watched.wait(30)
        cluster.leader = "b"
        cluster.ends["a"]()
        del world.api.pods["ckpt-agent", "coordinator-a"]

    cluster.script = [RUNNING, dies, {"takeovers": 1}, DUMPED]
    ran = run("dump", "jobset/train", "--coordinator")
    assert ran.status == exits.DONE, ran.err
    assert "another replica of the coordinator went on" in ran.err
    assert cluster.calls[-1][0] == "b"
    assert len(cluster.operations) == 1


def test_a_takeover_is_waited_for(run: Any, cluster: coordinator.Cluster) -> None:
    cluster.script = [DUMPED]
    cluster.leader = ""
    asked = []

    def elected(self: Any, method: str, request: Any, context: Any) -> None:
        asked.append(method)
        if len(asked) == 5:
            cluster.leader = "b"
        begin(self, method, request, context)

    begin = coordinator._Servicer._begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coordinator._Servicer, "_begin", elected)
        assert run("dump", "jobset/train", "--coordinator").status == exits.DONE
    assert len(cluster.operations) == 1


def test_without_any_replica_that_serves_the_command_says_where_to_look(
    run: Any, cluster: coordinator.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "_TAKEOVER_S", 0.1)
    cluster.leader = ""
    ran = run("operations")
    assert ran.status == exits.ENVIRONMENT
    assert "did not answer" in ran.err
    assert "another replica serves" in ran.err


def test_a_cluster_without_a_coordinator_is_told_as_such(run: Any, world: World) -> None:
    ran = run("dump", "jobset/train", "--coordinator")
    assert ran.status == exits.REFUSED
    assert "no coordinator runs in namespace ckpt-agent" in ran.err


def test_ctrl_c_asks_the_coordinator_to_give_up(run: Any, cluster: coordinator.Cluster) -> None:
    cluster.script = [RUNNING, lambda: os.kill(os.getpid(), signal.SIGINT)]
    ran = run("dump", "jobset/train", "--coordinator")
    assert ran.status == exits.INTERRUPTED
    assert "cancelled; every pod goes on" in ran.err
    assert [method for _, method, _ in cluster.calls].count("Cancel") == 1
    assert only(cluster).state == api.OPERATION_STATE_CANCELLED


def test_ctrl_c_twice_leaves_the_operation_alone(run: Any, cluster: coordinator.Cluster) -> None:
    cluster.deaf = lambda: os.kill(os.getpid(), signal.SIGINT)
    cluster.script = [RUNNING, lambda: os.kill(os.getpid(), signal.SIGINT)]
    ran = run("dump", "jobset/train", "--coordinator")
    assert ran.status == exits.INTERRUPTED
    assert f"ckpt-agent operations watch {only(cluster).id} -n default" in ran.err
    assert only(cluster).state == api.OPERATION_STATE_RUNNING


def test_operations_are_listed_shown_watched_and_cancelled(
    run: Any, cluster: coordinator.Cluster
) -> None:
    cluster.script = [DUMPED]
    for number in range(3):
        assert run("dump", f"jobset/train{number}", "--coordinator").status == exits.DONE
    newest, middle, oldest = [
        each["name"] for each in run("operations", "-o", "json").document()["items"]
    ]
    assert [newest, middle, oldest] == list(reversed(cluster.operations))
    of_one = run("operations", "list", "--group", "jobset.train1", "-o", "name").out.split()
    assert of_one == [middle]
    shown = run("operations", "show", oldest, "-o", "json").document()
    assert (shown["state"], shown["image"]["name"]) == ("succeeded", IMAGE.name)
    assert shown["figures"]["connections"] == 3
    assert run("operations", "show", oldest, "-n", "other").status == exits.REFUSED
    assert run("operations", "watch", oldest).status == exits.DONE
    assert run("operations", "cancel", oldest, "-o", "json").document()["state"] == "cancelled"
    assert run("operations", "watch", oldest).status == exits.INTERRUPTED
    table = run("operations", "-o", "wide").out
    assert "jobset.train0" in table
    assert "cancelled; every pod goes on" in table


def test_a_plan_says_what_stands_against_a_cut(run: Any, cluster: coordinator.Cluster) -> None:
    cluster.plan.obstacles.append("pod train-worker-0-1 has no node yet")
    cluster.plan.members.add(
        identity="worker-0-0", pod="train-a", node="n1", plan=convert.to_struct(PLAN)
    )
    ran = run("plan", "jobset/train", "--coordinator", "-o", "json")
    assert (ran.status, ran.document()["feasible"]) == (exits.REFUSED, False)
    text = run("plan", "group/solver", "-l", "app=s", "--coordinator").out
    assert "has no node yet" in text
    assert "would work" in text
    del cluster.plan.obstacles[:]
    assert run("plan", "jobset/train", "--coordinator").status == exits.DONE


PLAN = {
    "apiVersion": "ckpt-agent.dev/v1",
    "kind": "Plan",
    "name": "train-a",
    "feasible": True,
    "estimate": {
        "rawBytes": 1 << 20,
        "stopSeconds": 0.1,
        "rates": {"captureBytesPerSecond": 1e9, "fixedSeconds": 0.1, "processSeconds": 0.01},
    },
    **{key: [] for key in ("blockers", "warnings", "processes", "memory", "files", "sockets")},
}


@pytest.mark.parametrize(
    "arguments",
    [
        ("dump", "pod/job", "--coordinator"),
        ("dump", "--pid", "7", "--coordinator"),
        ("dump", "jobset/train", "--queue"),
        ("restore", "job", "--node", "n2", "--coordinator"),
        ("restore", "group/solver", "--again", "--coordinator"),
        ("plan", "jobset/train"),
        ("operations", "show"),
        ("operations", "list", "op-1"),
        ("operations", "show", "op-1", "--group", "g"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage(run: Any, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).status == exits.USAGE
