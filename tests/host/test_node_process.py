"""``ckpt-agent node`` as a process: it comes up, says when it serves, and ends in good order."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import cri, nodeapi
from tests.fakes.authority import Authority
from tests.host.nodes import NODE, certify, wait_for

PROGRAM = Path(sys.executable).with_name("ckpt-agent")


class Agent:
    """The process with what is around it."""

    def __init__(
        self, folder: Path, api: nodeapi.NodeApi, runtime: cri.Cri, **environment: str
    ) -> None:
        self.environment = environment
        self.program = [str(PROGRAM)]
        self.folder = folder
        self.api = api
        self.runtime = runtime
        self.store = folder / "store"
        self.run = folder / "run"
        self.log_file = folder / "log"
        self.popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "KUBECONFIG": str(self.folder / "kubeconfig"),
            "CKPT_AGENT_NODE_NAME": NODE,
            "CKPT_AGENT_STORE": str(self.store),
            "CKPT_AGENT_WORK_DIR": str(self.folder / "work"),
            "CKPT_AGENT_RUNTIME_SOCKET": self.runtime.path,
            "CKPT_AGENT_TLS_DIR": str(self.folder / "tls"),
            "CKPT_AGENT_TOKEN_PORT": "17443",
            "CKPT_AGENT_CERTIFICATE_PORT": "17444",
            "CKPT_AGENT_PROBE_PORT": "17445",
            **self.environment,
        }
        # Its journal lies at a fixed place, which is other agents' as well on this machine.
        script = f'mkdir -p /run/ckpt-agent && mount --bind {self.run} /run/ckpt-agent && exec "$@"'
        with open(self.log_file, "ab") as log:
            self.popen = subprocess.Popen(
                ["unshare", "-m", "sh", "-c", script, "sh", *self.program, "node"],
                env=environment,
                stderr=log,
            )

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.popen
        self.popen.send_signal(number)
        return self.popen.wait(30)

    def kill(self) -> None:
        """End it at once, if it was started."""
        if self.popen:
            with contextlib.suppress(ProcessLookupError):
                self.popen.kill()
            self.popen.wait(30)

    def status(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", 17445, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except ConnectionError:
            return 0
        finally:
            connection.close()

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]

    def health(self) -> int:
        arguments = ["node", "--health", "--token-port", "17443", "--quiet"]
        tls = ["--tls-dir", str(self.folder / "tls")]
        return subprocess.run([PROGRAM, *arguments, *tls], timeout=60, check=False).returncode


@contextlib.contextmanager
def agent_in(folder: Path, authority: Authority, **environment: str) -> Iterator[Agent]:
    """An agent that is still to be started."""
    (folder / "tls").mkdir()
    certify(folder / "tls", authority)
    with nodeapi.running(authority, folder) as api, cri.running(folder) as runtime:
        api.kubeconfig(folder / "kubeconfig", authority)
        found = Agent(folder, api, runtime, **environment)
        found.store.mkdir()
        (found.run / "pods").mkdir(parents=True)
        try:
            yield found
        finally:
            found.kill()


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with agent_in(tmp_path, Authority("ckpt-agent")) as found:
        yield found


def test_it_serves_when_everything_has_answered_and_ends_when_told(agent: Agent) -> None:
    agent.runtime.ready = False
    agent.start()
    wait_for(lambda: agent.status("/livez") == 200, 60)
    wait_for(lambda: any("out of sorts" in line["msg"] for line in agent.log()), 60)
    assert agent.status("/readyz") == 503
    assert agent.health() == 7
    agent.runtime.ready = True
    wait_for(lambda: agent.status("/readyz") == 200, 30)
    assert agent.health() == 0
    aside = agent.store.rename(agent.folder / "aside")
    wait_for(lambda: agent.status("/readyz") == 503, 30)
    aside.rename(agent.store)
    wait_for(lambda: agent.status("/readyz") == 200, 30)
    assert agent.end() == 0
    said = [line["msg"] for line in agent.log()]
    assert "shutting down" in said
    assert said[-1] == "ended"
    assert all({"ts", "level", "logger", "msg"} <= set(line) for line in agent.log())


def test_what_a_killed_predecessor_did_is_told_once_on_the_pod(agent: Agent) -> None:
    uid = agent.api.put("job", NODE, namespace="team-a")
    for number, found in enumerate(({"uid": uid}, {"uid": "an-older-pod"})):
        left = {"kind": "dump", "namespace": "team-a", "pod": "job"} | found
        (agent.run / f"pods/{number}.json").write_text(json.dumps(left))
    agent.start()
    wait_for(lambda: agent.api.events, 60)
    assert agent.end() == 0
    (event,) = agent.api.events
    assert event["reason"] == "CheckpointFailed"
    assert event["regarding"]["uid"] == uid
    told = [line for line in agent.log() if "killed in the middle of a dump" in line["msg"]]
    assert [line["uid"] for line in told] == [uid, "an-older-pod"]
    assert list((agent.run / "pods").iterdir()) == []


@pytest.mark.parametrize("missing", ["tls", "node"])
def test_what_it_cannot_begin_without_is_named(agent: Agent, missing: str) -> None:
    if missing == "tls":
        (agent.folder / "tls/tls.key").unlink()
    environment = {
        "PATH": os.environ["PATH"],
        "KUBECONFIG": str(agent.folder / "kubeconfig"),
        "CKPT_AGENT_TLS_DIR": str(agent.folder / "tls"),
        "CKPT_AGENT_RUNTIME_SOCKET": agent.runtime.path,
    }
    if missing != "node":
        environment["CKPT_AGENT_NODE_NAME"] = NODE
    done = subprocess.run(
        [PROGRAM, "node"], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == (7 if missing == "tls" else 3)
    assert ("tls.crt" if missing == "tls" else "CKPT_AGENT_NODE_NAME") in done.stderr
