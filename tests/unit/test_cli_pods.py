"""The command line against a cluster: an API server, port-forward and agents that speak the real
protocols over real TLS.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from agent import errors
from agent.cli import exits, main
from agent.host.clock import Deadline, wait_until
from agent.model import optin
from agent.model.container import HOLD
from tests.fakes import apiserver, nodeagent
from tests.fakes.authority import Authority
from tests.unit.test_cli import Ran, checked

_LABELS = {"app.kubernetes.io/name": "ckpt-agent-node"}
_HELD = {"containers": [{"name": "c", "image": "i", "command": [HOLD, "auto", "run"]}]}


class World:
    """A cluster with two nodes, an agent on each, and one pod ``job`` on n1."""

    def __init__(self, api: apiserver.ApiServer, agents: nodeagent.Cluster) -> None:
        self.api = api
        self.agents = agents
        self.uid = api.add_pod("job", "n1", spec=_HELD)

    def called(self, method: str) -> list[tuple[str, Any]]:
        return [(node, request) for node, name, request in self.agents.calls if name == method]


@pytest.fixture
def authority() -> Authority:
    return Authority("cluster")


@pytest.fixture
def world(
    authority: Authority, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    for name in [name for name in os.environ if name.startswith("CKPT_AGENT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "none"))
    ours = Authority("ckpt-agent")
    agents = nodeagent.Cluster(tokens={apiserver.TOKEN})
    with contextlib.ExitStack() as stack:
        api = stack.enter_context(apiserver.running(authority, tmp_path))
        for node in ("n1", "n2"):
            api.add_node(node)
            api.add_pod(f"agent-{node}", node, namespace="ckpt-agent", metadata={"labels": _LABELS})
            address = stack.enter_context(nodeagent.running(agents, node, ours))
            api.backends[f"agent-{node}", 7443] = address
            with_certificate = nodeagent.running(agents, node, ours, clients=authority.pem)
            api.backends[f"agent-{node}", 7444] = stack.enter_context(with_certificate)
        api.config_maps["ckpt-agent", "ckpt-agent-ca"] = {"ca.crt": ours.pem.decode()}
        monkeypatch.setenv("KUBECONFIG", api.kubeconfig(tmp_path / "kubeconfig", authority))

        def schedule(pod: dict[str, Any]) -> None:
            terms = pod["spec"]["affinity"]["nodeAffinity"][
                "requiredDuringSchedulingIgnoredDuringExecution"
            ]["nodeSelectorTerms"]
            pod["spec"]["nodeName"] = terms[0]["matchFields"][0]["values"][0]

        api.on_create = schedule
        made = World(api, agents)
        agents.template = {"metadata": {"name": "job"}, "spec": _HELD}
        yield made


@pytest.fixture
def run(world: World, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Ran:
        result = main.run(arguments)
        out, err = capsys.readouterr()
        return Ran(result, out, err)

    return run


# What is meant.


def test_a_flag_of_a_cluster_a_pod_or_a_setting_means_the_cluster(
    run: Any, world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setenv("CKPT_AGENT_STORE", str(tmp_path / "no-store"))
    name = world.agents.add_image("job", 1)
    config = os.environ["KUBECONFIG"]
    for flags in (("-n", "default"), ("--context", "fake"), ("--kubeconfig", config)):
        assert run("list", *flags, "-o", "name").out.split() == [name]
    assert run("list").status == exits.VOLUME  # this host's store, which is not there
    monkeypatch.setenv("CKPT_AGENT_USE_CLUSTER", "true")
    assert run("list", "-o", "name").out.split() == [name]


def test_the_namespace_is_the_flags_then_the_contexts(run: Any, world: World) -> None:
    run("list", "--context", "other")
    run("list", "--context", "other", "-n", "team-b")
    run("list", "--context", "fake")
    assert [request.namespace for _, request in world.called("ListImages")] == [
        "team-a",
        "team-b",
        "default",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("dump", "pod/job", "--pid", "7"),
        ("dump", "--pid", "7", "-n", "x"),
        ("dump", "--pid", "7", "-c", "c"),
        ("dump", "--pid", "7", "--engine", "kubelet"),
        ("dump", "pod/job", "--name", "g"),
        ("dump", "pod/job", "--include", "/x"),
        ("dump", "job"),
        ("dump", "deployment/job"),
        ("dump", "pod/"),
        ("restore", "job", "-n", "x"),
        ("restore", "job", "--node", "n2", "--pod", "job"),
        ("restore", "job", "--pod", "job", "--replace"),
        ("restore", "job", "--node", "n2", "--wait"),
        ("restore", "job", "--node", "n2", "--stdout", "x"),
        ("migrate", "pod/job"),
        ("migrate", "--to", "n2"),
        ("plan", "--pid", "7", "-n", "x"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    run: Any, world: World, arguments: tuple[str, ...]
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (exits.USAGE, "")
    assert world.agents.calls == []


# Verbs.


def test_dump_of_a_pod_asks_the_agent_of_its_node_and_prints_the_image(
    run: Any, world: World
) -> None:
    ran = run("dump", "pod/job", "-c", "c", "--engine", "kubelet")
    assert ran.status == 0
    assert ran.out == f"{world.agents.images[-1].name}\n"
    assert "stopped for 50 ms" in ran.err
    ((node, request),) = world.called("Dump")
    assert (node, request.pod, request.pod_uid) == ("n1", "job", world.uid)
    assert list(request.containers) == ["c"]
    assert (request.engine, request.stop, request.deadline_s) == (2, False, 600.0)
    document = run("dump", "pod/job", "-o", "json").document()
    assert (document["engine"], document["pod"], document["processes"]) == ("container", "job", 2)


def test_list_follows_pages_and_show_verify_plan_give_the_documents_of_a_host(
    run: Any, world: World
) -> None:
    names = [world.agents.add_image("job", number) for number in range(5)]
    world.agents.page = 2
    listed = run("list", "-n", "default", "-o", "json").document()
    assert [each["name"] for each in listed["items"]] == names
    assert listed["items"][0]["createdAt"] == "2026-09-21T14:13:20Z"
    assert run("show", "job", "-n", "default", "-o", "json").document()["name"] == names[-1]
    verified = run("verify", names[0], "-n", "default", "-o", "json")
    assert (verified.status, verified.document()["good"]) == (0, True)
    world.agents.fails["VerifyImage.damaged"] = lambda: None
    everything = run("verify", "--all", "-n", "default", "-o", "json")
    assert everything.status == exits.DATA
    assert len(everything.document()["items"]) == 5
    assert everything.document()["items"][0]["damaged"][0]["part"] == "packs/1"
    assert run("plan", "pod/job", "-o", "json").document()["feasible"]
    world.agents.blockers.append({"code": "x", "subject": "s", "reason": "r", "cure": "c"})
    assert run("plan", "pod/job").status == exits.REFUSED


def test_delete_and_prune_name_the_namespace_not_a_path_of_the_node(run: Any, world: World) -> None:
    names = [world.agents.add_image("job", number) for number in range(3)]
    deleted = run("delete", names[0], "-n", "default", "-o", "json").document()
    assert (deleted["name"], deleted["items"][0]["name"]) == ("default", names[0])
    pruned = run("prune", "-n", "default", "--keep-last", "1", "--dry-run", "-o", "json").document()
    assert [each["name"] for each in pruned["items"]] == names[1:2]
    assert run("prune", "-n", "default").status == exits.USAGE


def test_images_are_told_with_their_storage_and_can_be_limited_to_one(
    run: Any, world: World
) -> None:
    here = world.agents.add_image("job", 1)
    there = world.agents.add_image("job", 2, "fast")
    listed = run("list", "-n", "default")
    assert [line.split()[-1] for line in listed.out.splitlines()] == ["STORAGE", "default", "fast"]
    only = run("list", "-n", "default", "--storage", "fast", "-o", "json").document()
    assert [(each["name"], each["storage"]) for each in only["items"]] == [(there, "fast")]
    assert "in storage fast" in run("show", "job", "-n", "default").out
    assert run("verify", here, "-n", "default", "--storage", "fast").status == exits.REFUSED
    verified = run("verify", "--all", "-n", "default", "-o", "json").document()
    assert [each["storage"] for each in verified["items"]] == ["default", "fast"]
    run("prune", "-n", "default", "--keep-last", "1", "--storage", "fast")
    assert [request.storage for _, request in world.called("PruneImages")] == ["fast"]
    run("restore", here, "--pod", "job", "--storage", "default")
    assert [request.storage for _, request in world.called("Restore")] == ["default"]
    dumped = run("dump", "pod/job", "-o", "json")
    assert dumped.document()["storage"] == "default"
    assert "in storage default" in dumped.err
    for verb in (("list",), ("show", "x"), ("delete", here), ("prune", "--keep-last", "1")):
        ran = run(*verb, "--storage", "fast")
        assert ran.status == exits.USAGE
        assert "is for a cluster" in ran.err


def test_a_storage_that_cannot_be_read_is_named_beside_what_there_is(
    run: Any, world: World
) -> None:
    name = world.agents.add_image("job", 1)
    world.agents.unread["fast"] = "the volume does not answer"
    for verb in (("list",), ("verify", "--all")):
        ran = run(*verb, "-n", "default", "-o", "json")
        assert ran.status == exits.VOLUME
        assert [each["name"] for each in ran.document()["items"]] == [name]
        assert ran.document()["unread"] == [
            {"storage": "fast", "problem": "the volume does not answer"}
        ]
        assert "storage fast cannot be looked at: the volume does not answer" in ran.err
    # What a move needs to know is asked for all the same.
    assert run("migrate", "pod/job", "--to", "n2").status == 0


def test_doctor_shows_the_cluster_the_callers_rights_and_every_node(run: Any, world: World) -> None:
    world.api.add_node("n3")
    world.api.denied.add(("delete", "pods"))
    ran = run("doctor", "--context", "fake", "-o", "json")
    document = ran.document()
    lines = {check["name"]: check for check in document["checks"]}
    assert (ran.status, document["status"]) == (0, "degraded")
    assert lines["api-server"]["found"].startswith("v1.36.3")
    assert lines["right delete pods in namespace default"]["status"] == "degraded"
    assert "migrate" in lines["right delete pods in namespace default"]["consequence"]
    assert lines["right restore images.ckpt-agent.dev in namespace default"]["status"] == "ok"
    assert lines["n1/criu"]["status"] == "ok"
    assert lines["n2/CAP_SYS_RESOURCE"]["cure"] == "add it"
    assert lines["n3/agent"]["status"] == "degraded"
    del world.api.backends["agent-n2", 7443]
    ran = run("doctor", "--context", "fake", "-o", "json")
    lines = {check["name"]: check for check in ran.document()["checks"]}
    assert (ran.status, lines["n2/agent"]["status"]) == (exits.ENVIRONMENT, "missing")
    assert "connection refused" in lines["n2/agent"]["found"]


def test_restore_into_a_pod_that_waits_asks_the_agent_of_its_node(run: Any, world: World) -> None:
    name = world.agents.add_image("job", 1)
    uid = world.api.add_pod("waiting", "n2", spec=_HELD)
    ran = run("restore", name, "--pod", "waiting", "-o", "json")
    document = ran.document()
    assert (ran.status, document["node"], document["podUid"]) == (0, "n2", uid)
    assert (document["was"]["node"], document["was"]["addresses"]) == ("n1", ["10.0.0.1"])
    assert (document["now"]["pod"], document["now"]["addresses"]) == ("waiting", ["10.0.0.2"])
    ((node, request),) = world.called("Restore")
    assert (node, request.pod, request.pod_uid, request.again) == ("n2", "waiting", uid, False)
    table = run("restore", name, "--pod", "waiting", "--again").out
    assert "waiting" in table
    assert "n2" in table


def test_restore_on_a_node_starts_the_images_pod_there(run: Any, world: World) -> None:
    name = world.agents.add_image("job", 1)
    world.agents.details[name] = {"pod_template_json": json.dumps(world.agents.template)}
    there = run("restore", name, "--node", "n2")
    assert there.status == exits.REFUSED
    assert "pod default/job exists" in there.err
    assert "--replace" in there.err
    assert world.api.pods["default", "job"]["metadata"]["uid"] == world.uid
    assert run("restore", name, "--node", "n2", "--replace").status == 0
    made = world.api.pods["default", "job"]
    assert made["metadata"]["uid"] != world.uid
    assert made["metadata"]["annotations"][optin.RESTORE] == name
    assert made["spec"]["nodeName"] == "n2"
    world.agents.details[name]["restored_into"] = "some-uid"
    twice = run("restore", name, "--node", "n2", "--replace")
    assert twice.status == exits.REFUSED
    assert "--again" in twice.err
    assert run("restore", name, "--node", "n2", "--replace", "--again").status == 0


def test_an_image_that_fits_no_pod_is_refused_before_a_pod_is_deleted(
    run: Any, world: World
) -> None:
    name = world.agents.add_image("job", 1)
    world.agents.details[name] = {
        "pod_template_json": json.dumps(world.agents.template),
        "obstacles": ["one thing", "another"],
    }
    refused = run("restore", name, "--node", "n2", "--replace")
    assert refused.status == exits.REFUSED
    assert "one thing" in refused.err
    assert "another" in refused.err
    assert world.api.pods["default", "job"]["metadata"]["uid"] == world.uid


def test_restore_of_an_image_without_a_pod_says_so(run: Any, world: World) -> None:
    name = world.agents.add_image("job", 1)
    ran = run("restore", name, "--node", "n2", "-o", "json")
    assert checked(json.loads(ran.err))["code"] == ("target-unsuitable")


def test_a_client_certificate_is_shown_on_its_own_port(
    run: Any,
    world: World,
    authority: Authority,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    certificate, key = authority.issue_files(tmp_path, "alice")
    user = {"client-certificate": certificate, "client-key": key}
    # The API server of this test knows tokens only: leave it out.
    config = world.api.kubeconfig(tmp_path / "alice", authority, user)
    ca = tmp_path / "ours.crt"
    ca.write_text(world.api.config_maps["ckpt-agent", "ckpt-agent-ca"]["ca.crt"])
    monkeypatch.setenv("CKPT_AGENT_AGENT_CA", str(ca))
    monkeypatch.setenv("CKPT_AGENT_AGENT_ADDRESS", world.api.backends["agent-n1", 7444])
    name = world.agents.add_image("job", 1)
    assert run("list", "--kubeconfig", config, "-o", "name").out.split() == [name]
    monkeypatch.setenv("CKPT_AGENT_AGENT_ADDRESS", world.api.backends["agent-n1", 7443])
    ran = run("list", "--kubeconfig", config)
    assert (ran.status, "the token is not known" in ran.err) == (exits.REFUSED, True)


# Moving.


def test_migrate_dumps_deletes_creates_and_restores_in_this_order(run: Any, world: World) -> None:
    ran = run("migrate", "pod/job", "--to", "n2", "-o", "json")
    assert ran.status == 0, ran.err
    document = ran.document()
    assert (document["source"], document["target"]) == ("n1", "n2")
    assert list(document["stepSeconds"]) == ["dump", "delete", "create", "schedule", "restore"]
    made = world.api.pods["default", "job"]
    assert made["metadata"]["annotations"][optin.RESTORE] == document["name"]
    ((dumped_on, dumped),) = world.called("Dump")
    ((restored_on, restored),) = world.called("Restore")
    assert (dumped_on, dumped.stop, dumped.pod_uid) == ("n1", True, world.uid)
    assert (restored_on, restored.pod_uid) == ("n2", made["metadata"]["uid"])
    changes = [
        (method, path)
        for method, path in world.api.requests
        if method != "GET" and "selfsubject" not in path
    ]
    assert changes == [
        ("POST", "/api/v1/namespaces/default/pods"),  # the trial, which only admission sees
        ("DELETE", "/api/v1/namespaces/default/pods/job"),
        ("POST", "/api/v1/namespaces/default/pods"),
    ]
    assert "was away for" in ran.err


def owned(world: World) -> None:
    owner = {"kind": "Job", "name": "train", "controller": True}
    world.api.pods["default", "job"]["metadata"]["ownerReferences"] = [owner]


def ordinary(world: World) -> None:
    world.api.pods["default", "job"]["spec"]["containers"][0] = {"name": "c", "image": "i"}


def cordoned(world: World) -> None:
    world.api.nodes["n2"]["spec"]["unschedulable"] = True


def tainted(world: World) -> None:
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    world.api.nodes["n2"]["spec"]["taints"] = [taint]


def no_agent(world: World) -> None:
    del world.api.pods["ckpt-agent", "agent-n2"]


def agent_not_ready(world: World) -> None:
    found = world.api.pods["ckpt-agent", "agent-n2"]["status"]
    found["conditions"] = []
    found["containerStatuses"] = [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]


def no_right(world: World) -> None:
    world.api.denied.add(("restore", "images"))


def blocked(world: World) -> None:
    world.agents.blockers.append(
        {"code": "io-uring", "subject": "pid 7", "reason": "uses io_uring", "cure": "do not"}
    )


def policy(world: World) -> None:
    world.api.refuse_create = "ValidatingAdmissionPolicy denied the request"


def ended(world: World) -> None:
    world.api.pods["default", "job"]["status"]["phase"] = "Succeeded"


def going(world: World) -> None:
    world.api.pods["default", "job"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        (owned, exits.REFUSED, "Job train controls it"),
        (ordinary, exits.REFUSED, "start from the beginning instead of waiting"),
        (cordoned, exits.REFUSED, "it is cordoned"),
        (tainted, exits.REFUSED, "taint gpu=yes:NoSchedule is not tolerated"),
        (no_agent, exits.REFUSED, "no agent runs on node n2"),
        (agent_not_ready, exits.ENVIRONMENT, "is not ready: CrashLoopBackOff"),
        (
            no_right,
            exits.REFUSED,
            "not allowed: restore images.ckpt-agent.dev in namespace default",
        ),
        (blocked, exits.REFUSED, "pid 7: uses io_uring"),
        (policy, exits.REFUSED, "ValidatingAdmissionPolicy denied"),
        (ended, exits.REFUSED, "has ended (Succeeded)"),
        (going, exits.REFUSED, "is being deleted"),
    ],
)
def test_what_stands_against_a_move_is_told_before_anything_stops(
    run: Any, world: World, change: Any, status: int, told: str
) -> None:
    change(world)
    ran = run("migrate", "pod/job", "--to", "n2")
    assert (ran.status, ran.out) == (status, "")
    assert told in ran.err
    assert "hint: " in ran.err
    assert world.called("Dump") == []
    assert world.api.pods["default", "job"]["metadata"]["uid"] == world.uid


def test_what_hooks_failed_with_is_told_and_costs_nothing(run: Any, world: World) -> None:
    world.agents.hook_problems = ["the hook 'report' failed: it ended with status 1\nno disk"]
    done = run("dump", "pod/job", "-o", "json")
    assert done.status == exits.DONE
    assert checked(json.loads(done.out))["hookProblems"] == world.agents.hook_problems
    assert "warning: the hook 'report' failed: it ended with status 1\nno disk\n" in done.err
    moved = run("migrate", "pod/job", "--to", "n2", "-o", "json")
    assert checked(json.loads(moved.out))["hookProblems"] == world.agents.hook_problems * 2
    assert moved.err.count("no disk") == 2


def test_a_hook_that_gives_a_dump_up_is_shown_with_what_it_said(run: Any, world: World) -> None:
    world.agents.fails["Dump"] = errors.HookFailed(
        "the hook 'quiesce' failed: it ended with status 1", output="line\n\x1b[2Jlast"
    )
    done = run("dump", "pod/job")
    assert done.status == exits.FAILED
    assert "  | line\n  | " in done.err
    assert "\x1b" not in done.err


def test_a_failed_dump_leaves_the_pod_as_it_was(run: Any, world: World) -> None:
    world.agents.fails["Dump.late"] = errors.CriuFailed("CRIU failed", log_tail=["Error (x)"])
    ran = run("migrate", "pod/job", "--to", "n2")
    assert ran.status == exits.FAILED
    assert "  | Error (x)" in ran.err
    assert world.api.pods["default", "job"]["metadata"]["uid"] == world.uid


def test_a_dump_that_fails_after_its_commit_is_no_loss_of_the_job(run: Any, world: World) -> None:
    def commit_and_break() -> None:
        world.agents.add_image("job", len(world.agents.images))
        raise RuntimeError("the agent was killed")

    world.agents.add_image("job", 0)
    world.agents.fails["Dump.late"] = commit_and_break
    ran = run("migrate", "pod/job", "--to", "n2", "--quiet", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    facts = checked(json.loads(ran.err))["facts"]
    assert facts["image"] == world.agents.images[1].name
    onward, back = facts["next"]
    assert back == f"ckpt-agent restore {facts['image']} -n default --pod job"
    world.agents.details[facts["image"]] = {"pod_template_json": json.dumps(world.agents.template)}
    assert run(*onward.split()[1:]).status == 0
    assert world.api.pods["default", "job"]["spec"]["nodeName"] == "n2"


def test_a_failed_restore_says_what_exists_where_and_the_command_told_goes_on(
    run: Any, world: World
) -> None:
    world.agents.fails["Restore"] = errors.RestoreConflict(
        "the image does not fit", reasons=["CPU lacks avx512f"]
    )
    ran = run("migrate", "pod/job", "--to", "n2", "--quiet", "-o", "json")
    assert (ran.status, ran.out) == (exits.MOVE_INCOMPLETE, "")
    told = checked(json.loads(ran.err))
    image = world.agents.images[-1].name
    assert told["facts"]["image"] == image
    assert "CPU lacks avx512f" in told["facts"]["reasons"]
    assert told["facts"]["left"] == [
        f"image {image} is committed: nothing of the job is lost",
        "its replacement pod default/job waits for the image on node n2, or runs it already if only"
        " the answer was lost",
    ]
    assert world.api.pods["default", "job"]["spec"]["nodeName"] == "n2"
    del world.agents.fails["Restore"]
    onward, back = told["facts"]["next"]
    assert run(*onward.split()[1:]).status == 0
    world.agents.details[image] = {"pod_template_json": json.dumps(world.agents.template)}
    assert run(*back.split()[1:]).status == 0
    assert world.api.pods["default", "job"]["spec"]["nodeName"] == "n1"


def test_a_deletion_that_fails_leaves_a_command_that_replaces_the_pod(
    run: Any, world: World
) -> None:
    world.api.denied.add(("DELETE", "/pods/job"))
    ran = run("migrate", "pod/job", "--to", "n2", "--quiet", "-o", "json")
    assert ran.status == exits.MOVE_INCOMPLETE
    facts = checked(json.loads(ran.err))["facts"]
    assert "was stopped on node n1, still exists and waits" in facts["left"][1]
    world.api.denied.clear()
    world.agents.details[facts["image"]] = {"pod_template_json": json.dumps(world.agents.template)}
    onward, back = facts["next"]
    assert back == f"ckpt-agent restore {facts['image']} -n default --pod job"
    assert run(*onward.split()[1:]).status == 0
    assert world.api.pods["default", "job"]["spec"]["nodeName"] == "n2"


def test_a_replacement_without_a_node_is_told_with_the_schedulers_words(
    run: Any, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unschedulable(pod: dict[str, Any]) -> None:
        pod["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "message": "Insufficient memory"}
        ]

    world.api.on_create = unschedulable
    monkeypatch.setenv("CKPT_AGENT_SCHEDULE_DEADLINE", "0.3")
    ran = run("migrate", "pod/job", "--to", "n2")
    assert ran.status == exits.MOVE_INCOMPLETE
    assert "Insufficient memory" in ran.err
    assert "--pod job" in ran.err


def test_a_restore_that_may_succeed_later_is_tried_again(run: Any, world: World) -> None:
    refused = threading.Event()

    def free_again() -> None:
        deadline = Deadline.after(60)
        wait_until(lambda: bool(world.called("Restore")) or refused.is_set(), deadline)
        world.agents.fails.pop("Restore")

    world.agents.fails["Restore"] = errors.TargetBusy("another restore runs")
    other = threading.Thread(target=free_again)
    other.start()
    try:
        assert run("migrate", "pod/job", "--to", "n2").status == 0
    finally:
        refused.set()
        other.join()
    assert len(world.called("Restore")) > 1


# Signals.


def interrupted_when(reached: threading.Event, number: int) -> threading.Thread:
    def interrupt() -> None:
        assert reached.wait(30)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_gives_the_dump_up_and_the_agent_hears_of_it(
    run: Any, world: World, number: int
) -> None:
    begun = threading.Event()
    world.agents.fails["Dump"] = begun.set
    world.agents.hold = threading.Event()
    thread = interrupted_when(begun, number)
    ran = run("dump", "pod/job")
    thread.join()
    assert world.agents.given_up.wait(30)
    world.agents.hold.set()
    assert (ran.status, ran.out) == (exits.INTERRUPTED, "")
    assert "the pod goes on" in ran.err


def test_a_watch_tells_of_each_dump_and_its_status_is_the_last_ones(run: Any, world: World) -> None:
    ran = run("watch", "pod/job", "--every", "30s", "--count", "3", "-c", "c")
    assert (ran.status, len(ran.out.splitlines())) == (0, 2)
    for told in ("no luck", "the next begins in 3", "images: 2, failed dumps: 1"):
        assert told in ran.err
    ((node, request),) = world.called("Watch")
    assert (node, request.every_s, request.count, list(request.containers)) == ("n1", 30, 3, ["c"])
    assert request.pod_uid == world.uid
    failed = run("watch", "pod/job", "--count", "2", "--keep-last", "1")
    assert (failed.status, len(failed.out.splitlines())) == (exits.FAILED, 1)
    ((_, pruned),) = world.called("PruneImages")
    assert (pruned.group, pruned.keep_last, pruned.dry_run) == ("job", 1, False)
    for wrong in (("--name", "x"), ("--follow",), ("--pid", "1"), ("--precopy-cpu", "50")):
        assert run("watch", "pod/job", *wrong).status == exits.USAGE
    assert run("watch").status == exits.USAGE


def test_a_watch_that_is_told_to_stop_has_done_what_it_was_asked_for(
    run: Any, world: World
) -> None:
    begun = threading.Event()
    world.agents.fails["Watch"] = begun.set
    world.agents.hold = threading.Event()
    thread = interrupted_when(begun, signal.SIGINT)
    ran = run("watch", "pod/job")
    thread.join()
    assert world.agents.given_up.wait(30)
    world.agents.hold.set()
    assert ran.status == exits.DONE
    assert "the pod goes on" in ran.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_any_verb_and_nothing_is_left(
    run: Any, world: World, number: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    begun, may_answer = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        may_answer.wait(30)

    world.agents.fails["ListImages"] = wait
    thread = interrupted_when(begun, number)
    ran = run("list", "-n", "default")
    thread.join()
    may_answer.set()
    assert (ran.status, ran.out) == (exits.INTERRUPTED, "")
    assert not list((tmp_path / "tmp").glob("ckpt-agent-*"))


def test_a_signal_after_the_commit_of_a_move_is_asked_for_twice(run: Any, world: World) -> None:
    world.agents.fails["Restore"] = lambda: os.kill(os.getpid(), signal.SIGINT)
    ran = run("migrate", "pod/job", "--to", "n2")
    assert ran.status == 0
    assert "again to stop" in ran.err


# What is wrong with a cluster or a caller.


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("dump", "pod/nothing"), exits.REFUSED, "no pod default/nothing in context fake"),
        (("dump", "pod/job", "-c", "d"), exits.REFUSED, "no container 'd'"),
        (("list", "--context", "prod"), exits.REFUSED, "no context 'prod'"),
        (("list", "--kubeconfig", "/nonexistent"), exits.REFUSED, "no kubeconfig /nonexistent"),
        (("show", "none", "-n", "default"), exits.REFUSED, "no image none"),
        (("migrate", "pod/job", "--to", "n1"), exits.REFUSED, "already runs on n1"),
        (("migrate", "pod/job", "--to", "n9"), exits.REFUSED, "no node n9"),
    ],
)
def test_what_does_not_exist_is_named(
    run: Any, world: World, arguments: tuple[str, ...], status: int, told: str
) -> None:
    ran = run(*arguments)
    assert (ran.status, ran.out) == (status, "")
    assert told in ran.err
    assert "hint: " in ran.err or "no image" in ran.err


def expired(world: World) -> None:
    world.api.token = "renewed"


def forbidden(world: World) -> None:
    world.api.denied.add(("GET", "/namespaces/ckpt-agent/pods"))


def no_forward(world: World) -> None:
    world.api.denied.add(("GET", "portforward"))


def not_installed(world: World) -> None:
    for node in ("n1", "n2"):
        del world.api.pods["ckpt-agent", f"agent-{node}"]


def no_authority(world: World) -> None:
    world.api.config_maps.clear()


def other_authority(world: World) -> None:
    pem = Authority("somebody else").pem.decode()
    world.api.config_maps["ckpt-agent", "ckpt-agent-ca"] = {"ca.crt": pem}


def unknown_to_agents(world: World) -> None:
    world.agents.tokens.clear()


def none_ready(world: World) -> None:
    for node in ("n1", "n2"):
        world.api.pods["ckpt-agent", f"agent-{node}"]["status"]["conditions"] = []


def defect(world: World) -> None:
    def broken() -> None:
        raise RuntimeError("oh")

    world.agents.fails["ListImages"] = broken


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (expired, "unauthenticated", "the token has expired"),
        (forbidden, "forbidden", "cannot GET"),
        (no_forward, "unreachable", "cannot create pods/portforward"),
        (not_installed, "not-found", "no agent runs in namespace ckpt-agent"),
        (no_authority, "not-found", "ConfigMap ckpt-agent/ckpt-agent-ca"),
        (other_authority, "unreachable", "was not issued by the authority"),
        (unknown_to_agents, "unauthenticated", "the token is not known"),
        (none_ready, "unreachable", "no agent is ready"),
        (defect, "agent-defect", "the agent on n1"),
    ],
)
def test_what_is_wrong_is_named_with_a_way_out(
    run: Any, world: World, change: Any, code: str, told: str
) -> None:
    change(world)
    ran = run("list", "-n", "default", "-o", "json")
    assert ran.out == ""
    error = checked(json.loads(ran.err))
    assert error["code"] == code
    assert told in error["message"]
    assert error["hint"]
    assert apiserver.TOKEN not in ran.err


def test_an_agent_that_cannot_be_reached_is_passed_over_where_any_will_do(
    run: Any, world: World
) -> None:
    name = world.agents.add_image("job", 1)
    del world.api.backends["agent-n1", 7443]
    assert run("list", "-n", "default", "-o", "name").out.split() == [name]
    assert [node for node, _ in world.called("ListImages")] == ["n2"]


def test_an_agent_that_has_too_much_to_do_is_passed_over_where_any_will_do(
    run: Any, world: World
) -> None:
    class Once(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            return self.pop(key, default)

    name = world.agents.add_image("job", 1)
    world.agents.fails = Once(ListImages=errors.Overloaded("too many large groups"))
    assert run("list", "-n", "default", "-o", "name").out.split() == [name]
    assert [node for node, _ in world.called("ListImages")] == ["n1", "n2"]
    world.agents.fails = {"ListImages": errors.Overloaded("too many large groups")}
    ran = run("list", "-n", "default", "-o", "json")
    assert json.loads(ran.err)["code"] == "overloaded"


def test_an_api_server_of_another_authority_is_not_trusted(
    run: Any, world: World, tmp_path: pathlib.Path
) -> None:
    config = world.api.kubeconfig(tmp_path / "other", Authority("somebody else"))
    ran = run("list", "--kubeconfig", config)
    assert ran.status == exits.ENVIRONMENT
    assert "was not issued by the authority that the kubeconfig names" in ran.err
    assert world.api.requests == []


def test_an_api_server_that_is_not_there_is_named(
    run: Any, world: World, authority: Authority, tmp_path: pathlib.Path
) -> None:
    world.api.url = "https://127.0.0.1:1"
    ran = run("list", "--kubeconfig", world.api.kubeconfig(tmp_path / "gone", authority))
    assert ran.status == exits.ENVIRONMENT
    assert "https://127.0.0.1:1" in ran.err
    assert "onnection refused" in ran.err


def test_a_credential_plugin_that_fails_is_named(
    run: Any, world: World, authority: Authority, tmp_path: pathlib.Path
) -> None:
    user = {
        "exec": {
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": "/bin/false",
            "interactiveMode": "Never",
        }
    }
    config = world.api.kubeconfig(tmp_path / "plugin", authority, user)
    ran = run("list", "--kubeconfig", config)
    assert ran.status == exits.REFUSED
    assert "/bin/false" in ran.err


# The program, also as a plugin of kubectl.


def plugin(entry: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"from agent.cli import kubectl; kubectl.{entry}()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_a_plugin_of_kubectl_always_means_the_cluster(world: World) -> None:
    name = world.agents.add_image("job", 1)
    assert plugin("main", "list", "-o", "name").stdout == f"{name}\n"
    wrong = plugin("main", "nonsense")
    assert (wrong.returncode, "see kubectl ckpt --help" in wrong.stderr) == (exits.USAGE, True)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("mig",), ["migrate\tMove a pod or a JobSet to other nodes.", ":4"]),
        (("dump", "po"), ["pod/job", ":4"]),
        (("migrate", "pod/job", "--to", ""), ["n1", "n2", ":4"]),
        (("restore", "job@"), ["job@20260131-235901-0a1b2c", ":4"]),
        (("dump", "-n", "elsewhere", "pod/"), [":4"]),
        (("list", "--kubeconfig", "/nonexistent", ""), [":4"]),
        (("restore", "job", "--stdout", ""), [":0"]),
    ],
)
def test_kubectl_is_offered_verbs_pods_nodes_and_images(
    world: World, words: tuple[str, ...], offered: list[str]
) -> None:
    world.agents.add_image("job", 1)
    assert plugin("complete", *words).stdout.splitlines() == offered


def test_verbs_on_this_host_load_neither_grpc_nor_the_api_client() -> None:
    code = (
        "import sys; from agent.cli import main; main.run(['doctor', '-o', 'name']);"
        "print([m for m in ('grpc', 'kubernetes', 'websocket') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.stdout.splitlines()[-1] == "[]"
