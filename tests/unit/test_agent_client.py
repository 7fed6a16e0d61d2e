"""A caller's side of the node API, against a real gRPC server with real TLS."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest

from agent import errors
from agent.rpc import client
from tests.fakes import nodeagent
from tests.fakes.authority import Authority


@pytest.fixture
def ours() -> Authority:
    return Authority("ckpt-agent")


@pytest.fixture
def agents() -> nodeagent.Cluster:
    return nodeagent.Cluster(tokens={"good"})


@contextlib.contextmanager
def connected(
    agents: nodeagent.Cluster,
    issuer: Authority,
    trusted: Authority,
    *,
    token: Callable[[], str | None] = lambda: "good",
    server_name: str = nodeagent.SERVER_NAME,
) -> Iterator[client.Agent]:
    with nodeagent.running(agents, "n1", issuer) as address:
        credentials = client.Credentials(trusted.pem, server_name, token)
        with client.connect(address, credentials, peer="the agent on n1") as agent:
            yield agent


def test_the_token_is_asked_for_at_each_call(ours: Authority, agents: nodeagent.Cluster) -> None:
    tokens = iter(["expired", "good"])
    with connected(agents, ours, ours, token=lambda: next(tokens)) as agent:
        with pytest.raises(errors.Unauthenticated):
            agent.images("ns")
        assert agent.images("ns") == []


def test_who_is_asked_when_the_connection_was_closed_meanwhile_cannot_be_reached(
    ours: Authority, agents: nodeagent.Cluster
) -> None:
    with connected(agents, ours, ours) as agent:
        assert agent.images("ns") == []
    with pytest.raises(errors.Unreachable, match="not asked any more"):
        agent.images("ns")


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_nothing_is_said_to_an_agent_that_is_not_the_one_meant(
    ours: Authority, agents: nodeagent.Cluster, wrong: str
) -> None:
    asked: list[int] = []

    def token() -> str:
        asked.append(1)
        return "good"

    trusted = Authority("somebody else") if wrong == "authority" else ours
    name = "another.svc" if wrong == "name" else nodeagent.SERVER_NAME
    with (
        connected(agents, ours, trusted, token=token, server_name=name) as agent,
        pytest.raises(errors.Unreachable),
    ):
        agent.images("ns")
    assert agents.calls == []


def test_an_error_of_the_agent_arrives_as_it_was(
    ours: Authority, agents: nodeagent.Cluster
) -> None:
    agents.fails["Dump.late"] = errors.RestoreConflict(
        "in the way", hint="go away", reasons=["a", "b"], count=3
    )
    with connected(agents, ours, ours) as agent, pytest.raises(errors.RestoreConflict) as caught:
        agent.dump("ns", "job", pod_uid="", deadline_s=10.0)
    assert (caught.value.message, caught.value.hint) == ("in the way", "go away")
    assert caught.value.facts == {"reasons": ["a", "b"], "count": 3}


def test_a_cancelled_dump_ends_at_once_and_the_agent_hears_of_it(
    ours: Authority, agents: nodeagent.Cluster
) -> None:
    agents.hold = threading.Event()
    cancel = threading.Event()
    with connected(agents, ours, ours) as agent:
        with pytest.raises(errors.Interrupted):
            agent.dump(
                "ns",
                "job",
                pod_uid="",
                deadline_s=60.0,
                cancel=cancel,
                progress=lambda phase, raw_bytes: cancel.set(),
            )
        assert agents.given_up.wait(30)
        agents.hold.set()


def test_an_agent_that_ends_during_a_dump_is_told_apart_from_one_that_was_never_reached(
    ours: Authority, agents: nodeagent.Cluster
) -> None:
    agents.hold = threading.Event()
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(nodeagent.running(agents, "n1", ours))
        credentials = client.Credentials(ours.pem, nodeagent.SERVER_NAME, lambda: "good")
        agent = stack.enter_context(client.connect(address, credentials, peer="the agent"))

        def end(phase: str, raw_bytes: int) -> None:
            agents.ends()

        with pytest.raises(errors.Unreachable) as caught:
            agent.dump("ns", "job", pod_uid="", deadline_s=60.0, progress=end)
        agents.hold.set()
    assert caught.value.facts["begun"]
    with client.connect("127.0.0.1:1", credentials, peer="the agent") as agent:
        with pytest.raises(errors.Unreachable) as never:
            agent.dump("ns", "job", pod_uid="", deadline_s=60.0)
        assert "begun" not in never.value.facts


def test_an_agent_that_is_told_to_end_is_not_a_caller_that_gave_up(
    ours: Authority, agents: nodeagent.Cluster
) -> None:
    agents.fails["Dump.late"] = errors.Interrupted("the agent ends")
    with connected(agents, ours, ours) as agent, pytest.raises(errors.Unreachable) as caught:
        agent.dump("ns", "job", pod_uid="", deadline_s=10.0, cancel=threading.Event())
    assert caught.value.retryable
    assert caught.value.facts["begun"]


def test_a_dump_that_hangs_ends_with_its_deadline(
    ours: Authority, agents: nodeagent.Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_MARGIN_S", 0.5)
    agents.hold = threading.Event()
    with connected(agents, ours, ours) as agent:
        with pytest.raises(errors.DeadlineExceeded):
            agent.dump("ns", "job", pod_uid="", deadline_s=0.5)
        agents.hold.set()


def test_the_credentials_do_not_show_in_a_repr() -> None:
    made = client.Credentials(b"ca", "name", lambda: "secret", b"certificate", b"key")
    assert "secret" not in repr(made)
    assert "key" not in repr(made).replace("key_pem", "")
