"""The commit of a group of thousands of pods, through the real gRPC server: what each gives is as
large as in the field, and comes in as many messages as it takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from agent import errors
from agent.engines.criu import tcpends
from agent.model import ids
from agent.model.access import Caller, Right
from agent.model.cut import End
from agent.model.protocol import Decision
from agent.node import gathering
from agent.node.contribution import Contribution, Stop
from agent.node.epochs import EpochService
from agent.rpc import client, server
from agent.rpc.certificates import Certificates
from agent.rpc.epochclient import Epoch
from agent.rpc.v1 import epochs_pb2 as api
from agent.rpc.v1 import epochs_pb2_grpc
from agent.store import manifest
from agent.store.repository import Part, Store
from agent.volumes.memory import MemoryVolume
from tests import images
from tests.fakes.authority import Authority
from tests.fakes.nodeagent import SERVER_NAME
from tests.images import GROUP, NOW_S
from tests.unit.test_move import pod as example

if TYPE_CHECKING:
    from agent.node.service import Parts

# Who gathers something meanwhile: the same caller, or another.
OTHERS = {"of one in all": "good", "of all": "better"}


class Guard:
    """Knows two users."""

    def __init__(self) -> None:
        self.asked: list[Right] = []

    def authenticate(self, token: str) -> Caller:
        users = {"good": "ada", "better": "bob"}
        if token not in users:
            raise errors.Unauthenticated("the token is not known")
        return Caller(users[token])

    def authorize(self, caller: Caller, right: Right) -> None:
        self.asked.append(right)


@dataclasses.dataclass
class Agent:
    """An agent's epochs API over a store in memory."""

    store: Store
    guard: Guard
    authority: Authority
    server: server.Server

    @contextlib.contextmanager
    def caller(self, token: str = "good") -> Iterator[client.Agent]:
        credentials = client.Credentials(self.authority.pem, SERVER_NAME, lambda: token)
        address = f"127.0.0.1:{self.server.token_port}"
        with client.connect(address, credentials, peer="the agent") as made:
            yield made

    @contextlib.contextmanager
    def stub(self) -> Iterator[epochs_pb2_grpc.EpochsStub]:
        """For whoever does not keep to what the client does."""
        options = (("grpc.ssl_target_name_override", SERVER_NAME),)
        credentials = grpc.ssl_channel_credentials(self.authority.pem)
        address = f"127.0.0.1:{self.server.token_port}"
        with grpc.secure_channel(address, credentials, options) as channel:
            yield epochs_pb2_grpc.EpochsStub(channel)


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    authority = Authority("ckpt-agent")
    certificate, key = authority.issue("agent", hosts=(SERVER_NAME,))
    for name, content in (("tls.crt", certificate), ("tls.key", key), ("ca.crt", authority.pem)):
        (tmp_path / name).write_bytes(content)
    store = Store.open(MemoryVolume(), create=True)
    storages = SimpleNamespace(for_namespace=lambda *_: "default", make=lambda *_: store)
    guard = Guard()
    parts = SimpleNamespace(settings=None, storages=storages, authorize=guard.authorize)
    made = server.Server(
        {"Epochs": EpochService(cast("Parts", parts))},
        guard,
        "n1",
        Certificates(str(tmp_path)),
        server.Ports("127.0.0.1", 0, 0),
    )
    made.start()
    try:
        yield Agent(store, guard, authority, made)
    finally:
        made.stop(0.0)


@contextlib.contextmanager
def contributed(agent: Agent, pods: int, **more: Any) -> Iterator[tuple[Epoch, list[bytes]]]:
    """An epoch of so many pods, each with one member that is in the store, as they give it."""
    epoch = agent.store.new_epoch(GROUP, now_s=NOW_S)
    (member,) = images.simple(pages=2).values()
    small = {ids.member_name(f"worker-0-{i}.trainer"): member for i in range(pods)}
    with agent.store.join(GROUP, epoch, now_s=NOW_S) as writer:
        images.write(writer, small)
        part = writer.finish()
        given = [
            pod(dataclasses.replace(part, members=(ref,), totals=manifest.Totals()), index, **more)
            for index, ref in enumerate(part.members)
        ]
        yield Epoch("team", GROUP, epoch, "default"), given


def pod(part: Part, index: int, connections: int = 4, engines: str = "container") -> bytes:
    """What a rank of a training gives: it is connected with its neighbours of a ring."""
    here = f"10.{index >> 16}.{index >> 8 & 255}.{index & 255}"
    ends = tuple(
        End(here, 40000 + at, "192.0.2.1", 29500, 1 << 31, 0, 1 << 30, f"uid-{index}")
        for at in range(connections)
    )
    name = part.members[0].member
    template = example()
    for container in template["spec"]["containers"]:
        container["env"] = [
            {"name": f"NCCL_SETTING_{at}", "value": "rendezvous.team.svc"} for at in range(64)
        ]
    about = {"member": f"worker-0-{index}", "node": f"n{index}", "pod_template": template}
    about["engine"] = engines.split()[index % len(engines.split())]
    return Contribution(part.encode(), ends, (Stop(name, 0.1, 0.01, 1 << 30, 9),), about).encode()


def test_a_group_of_thousands_of_pods_is_committed(agent: Agent) -> None:
    with contributed(agent, 2000) as (epoch, given), agent.caller() as caller:
        assert sum(map(len, given)) > 2000 * 4500 > 30 * server._REQUEST_BYTES
        found = caller.epochs.decide(epoch, Decision.COMMITTED, given, {"jobset": "train"})
    assert found.decision is Decision.COMMITTED
    assert len(found.members) == 2000
    (summary,) = agent.store.epochs(GROUP)
    assert len(summary.members) == len(summary.facts["pods"]) == 2000
    assert {each["member"] for each in summary.facts["pods"]} == {
        f"worker-0-{index}" for index in range(2000)
    }


@pytest.mark.parametrize(
    ("engines", "told"),
    [("kubelet", "kubelet"), ("kubelet container", "container, kubelet")],
)
def test_an_image_tells_what_captured_it(agent: Agent, engines: str, told: str) -> None:
    with contributed(agent, 3, engines=engines) as (epoch, given), agent.caller() as caller:
        found = caller.epochs.decide(epoch, Decision.COMMITTED, given)
    assert found.engine == told
    (summary,) = agent.store.epochs(GROUP)
    assert summary.facts["engine"] == told


def test_what_one_pod_gives_may_be_larger_than_a_message(agent: Agent) -> None:
    with contributed(agent, 3, connections=4000) as (epoch, given), agent.caller() as caller:
        assert min(map(len, given)) > 2 * server._REQUEST_BYTES
        found = caller.epochs.decide(epoch, Decision.COMMITTED, given)
    assert found.decision is Decision.COMMITTED
    assert len(found.leaving) == 12_000


@pytest.mark.parametrize("cuts", ["consistent", "inconsistent"])
def test_pods_that_were_not_cut_at_one_instant_are_never_committed(agent: Agent, cuts: str) -> None:
    """Two ranks of a real training; of those half a second apart one had sent more than a MiB."""
    with contributed(agent, 2) as (epoch, given), agent.caller() as caller:
        torn = [
            dataclasses.replace(Contribution.decode(each), ends=tuple(ends)).encode()
            for each, ends in zip(given, captured(cuts), strict=True)
        ]
        if cuts == "consistent":
            found = caller.epochs.decide(epoch, Decision.COMMITTED, torn)
            assert (found.connections, found.leaving) == (1, ())
            assert len(list(agent.store.epochs(GROUP))) == 1
            return
        with pytest.raises(errors.CutTorn, match="were not cut at one instant") as refused:
            caller.epochs.decide(epoch, Decision.COMMITTED, torn)
        assert list(agent.store.epochs(GROUP)) == []
        assert caller.epochs.decide(epoch, Decision.ABANDONED).decision is Decision.ABANDONED
    # Which connection, and by how much.
    told = re.search(r": connection .+ from r[01] to r[01]: ([0-9]+) bytes", refused.value.message)
    assert told is not None
    assert int(told[1]) > 1 << 20
    assert "try again" in refused.value.hint


@pytest.mark.parametrize(
    ("engines", "closed", "torn"),
    [
        ("kubelet", False, True),
        ("kubelet", True, False),  # its caller may be gone
        ("kubelet container", False, False),  # what the one that stood still said is held there
    ],
)
def test_who_called_through_a_service_was_not_apart(
    agent: Agent, engines: str, closed: bool, torn: bool
) -> None:
    """Its answers came from the Service's address, which nobody held."""
    calls = End("10.0.0.0", 40000, "10.96.0.7", 80, 100, 0, 500, "uid-0")
    called = End("10.0.0.1", 8080, "10.0.0.0", 40000, 400, 0, 100, "uid-1", peer_closed=closed)
    with contributed(agent, 2, engines=engines) as (epoch, given), agent.caller() as caller:
        parts = [
            dataclasses.replace(
                decoded,
                ends=(end,),
                pod={**decoded.pod, "addresses": [end.local]},
            ).encode()
            for decoded, end in zip(map(Contribution.decode, given), (calls, called), strict=True)
        ]
        if not torn:
            found = caller.epochs.decide(epoch, Decision.COMMITTED, parts)
            assert len(found.leaving) == 2
            return
        with pytest.raises(errors.CutTorn, match=r"10\.0\.0\.1:8080 -> 10\.0\.0\.0:40000"):
            caller.epochs.decide(epoch, Decision.COMMITTED, parts)
        assert list(agent.store.epochs(GROUP)) == []


def captured(cuts: str) -> list[list[End]]:
    """What CRIU wrote of the connection's ends, by rank."""
    folder = Path(__file__).parent / "cuts" / cuts
    return [
        [dataclasses.replace(end, place=rank) for end in tcpends.read(str(folder / rank))]
        for rank in ("r0", "r1")
    ]


def test_an_epoch_that_is_abandoned_needs_no_contributions(agent: Agent) -> None:
    epoch = Epoch("team", GROUP, agent.store.new_epoch(GROUP, now_s=NOW_S), "default")
    with agent.caller() as caller:
        assert caller.epochs.decide(epoch, Decision.ABANDONED).decision is Decision.ABANDONED


@pytest.mark.parametrize("room", ["of one", "of one in all", "of all"])
def test_no_more_is_gathered_than_there_is_room_for(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, room: str
) -> None:
    with contributed(agent, 100) as (epoch, given), agent.caller() as caller:
        size = sum(map(len, given))
        # As large as can be sent at all; what is gathered for others has to leave that much.
        whole, share = {
            "of one": (2 * size, size - 1),
            "of one in all": (2 * size, size),
            "of all": (size, size),
        }[room]
        monkeypatch.setattr(gathering, "LIMIT_BYTES", whole)
        monkeypatch.setattr(gathering, "SHARE_BYTES", share)
        if room == "of one":
            with pytest.raises(errors.InvalidInput, match="to its commit"):
                caller.epochs.decide(epoch, Decision.COMMITTED, given)
        else:
            sending, ended = threading.Event(), threading.Event()
            with agent.stub() as stub:
                call = stub.DecideEpoch.future(
                    _slowly(epoch, given[:1], sending, ended),
                    metadata=(("authorization", f"Bearer {OTHERS[room]}"),),
                )
                assert sending.wait(10)
                with pytest.raises(errors.Overloaded):
                    _until_refused(caller, epoch, given)
                if room == "of one in all":
                    with agent.caller("better") as other:
                        assert other.epochs.decide(epoch, Decision.COMMITTED, given)
                ended.set()
                assert call.exception(timeout=10) is not None
        # What was refused, or ended, holds nothing any more.
        monkeypatch.setattr(gathering, "LIMIT_BYTES", size)
        monkeypatch.setattr(gathering, "SHARE_BYTES", size)
        found = caller.epochs.decide(epoch, Decision.COMMITTED, given)
        assert found.decision is Decision.COMMITTED


def _until_refused(caller: client.Agent, epoch: Epoch, given: list[bytes]) -> None:
    """The other's message was sent; when it has arrived only its agent knows."""
    wrong = [*given, given[0]]  # more than there ever is room for, so that it can be said again
    for _ in range(1000):
        with contextlib.suppress(errors.InvalidInput):
            caller.epochs.decide(epoch, Decision.COMMITTED, wrong)


def _slowly(
    epoch: Epoch, given: list[bytes], sending: threading.Event, ended: threading.Event
) -> Iterator[api.DecideEpochRequest]:
    yield _first(epoch, contributions=given)
    sending.set()
    ended.wait(30)
    yield api.DecideEpochRequest(contributions=[b"no contribution"])


def _first(epoch: Epoch, **more: Any) -> api.DecideEpochRequest:
    return api.DecideEpochRequest(
        namespace=epoch.namespace,
        group=epoch.group,
        epoch=epoch.name,
        wish=api.DECISION_COMMITTED,
        **more,
    )


def test_nobody_unknown_makes_the_agent_wait_for_what_comes(agent: Agent) -> None:
    read, ended = threading.Event(), threading.Event()

    def messages() -> Iterator[api.DecideEpochRequest]:
        read.set()
        ended.wait(30)
        yield api.DecideEpochRequest()

    with agent.stub() as stub:
        call = stub.DecideEpoch.future(messages(), metadata=(("authorization", "Bearer bad"),))
        try:
            failure = call.exception(timeout=10)
        finally:
            ended.set()
    assert isinstance(failure, grpc.RpcError)
    assert failure.code() is grpc.StatusCode.UNAUTHENTICATED
    assert agent.guard.asked == []


@pytest.mark.parametrize(
    "made",
    [b"[" + b",".join([item] * 1000) + b"]" for item in (b"[]", b"{}", b"[[]]")] + [b"[" * 999],
    ids=["lists", "objects", "lists in lists", "depth"],
)
def test_what_is_sent_in_few_bytes_takes_no_gigabytes(made: bytes) -> None:
    with pytest.raises(errors.Corrupt):
        Contribution.decode(
            b'{"part":"","ends":[],"stops":[],"hook_problems":[],"pod":{"made":' + made + b"}}"
        )


def test_a_piece_that_nothing_follows_is_no_contribution(agent: Agent) -> None:
    with contributed(agent, 1) as (epoch, given), agent.stub() as stub:
        message = _first(epoch, contributions=[given[0][:100]], unfinished=True)
        with pytest.raises(grpc.RpcError) as caught:
            stub.DecideEpoch(iter([message]), metadata=(("authorization", "Bearer good"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert agent.store.epochs(GROUP) == []
