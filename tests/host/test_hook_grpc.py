"""Hooks over gRPC: a real server in a real container, called as any other hook."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any, cast

import pytest

from agent import errors
from agent.model import hooks
from agent.model.pods import Placement
from agent.node import hookcalls
from tests.host.boxes import ROOT, Boxes
from tests.host.nodes import wait_for
from tests.host.test_hook_calls import SERVER as HTTP_SERVER
from tests.host.test_hooks import Job, Jobs, jobs

__all__ = ["jobs"]

# Serves the API as soon as there is a loopback, and does what the hook's name says. It writes what
# it is told.
SERVER = """
import sys, time
sys.path[:0] = ['/opt/checkout', '/opt/site']
from concurrent.futures import ThreadPoolExecutor
import grpc
from google.protobuf import json_format
from agent.rpc.v1 import hooks_pb2, hooks_pb2_grpc
class Hooks(hooks_pb2_grpc.HooksServicer):
    def Call(self, request, context):
        with open('/disk/told', 'a') as told:
            told.write(json_format.MessageToJson(request, indent=None) + '\\n')
        if request.hook == 'refuse':
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, 'not now\\n\\x1b[31mbecause')
        if request.hook == 'slow':
            time.sleep(60)
        answer = hooks_pb2.HookResponse()
        if request.hook == 'talk':
            answer.MergeFromString(b'\\x0a\\x80\\x80\\x40' + bytes(1 << 20))
        return answer
server = grpc.server(ThreadPoolExecutor(4))
if sys.argv[1] == 'serve':
    hooks_pb2_grpc.add_HooksServicer_to_server(Hooks(), server)
server.add_insecure_port('localhost:50051')
server.add_insecure_port('unix:/disk/socket')
while not int(open('/sys/class/net/lo/flags').read(), 16) & 1:
    time.sleep(0.01)
server.start()
n = 0
while True:
    time.sleep(0.02)
    n += 1
    print(n, flush=True)
"""
BY: dict[str, dict[str, Any]] = {"port": {"port": 50051}, "socket": {"socket": "/disk/socket"}}


def calling(name: str, by: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "grpc": BY[by], **fields}


def bound(source: Path, place: str) -> dict[str, Any]:
    return {
        "type": "bind",
        "source": str(source),
        "destination": place,
        "options": ["rbind", "ro"],
    }


def serving(jobs: Jobs, wanted: dict[str, Any], how: str = "serve") -> Job:
    mounts = [
        bound(Path(sysconfig.get_paths()["purelib"]), "/opt/site"),
        bound(ROOT / "agent", "/opt/checkout/agent"),
    ]
    job = jobs.start("job", wanted, "python3", "-c", SERVER, how, mounts=mounts)
    up = ["nsenter", "-t", str(job.box.pid), "-n", "ip", "link", "set", "lo", "up"]
    subprocess.run(up, check=True)
    wait_for(lambda: job.box.log.read_text())
    return job


def told(job: Job) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.box.root("/disk/told").read_text().splitlines()]


@pytest.mark.parametrize("by", ["port", "socket"])
def test_a_call_tells_the_workload_what_happens_and_it_is_dumped_right_after(
    jobs: Jobs, by: str
) -> None:
    job = serving(
        jobs,
        {
            "pre": [calling("ask", by)],
            "post": [calling("go", by), calling("done", by, when="decided")],
        },
    )
    outcome = job.dump()
    assert outcome.hook_problems == ()
    now = {"pod": "job", "podUid": job.uid, "node": "n1"}
    image = outcome.image
    assert told(job) == [
        {"hook": "ask", "phase": "HOOK_PHASE_PRE", "namespace": "default", "now": now},
        {
            "hook": "go",
            "phase": "HOOK_PHASE_POST",
            "outcome": "HOOK_OUTCOME_CAPTURED",
            "namespace": "default",
            "now": now,
        },
        {
            "hook": "done",
            "phase": "HOOK_PHASE_POST",
            "outcome": "HOOK_OUTCOME_COMMITTED",
            "image": f"{image.group}@{image.epoch}",
            "namespace": "default",
            "now": now,
        },
    ]
    job.goes_on()


@pytest.mark.parametrize("by", ["port", "socket"])
@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("refuse", "answered with FAILED_PRECONDITION"),
        ("slow", "did not end within"),
        ("talk", "answered with RESOURCE_EXHAUSTED"),
    ],
)
def test_a_call_that_fails_gives_the_epoch_up(jobs: Jobs, by: str, name: str, word: str) -> None:
    # Long enough for the server to have heard of it.
    short = {"deadlineSeconds": 5.5} if name == "slow" else {}
    hook = calling(name, by, **short)
    job = serving(jobs, {"pre": [hook], "post": [calling("go", by)]})
    with pytest.raises(errors.HookFailed, match=word) as failed:
        job.dump()
    if name == "refuse":
        assert failed.value.facts["output"] == "not now\n?[31mbecause"
    assert told(job)[-1]["outcome"] == "HOOK_OUTCOME_ABORTED"
    job.goes_on()


def test_a_server_without_the_service_is_told_from_one_that_refuses(jobs: Jobs) -> None:
    job = serving(jobs, {"pre": [calling("ask", "port", onFailure="ignore")]}, how="other")
    (said,) = job.dump().hook_problems
    assert "answered with UNIMPLEMENTED" in said


@pytest.mark.parametrize("user", [0, 1234])
def test_a_socket_is_called_with_the_rights_of_the_containers_own_user(
    boxes: Boxes, user: int
) -> None:
    box = boxes.start("box", "python3", "-c", HTTP_SERVER, "600", user=user)
    wait_for(lambda: box.log.read_text())
    calls = hookcalls.Calls(cast("hookcalls.Executes", None))
    hook = hooks.Hook("ask", hooks.Grpc(socket="/disk/socket"))
    told = hooks.Told("ask", hooks.Phase.PRE, "default", Placement("p", "u", "n", ()))
    with pytest.raises(errors.HookFailed, match="does not answer as a gRPC server does"):
        calls.call(hook, [box.container], told)
    # gRPC connects to nothing by itself: the only one who asked is the container's own user.
    assert box.root("/disk/peers").read_text() == f"{user}\n"
    os.chown(box.root("/disk/socket"), 4321, 4321)
    with pytest.raises(errors.HookFailed, match="Permission denied"):
        calls.call(hook, [box.container], told)
