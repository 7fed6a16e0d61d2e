"""A server that one caller cannot keep to itself: real gRPC over real TLS."""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agent import errors
from agent.cluster.session import Session
from agent.coordinator import checkpoint
from agent.host import clock
from agent.model.access import Caller, Right
from agent.model.protocol import LEAVE_RUNNING, Said
from agent.model.rates import Rate
from agent.rpc import client, limits, status
from agent.rpc.certificates import Certificates
from agent.rpc.server import Ports, Server
from agent.rpc.v1 import epochs_pb2, node_pb2, node_pb2_grpc
from agent.settings import Settings
from tests.fakes.authority import Authority

PEER = "the server"
NAME = "ckpt-agent-node.ckpt-agent.svc"


class Guard:
    """A token is its user's name; nobody has an empty one or one that begins with x."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def authenticate(self, token: str) -> Caller:
        self.asked.append(token)
        if token.startswith("x"):
            raise errors.Unauthenticated("nobody")
        return Caller(token)

    def authorize(self, caller: Caller, right: Right) -> None:
        if right.namespace == "secret":
            self.asked.append(right.namespace)
            raise errors.Forbidden("no")


class Service:
    """Answers everything with nothing; a verification lasts until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.said: dict[tuple[str, int], int] = {}

    def verify_image(self, request: Any, call: Any) -> Iterator[node_pb2.VerifyEvent]:
        yield node_pb2.VerifyEvent(done_bytes=1)
        self.go.wait(30)

    def list_images(self, request: Any, call: Any) -> node_pb2.ListImagesResponse:
        return node_pb2.ListImagesResponse()

    def get_image(self, request: Any, call: Any) -> node_pb2.GetImageResponse:
        self.go.wait(30)
        return node_pb2.GetImageResponse()

    def new_epoch(self, request: Any, call: Any) -> epochs_pb2.NewEpochResponse:
        return epochs_pb2.NewEpochResponse(epoch="20260131-235959-0a1b2c", storage="default")

    def take_part(self, request: Any, call: Any) -> epochs_pb2.TakePartResponse:
        """Each step takes the pod some calls."""
        key = request.pod_uid, request.step
        self.said[key] = self.said.get(key, 0) + 1
        if self.said[key] < 3:
            return epochs_pb2.TakePartResponse()
        return epochs_pb2.TakePartResponse(answered=True, contribution=b"part")

    def decide_epoch(self, request: Any, more: Any, call: Any) -> epochs_pb2.DecideEpochResponse:
        image = node_pb2.Image(name="jobset.train@20260131-235959-0a1b2c", group="jobset.train")
        image.created_at.FromSeconds(1_790_000_000)
        return epochs_pb2.DecideEpochResponse(decision=request.wish, image=image)

    def __getattr__(self, name: str) -> Any:
        return lambda request, call: None


class Served:
    def __init__(self, server: Server, authority: Authority) -> None:
        self.server, self.guard, self.service = server, Guard(), Service()
        self.port, self._authority = server.token_port, authority

    def agent(self, token: str) -> contextlib.AbstractContextManager[client.Agent]:
        credentials = client.Credentials(self._authority.pem, NAME, lambda: token)
        return client.connect(f"127.0.0.1:{self.port}", credentials, peer=PEER)

    @contextlib.contextmanager
    def stub(self) -> Iterator[node_pb2_grpc.NodeStub]:
        with self.channel() as channel:
            yield node_pb2_grpc.NodeStub(channel)

    @contextlib.contextmanager
    def channel(self) -> Iterator[grpc.Channel]:
        name = (("grpc.ssl_target_name_override", NAME),)
        credentials = grpc.ssl_channel_credentials(self._authority.pem)
        with grpc.secure_channel(f"localhost:{self.port}", credentials, name) as channel:
            yield channel


@contextlib.contextmanager
def serving(folder: Path, each_caller: limits.Limits | None) -> Iterator[Served]:
    authority = Authority("ckpt-agent")
    certificate, key = authority.issue("ckpt-agent", hosts=(NAME,))
    for name, content in (("tls.crt", certificate), ("tls.key", key), ("ca.crt", authority.pem)):
        (folder / name).write_bytes(content)
    guard, service = Guard(), Service()
    server = Server(
        {"Node": service, "Epochs": service},
        guard,
        "n1",
        Certificates(str(folder)),
        Ports("127.0.0.1", 0, 0),
        each_caller=each_caller,
    )
    server.start()
    found = Served(server, authority)
    found.guard, found.service = guard, service
    try:
        yield found
    finally:
        service.go.set()
        server.stop(1.0)


def told(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


def listed(stub: node_pb2_grpc.NodeStub, token: str, namespace: str = "default") -> None:
    request = node_pb2.ListImagesRequest(namespace=namespace)
    try:
        stub.ListImages(request, timeout=20, metadata=told(token))
    except grpc.RpcError as exc:
        raise status.error(exc, PEER) from exc


def test_a_caller_over_its_rate_is_told_when_to_come_again_and_others_are_served(
    tmp_path: Path,
) -> None:
    allowed = limits.Limits(Rate(per_s=0.001, burst=3), lasting=2)
    with serving(tmp_path, allowed) as served, served.stub() as stub:
        for _ in range(3):
            listed(stub, "ada")
        with pytest.raises(errors.Overloaded, match="more often") as caught:
            listed(stub, "ada")
        assert 900 < float(str(caught.value.facts["retry_after_s"])) <= 1000
        assert caught.value.retryable
        listed(stub, "bob")
        request = node_pb2.ListImagesRequest(namespace="default")
        with pytest.raises(grpc.RpcError) as raw:
            stub.ListImages(request, timeout=20, metadata=told("ada"))
        assert isinstance(raw.value, grpc.Call)
        assert raw.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing = dict(raw.value.trailing_metadata() or ())
        assert 900_000 < int(trailing["grpc-retry-pushback-ms"]) <= 1_000_000


def test_calls_that_last_are_so_many_for_each_caller(tmp_path: Path) -> None:
    allowed = limits.Limits(Rate(per_s=100.0, burst=100), lasting=2)
    request = node_pb2.VerifyImageRequest(namespace="default", image="a@b")
    with serving(tmp_path, allowed) as served, served.stub() as stub:

        def begin(token: str) -> Any:
            call = stub.VerifyImage(request, timeout=20, metadata=told(token))
            next(call)
            return call

        first, second = begin("ada"), begin("ada")
        with pytest.raises(grpc.RpcError) as caught:
            begin("ada")
        assert isinstance(status.error(caught.value, PEER), errors.Overloaded)
        begin("bob").cancel()
        served.service.go.set()
        assert list(first) == list(second) == []
        begin("ada").cancel()


def test_calls_that_say_nothing_leave_threads_for_others(tmp_path: Path) -> None:
    """Whoever has a token, and no right, can begin them."""
    over = threading.Event()

    def nothing() -> Iterator[node_pb2.ImportImageRequest]:
        over.wait(30)
        yield from ()

    with serving(tmp_path, None) as served, served.stub() as stub:
        calls = [
            stub.ImportImage.future(nothing(), timeout=30, metadata=told("ada")) for _ in range(40)
        ]
        most = 40 - limits._SILENT
        deadline = clock.Deadline.after(60)
        assert clock.wait_until(lambda: sum(each.done() for each in calls) == most, deadline)
        refused = [status.error(each.exception(), PEER) for each in calls if each.done()]
        assert all(isinstance(each, errors.Overloaded) for each in refused)
        listed(stub, "bob")
        over.set()


def test_whoever_coordinates_all_pods_of_a_node_is_never_kept_waiting(tmp_path: Path) -> None:
    settings = Settings(agent_silence_s=60.0)  # of a busy machine
    allowed = limits.for_agents(
        Rate(settings.caller_rate_per_s, settings.caller_burst), settings.caller_streams, ""
    )
    members = [
        checkpoint.Member(f"worker-0-{each}", f"pod-{each}", f"uid-{each}", "n1")
        for each in range(100)
    ]
    refused: list[errors.CkptError] = []
    with serving(tmp_path, allowed) as served, served.agent("ada") as agent:
        take_part = agent.epochs.take_part

        def noted(*args: Any, **more: Any) -> Said | None:
            try:
                return take_part(*args, **more)
            except errors.CkptError as exc:
                refused.append(exc)
                raise

        agent.epochs.take_part = noted  # type: ignore[method-assign]
        session = types.SimpleNamespace(
            namespace="default",
            settings=settings,
            agent_of=lambda node: agent,
            any_agent=lambda ask: ask(agent),
        )
        for number in range(2):
            served.service.said.clear()
            checkpoint.run(
                cast("Session", session),
                "jobset.train",
                members,
                LEAVE_RUNNING,
                facts={},
                now_s=1e9 + number,
            )
            assert set(served.service.said.values()) == {3}
        assert len(served.service.said) == 100 * (
            len(LEAVE_RUNNING.before) + len(LEAVE_RUNNING.after)
        )
        assert refused == []


def test_the_clusters_coordinator_asks_for_all_of_its_callers(tmp_path: Path) -> None:
    allowed = limits.for_agents(Rate(per_s=0.001, burst=3), 2, "coordinator")
    with serving(tmp_path, allowed) as served, served.stub() as stub:
        for _ in range(20):
            listed(stub, "coordinator")
        for _ in range(3):
            listed(stub, "ada")
        with pytest.raises(errors.Overloaded):
            listed(stub, "ada")


def test_calls_that_wait_for_an_answer_leave_threads_for_others(tmp_path: Path) -> None:
    allowed = limits.Limits(Rate(per_s=100.0, burst=100), lasting=2, at_once=3)
    request = node_pb2.GetImageRequest(namespace="default", image="a@b")
    with serving(tmp_path, allowed) as served, served.stub() as stub:
        waiting = [
            stub.GetImage.future(request, timeout=20, metadata=told("ada")) for _ in range(5)
        ]
        deadline = clock.Deadline.after(60)
        assert clock.wait_until(lambda: sum(each.done() for each in waiting) == 2, deadline)
        refused = [status.error(each.exception(), PEER) for each in waiting if each.done()]
        assert all(isinstance(each, errors.Overloaded) for each in refused)
        listed(stub, "bob")
        served.service.go.set()
        assert sum(each.exception(timeout=20) is None for each in waiting) == 3
        listed(stub, "ada")


def test_whoever_asks_for_what_it_may_not_does_not_keep_the_api_server_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(limits, "clock", types.SimpleNamespace(monotonic_s=lambda: now_s[0]))
    with serving(tmp_path, None) as served, served.stub() as stub:
        for _ in range(50):
            with pytest.raises(errors.Forbidden):
                listed(stub, "ada", "secret")
        for namespace in ("secret", "default"):
            with pytest.raises(errors.Overloaded, match="may not"):
                listed(stub, "ada", namespace)
        assert served.guard.asked.count("secret") == 50
        listed(stub, "bob")
        now_s[0] += 0.5
        listed(stub, "ada")


def test_an_address_of_nobody_is_refused_before_anybody_is_asked_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(limits, "_FORWARDED", ())
    monkeypatch.setattr(limits, "clock", types.SimpleNamespace(monotonic_s=lambda: now_s[0]))
    with serving(tmp_path, None) as served, served.stub() as stub:
        listed(stub, "ada")
        for number in range(50):
            with pytest.raises(errors.Unauthenticated):
                listed(stub, f"x{number}")
        asked = len(served.guard.asked)
        for token in ("x50", "ada"):
            with pytest.raises(errors.Overloaded, match="nobody's"):
                listed(stub, token)
        assert len(served.guard.asked) == asked
        now_s[0] += 0.2
        listed(stub, "ada")


def test_a_stale_token_in_a_port_forward_shuts_nobody_out(tmp_path: Path) -> None:
    with serving(tmp_path, None) as served, served.stub() as stub:
        for number in range(60):
            with pytest.raises(errors.Unauthenticated):
                listed(stub, f"x{number}")
        listed(stub, "ada")


def test_whoever_is_somebody_calls_without_limit_where_none_is_set(tmp_path: Path) -> None:
    with serving(tmp_path, None) as served, served.stub() as stub:
        for _ in range(120):
            listed(stub, "ada")
        assert served.guard.asked == ["ada"] * 120


def test_descriptions_of_the_api_take_the_threads_of_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, None) as served, served.channel() as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        done = threading.Event()

        def slowly() -> Iterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            done.wait(30)

        calls = [stub.ServerReflectionInfo(slowly(), timeout=20) for _ in range(30)]
        said = []
        for each in calls:
            try:
                next(each)
                said.append(grpc.StatusCode.OK)
            except grpc.RpcError:
                said.append(each.code())
        assert said.count(grpc.StatusCode.OK) == 4
        assert set(said) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        listed(node_pb2_grpc.NodeStub(channel), "ada")
        done.set()
        for each in calls:
            each.cancel()


def test_who_watches_whether_it_serves_is_counted_by_address(tmp_path: Path) -> None:
    with serving(tmp_path, None) as served, served.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="agent.rpc.v1.Node")
        calls = [stub.Watch(request, timeout=20) for _ in range(32)]
        assert {next(each).status for each in calls} == {health_pb2.HealthCheckResponse.NOT_SERVING}
        with pytest.raises(grpc.RpcError) as caught:
            next(stub.Watch(request, timeout=20))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        calls[0].cancel()
        assert clock.wait_until(lambda: _watches(stub, request), clock.Deadline.after(60))
        with pytest.raises(grpc.RpcError) as unknown:
            next(stub.Watch(health_pb2.HealthCheckRequest(service="x" * 1000), timeout=20))
        assert isinstance(unknown.value, grpc.Call)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        for each in calls:
            each.cancel()


def test_those_who_leave_hold_up_nobody_who_is_told(tmp_path: Path) -> None:
    """gRPC's own servicer waits for ever when somebody leaves while it tells others."""
    with serving(tmp_path, None) as served, served.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="")
        for turn in range(20):
            calls = [stub.Watch(request, timeout=20) for _ in range(10)]
            for each in calls:
                next(each)
            leaving = threading.Thread(target=lambda: [each.cancel() for each in calls])  # noqa: B023
            leaving.start()
            served.server.set_serving(serving=turn % 2 == 0)
            leaving.join()
            assert clock.wait_until(lambda: _watches(stub, request), clock.Deadline.after(60))
        last = stub.Watch(request, timeout=20)
        assert next(last).status == health_pb2.HealthCheckResponse.NOT_SERVING
        served.server.set_serving(serving=True)
        assert next(last).status == health_pb2.HealthCheckResponse.SERVING
        last.cancel()


def _watches(stub: Any, request: health_pb2.HealthCheckRequest) -> bool:
    call = stub.Watch(request, timeout=20)
    try:
        next(call)
    except grpc.RpcError:
        return False
    call.cancel()
    return True
