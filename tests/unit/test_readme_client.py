"""README.md's client does what is said of it: the text itself is run, over real TLS and with
gRPC's own choice among two replicas; only the way to the API server is left out.
"""

from __future__ import annotations

import io
import json
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from agent import errors
from agent.rpc import status
from agent.rpc.v1 import coordinator_pb2 as api
from tests import readme
from tests.fakes import coordinator
from tests.fakes.authority import Authority

IMAGE = coordinator.image("jobset.train")
RUNNING = {"state": api.OPERATION_STATE_RUNNING, "step": "freezing"}
DUMPED = {"state": api.OPERATION_STATE_SUCCEEDED, "image": IMAGE}
FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount/"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[coordinator.Cluster]:
    """A coordinator of two replicas, where the client looks for it."""
    found = coordinator.Cluster(tokens={"a-token"})
    ours = Authority("ckpt-agent")
    opened = grpc.secure_channel

    def ask(request: urllib.request.Request, context: Any) -> io.BytesIO:
        path = "/api/v1/namespaces/ckpt-agent/configmaps/ckpt-agent-ca"
        assert request.full_url == f"https://kubernetes.default.svc{path}"
        assert request.get_header("Authorization") == "Bearer a-token"
        return io.BytesIO(json.dumps({"data": {"ca.crt": ours.pem.decode()}}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", ask)
    monkeypatch.setattr("ssl.create_default_context", lambda cafile: cafile)
    with (
        coordinator.running(found, "a", ours) as first,
        coordinator.running(found, "b", ours) as second,
    ):

        def both(target: str, credentials: Any, options: Any) -> grpc.Channel:
            assert target == f"dns:///{coordinator.SERVER_NAME}:7543"
            name = ("grpc.ssl_target_name_override", coordinator.SERVER_NAME)
            return opened(f"ipv4:{first},{second}", credentials, [*options, name])

        monkeypatch.setattr(grpc, "secure_channel", both)
        yield found


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that the client prints for the JobSet train of team-a."""

    def read(path: str) -> io.StringIO:
        assert path == f"{FOLDER}token"
        return io.StringIO("a-token")

    monkeypatch.setattr(sys, "argv", ["client", "team-a", "train", "before-maintenance"])
    exec(compile(readme.client(), "README.md", "exec"), {"open": read})
    return capsys.readouterr().out.splitlines()


def test_it_follows_a_checkpoint_to_its_image(
    cluster: coordinator.Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cluster.script = [RUNNING, DUMPED]
    assert run(monkeypatch, capsys)[-1] == IMAGE.name
    ((_, _, request),) = [each for each in cluster.calls if each[1] == "EPOCH"]
    assert (request.asking.namespace, request.target.jobset) == ("team-a", "train")
    assert request.asking.idempotency_key == "before-maintenance"
    assert run(monkeypatch, capsys)[-1] == IMAGE.name
    assert len(cluster.operations) == 1, "the same key begins nothing new"


def test_it_goes_on_with_the_replica_that_takes_over(
    cluster: coordinator.Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def dies() -> None:
        assert cluster.watched.wait(30)
        cluster.lead("b")
        cluster.ends["a"]()

    cluster.script = [RUNNING, dies, {"takeovers": 1}, DUMPED]
    assert run(monkeypatch, capsys)[-1] == IMAGE.name
    assert {replica for replica, _, _ in cluster.calls} == {"a", "b"}


def test_it_ends_with_the_reason_of_what_failed(
    cluster: coordinator.Cluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    why = status.message(errors.CutTorn("the cut does not fit together"))
    cluster.script = [RUNNING, {"state": api.OPERATION_STATE_FAILED, "error": why}]
    with pytest.raises(SystemExit, match="does not fit together"):
        run(monkeypatch, capsys)


def test_it_is_short_and_needs_nothing_but_what_is_said() -> None:
    text = readme.client()
    assert len(text.splitlines()) <= 32
    assert "import grpc\n" in text
