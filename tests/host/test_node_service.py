"""The node API over real gRPC and TLS: who is let in, what is dumped and restored, what is told."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agent import errors
from agent.engines.base import RestoredTree
from agent.host import proc
from agent.model.access import API_GROUP
from agent.node import podhooks
from agent.rpc import health
from agent.rpc.v1 import node_pb2, node_pb2_grpc
from tests.fakes.authority import Authority
from tests.host import nodes
from tests.host.conftest import Host, Target
from tests.host.nodes import NODE, SERVER_NAME, VERBS, Node, wait_for


class Kept:
    """The engine; what it restores is our child, and ends with the test."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self.name = host.engine.name
        self.promises = host.engine.promises
        self.capture = host.engine.capture
        self.check_restore = host.engine.check_restore

    def restore(self, source: Any, options: Any, gate: Any) -> RestoredTree:
        tree = self._host.engine.restore(source, options, gate)
        self._host.trees.append(tree)
        return tree


@pytest.fixture
def node(host: Host, tmp_path: Path) -> Iterator[Node]:
    with nodes.running(tmp_path, Kept(host)) as found:
        yield found


class Gated:
    """The engine, held at its gate until told."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.promises = engine.promises
        self.name = engine.name
        self.check_restore = engine.check_restore
        self.entered = threading.Event()
        self.go = threading.Event()

    def capture(self, pid: int, sink: Any, cut: Any, options: Any) -> Any:
        self.entered.set()
        assert self.go.wait(30)
        return self._engine.capture(pid, sink, cut, options)

    def restore(self, source: Any, options: Any, gate: Any) -> Any:
        self.entered.set()
        assert self.go.wait(30)
        return self._engine.restore(source, options, gate)


def reasons(node: Node) -> list[tuple[str, str]]:
    return [(event["regarding"]["name"], event["reason"]) for event in node.api.events]


def wait_for_reason(node: Node, name: str, reason: str) -> dict[str, Any]:
    wait_for(lambda: (name, reason) in reasons(node))
    found: dict[str, Any] = next(e for e in node.api.events if e["reason"] == reason)
    return found


def dump(agent: Any, pod: str = "counter", **more: Any) -> Any:
    more.setdefault("pod_uid", "")
    return agent.dump("default", pod, deadline_s=60.0, **more)


class TestDump:
    def test_a_pod_is_dumped_listed_shown_verified_and_goes_on(
        self, node: Node, host: Host
    ) -> None:
        target = host.start("threads")
        labels = {"app": "x"}
        uid = node.add_pod("counter", target.pid, metadata={"labels": labels, "generation": 3})
        seen: list[tuple[str, int]] = []
        with node.caller(*VERBS) as agent:
            outcome = dump(
                agent, pod_uid=uid, progress=lambda phase, count: seen.append((phase, count))
            )
            assert outcome.image.group == "counter"
            assert [each.name for each in outcome.members] == ["c"]
            assert outcome.members[0].processes == len(proc.tree(target.pid))
            assert outcome.pod_template["metadata"]["labels"] == labels
            assert "nodeName" not in outcome.pod_template["spec"]
            assert [phase for phase, _ in seen][-2:] == ["persist", "done"]
            name = f"counter@{outcome.image.epoch}"
            assert [f"{i.group}@{i.epoch}" for i in agent.images("default")] == [name]
            detail = agent.image("default", "counter")
            assert detail.pod_template == outcome.pod_template
            assert (detail.pod_uid, detail.node, detail.restored_into) == (uid, NODE, "")
            assert detail.document["name"] == name
            assert detail.obstacles == ()
            node.engines.lacking = ["a page", "two"]
            assert agent.image("default", "counter").obstacles == ("a page", "two")
            verified = agent.verify("default", name)
            assert verified.good
            assert verified.read_bytes > 0
        host.assert_running(target)
        host.assert_clean()
        event = wait_for_reason(node, "counter", "CheckpointCompleted")
        assert event["regarding"]["uid"] == uid
        assert name in event["note"]
        assert event["type"] == "Normal"

    def test_images_lie_in_their_namespace_only(self, node: Node, host: Host) -> None:
        target = host.start()
        node.add_pod("counter", target.pid)
        with node.caller(*VERBS) as agent:
            dump(agent)
        with node.caller(*VERBS, user="bob", namespace="team-b") as bob:
            assert bob.images("team-b") == []
            with pytest.raises(errors.NotFound):
                bob.image("team-b", "counter")
            with pytest.raises(errors.Forbidden):
                bob.images("default")
            with pytest.raises(errors.InvalidInput):
                bob.images("../default")
            with pytest.raises(errors.InvalidInput):
                bob.images("")
        root = Path(node.settings.store.path)
        assert [each.name for each in root.iterdir()] == ["default"]
        assert (root / "default").stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("gone", ["pod", "uid", "container", "not-running", "name"])
    def test_what_is_not_there_is_refused_before_anything_is_touched(
        self, node: Node, host: Host, gone: str
    ) -> None:
        target = host.start()
        uid = node.add_pod("counter", target.pid, containers=("c", "d"))
        with node.caller(*VERBS) as agent:
            if gone == "pod":
                with pytest.raises(errors.NotFound, match="no pod default/other on node n1"):
                    dump(agent, "other")
            elif gone == "uid":
                with pytest.raises(errors.Conflict, match=uid):
                    dump(agent, pod_uid="another-uid")
            elif gone == "container":
                with pytest.raises(errors.NotFound, match="has no container 'e'"):
                    dump(agent, containers=("e",))
            elif gone == "not-running":
                with pytest.raises(
                    errors.NotFound, match="container d of pod default/counter does not"
                ):
                    dump(agent, containers=("d",))
            else:
                with pytest.raises(errors.InvalidInput):
                    dump(agent, "../../etc")
            assert agent.images("default") == []
        assert not (node.folder / "stores" / "default").exists()
        host.assert_running(target)

    def test_one_operation_a_container_and_a_limit_in_all(self, node: Node, host: Host) -> None:
        engine = Gated(host.engine)
        node.engines.engine = engine
        for name in ("one", "two", "three"):
            node.add_pod(name, host.start().pid)
        with node.caller(*VERBS) as agent:
            first = threading.Thread(target=dump, args=(agent, "one"))
            first.start()
            assert engine.entered.wait(20)
            with pytest.raises(errors.TargetBusy, match="pod default/one is being dumped"):
                dump(agent, "one")
            second = threading.Thread(target=dump, args=(agent, "two"))
            second.start()
            wait_for(lambda: len(node.operations.running()) == 2)
            with pytest.raises(errors.Overloaded, match="dump of pod default/one"):
                dump(agent, "three")
            engine.go.set()
            first.join(30)
            second.join(30)
            assert len(agent.images("default")) == 2
            dump(agent, "three")

    def test_a_caller_who_leaves_gives_the_dump_up_and_the_pod_goes_on(
        self, node: Node, host: Host
    ) -> None:
        engine = Gated(host.engine)
        node.engines.engine = engine
        target = host.start()
        node.add_pod("counter", target.pid)
        cancel = threading.Event()
        caught: list[BaseException] = []
        with node.caller(*VERBS) as agent:

            def call() -> None:
                try:
                    dump(agent, cancel=cancel)
                except errors.CkptError as exc:
                    caught.append(exc)

            thread = threading.Thread(target=call)
            thread.start()
            assert engine.entered.wait(20)
            cancel.set()
            thread.join(20)
            assert isinstance(caught[0], errors.Interrupted)
            # The operation is told apart from its caller: it ends when it has been undone.
            assert len(node.operations.running()) == 1
            engine.go.set()
            wait_for(lambda: not node.operations.running())
            assert agent.images("default") == []
        host.assert_running(target)
        host.assert_clean()
        wait_for_reason(node, "counter", "CheckpointFailed")

    def test_a_failure_comes_back_as_it_was_and_is_told_on_the_pod(
        self, node: Node, host: Host
    ) -> None:
        class Failing(Gated):
            def capture(self, pid: int, sink: Any, cut: Any, options: Any) -> Any:
                raise errors.CriuFailed("CRIU said no", hint="ask it", log_tail=["Error (x): y"])

        node.engines.engine = Failing(host.engine)
        node.add_pod("counter", host.start().pid)
        with node.caller(*VERBS) as agent:
            with pytest.raises(errors.CriuFailed, match="CRIU said no") as caught:
                dump(agent)
            assert caught.value.facts == {"log_tail": ["Error (x): y"]}
            assert caught.value.hint == "ask it"
        event = wait_for_reason(node, "counter", "CheckpointFailed")
        assert event["type"] == "Warning"
        assert "CRIU said no" in event["note"]

    def test_a_defect_is_told_without_its_details(
        self, node: Node, host: Host, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Broken(Gated):
            def capture(self, pid: int, sink: Any, cut: Any, options: Any) -> Any:
                raise ZeroDivisionError("secret-of-the-agent")

        node.engines.engine = Broken(host.engine)
        node.add_pod("counter", host.start().pid)
        with (
            node.caller(*VERBS) as agent,
            pytest.raises(errors.AgentDefect, match="ZeroDivisionError") as caught,
        ):
            dump(agent)
        assert "secret-of-the-agent" not in caught.value.message
        assert "secret-of-the-agent" in caplog.text

    def test_shutting_down_takes_no_more_and_gives_up_what_runs(
        self, node: Node, host: Host
    ) -> None:
        engine = Gated(host.engine)
        node.engines.engine = engine
        target = host.start()
        node.add_pod("counter", target.pid)
        caught: list[BaseException] = []
        with node.caller(*VERBS) as agent:

            def call() -> None:
                try:
                    dump(agent)
                except errors.CkptError as exc:
                    caught.append(exc)

            thread = threading.Thread(target=call)
            thread.start()
            assert engine.entered.wait(20)
            node.operations.close()
            engine.go.set()
            thread.join(30)
            # To a caller who did not ask for it, the agent went away.
            assert isinstance(caught[0], errors.Interrupted | errors.Unreachable)
            with pytest.raises(errors.Overloaded, match="shutting down"):
                dump(agent)
        host.assert_running(target)
        host.assert_clean()


class TestRestore:
    def dumped(self, node: Node, host: Host, agent: Any) -> tuple[str, Target]:
        target = host.start()
        node.add_pod("counter", target.pid)
        outcome = dump(agent, stop=True)
        assert node.engines.wanted == ["container"]
        for popen in host.popens:
            if popen.pid == target.pid:
                popen.wait()
        node.api.remove("counter")
        wait_for(lambda: node.watch.get("default", "counter") is None)
        node.cri.containers.clear()
        return f"counter@{outcome.image.epoch}", target

    def placeholder(self, node: Node, host: Host, name: str = "counter") -> str:
        pid = host.popen(["sleep", "100"]).pid
        node.states[pid] = "waits"
        return node.add_pod(name, pid)

    def restore(self, agent: Any, image: str, pod: str = "counter", **more: Any) -> Any:
        more.setdefault("pod_uid", "")
        return agent.restore("default", image, pod, deadline_s=60.0, **more)

    def test_an_image_comes_back_and_only_into_one_pod(self, node: Node, host: Host) -> None:
        with node.caller(*VERBS) as agent:
            image, target = self.dumped(node, host, agent)
            uid = self.placeholder(node, host)
            phases: list[str] = []
            outcome = self.restore(agent, image, pod_uid=uid, progress=phases.append)
            assert phases == ["waiting", "verify", "restore", "done"]
            assert outcome.running_s >= outcome.verified_s > 0
            target.check()
            assert agent.image("default", image).restored_into == uid
            wait_for_reason(node, "counter", "RestoreCompleted")
            # A caller whose connection broke asks again, and hears what became of it.
            (waiting,) = [pid for pid, state in node.states.items() if state == "waits"]
            node.states[waiting] = "runs"
            again = self.restore(agent, image, pod_uid=uid)
            assert (again.image, again.running_s) == (outcome.image, 0)
            assert len(host.trees) == 1
            other = self.placeholder(node, host, "twin")
            with pytest.raises(errors.RestoreConflict, match=uid) as caught:
                self.restore(agent, image, "twin", pod_uid=other)
            assert caught.value.facts["reasons"]
            host.trees[0].kill()
            self.restore(agent, image, "twin", pod_uid=other, again=True)
            target.check()
            assert agent.image("default", image).restored_into == other
            agent.delete("default", image)
        assert not (node.folder / "stores/default/restored").exists()

    def test_a_defect_once_it_runs_leaves_the_image_to_the_pod_that_runs_it(
        self, node: Node, host: Host, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def restored(*args: Any, **more: Any) -> tuple[str, ...]:
            raise UnicodeEncodeError("utf-8", "?", 0, 1, "a defect")

        monkeypatch.setattr(podhooks.PodHooks, "restored", restored)
        with node.caller(*VERBS) as agent:
            image, target = self.dumped(node, host, agent)
            uid = self.placeholder(node, host)
            with pytest.raises(errors.CkptError):
                self.restore(agent, image, pod_uid=uid)
            target.check()
            assert agent.image("default", image).restored_into == uid

    def test_it_waits_for_a_pod_that_comes_later(self, node: Node, host: Host) -> None:
        with node.caller(*VERBS) as agent:
            image, target = self.dumped(node, host, agent)

            def come(phase: str) -> None:
                if phase == "waiting":
                    time.sleep(0.5)
                    self.placeholder(node, host)

            outcome = self.restore(agent, image, progress=come)
            assert outcome.waited_s > 0.4
            target.check()

    @pytest.mark.parametrize("wrong", ["runs", "ended", "container", "image", "time"])
    def test_what_is_no_placeholder_is_refused(self, node: Node, host: Host, wrong: str) -> None:
        with node.caller(*VERBS) as agent:
            image, _ = self.dumped(node, host, agent)
            pid = host.popen(["sleep", "100"]).pid
            node.states[pid] = "runs" if wrong == "runs" else "waits"
            if wrong == "ended":
                node.add_pod("counter", pid, phase="Failed")
            elif wrong == "container":
                node.add_pod("counter", pid, containers=("other",))
            elif wrong != "time":
                node.add_pod("counter", pid)
            expected: type[errors.CkptError] = errors.TargetUnsuitable
            if wrong == "image":
                image, expected = "nothing", errors.NotFound
            if wrong == "time":
                expected = errors.DeadlineExceeded
            deadline_s = 1.0 if wrong == "time" else 60.0
            with pytest.raises(expected):
                agent.restore("default", image, "counter", pod_uid="", deadline_s=deadline_s)
        assert not (node.folder / "stores/default/restored").exists()

    def test_a_failed_restore_gives_its_claim_back(self, node: Node, host: Host) -> None:
        class Failing(Gated):
            def restore(self, source: Any, options: Any, gate: Any) -> Any:
                raise errors.RestoreFailed("it did not work", hint="try again")

        with node.caller(*VERBS) as agent:
            image, target = self.dumped(node, host, agent)
            self.placeholder(node, host)
            node.engines.engine = Failing(host.engine)
            with pytest.raises(errors.RestoreFailed):
                self.restore(agent, image)
            assert agent.image("default", image).restored_into == ""
            wait_for_reason(node, "counter", "RestoreFailed")
            node.engines.engine = Kept(host)
            self.restore(agent, image)
            target.check()

    def test_a_caller_who_leaves_while_it_waits_leaves_nothing(
        self, node: Node, host: Host
    ) -> None:
        with node.caller(*VERBS) as agent:
            image, _ = self.dumped(node, host, agent)
            cancel = threading.Event()
            threading.Timer(0.5, cancel.set).start()
            with pytest.raises(errors.Interrupted):
                self.restore(agent, image, cancel=cancel)
        wait_for(lambda: all(t.name != "restore" for t in threading.enumerate()))


class TestAccess:
    def test_each_verb_needs_its_own_right_in_that_namespace(self, node: Node, host: Host) -> None:
        node.add_pod("counter", host.start().pid)
        calls: dict[str, Any] = {
            "create": lambda agent: dump(agent),
            "list": lambda agent: agent.images("default"),
            "get": lambda agent: agent.image("default", "counter"),
            "restore": lambda agent: agent.restore(
                "default", "x", "counter", pod_uid="", deadline_s=5.0
            ),
            "delete": lambda agent: agent.delete("default", "counter@20260101-000000-abcdef"),
        }
        for verb, call in calls.items():
            others = [each for each in VERBS if each != verb]
            refusal = pytest.raises(errors.Forbidden, match=f"not-{verb} may not {verb} images")
            with node.caller(*others, user=f"not-{verb}") as agent, refusal:
                call(agent)
            assert node.api.reviews[-1]["resourceAttributes"]["verb"] == verb
            assert node.api.reviews[-1]["resourceAttributes"]["namespace"] == "default"
        assert not node.operations.running()

    def test_who_is_not_known_is_refused(self, node: Node) -> None:
        with node.connected(token="expired") as agent, pytest.raises(errors.Unauthenticated):
            agent.images("default")
        with node.connected() as agent, pytest.raises(errors.Unauthenticated, match="no bearer"):
            agent.images("default")

    def test_a_token_for_our_audience_is_good(self, node: Node) -> None:
        with node.caller("list", audience=API_GROUP) as agent:
            assert agent.images("default") == []
        with (
            node.caller("list", user="eve", audience="somebody-else") as agent,
            pytest.raises(errors.Unauthenticated),
        ):
            agent.images("default")

    def test_a_client_certificate_of_the_cluster_names_user_and_groups(self, node: Node) -> None:
        certificate = node.cluster_authority.issue("carol", ("team-a", "team-b"))
        node.api.rights["carol"] = {("list", "images", "default")}
        with node.connected(certificate=certificate) as agent:
            assert agent.images("default") == []
            with pytest.raises(errors.Forbidden):
                agent.image("default", "x")
        review = node.api.reviews[0]
        assert review["user"] == "carol"
        assert review["groups"] == ["team-a", "team-b", "system:authenticated"]

    def test_a_certificate_of_anybody_else_or_none_is_no_connection(self, node: Node) -> None:
        node.api.rights["mallory"] = {("list", "images", "default")}
        certificate = Authority("cluster").issue("mallory")
        with (
            node.connected(certificate=certificate) as agent,
            pytest.raises(errors.Unreachable),
        ):
            agent.images("default")
        channel = grpc.secure_channel(
            f"localhost:{node.server.certificate_port}",
            grpc.ssl_channel_credentials(node.authority.pem),
            options=[("grpc.ssl_target_name_override", SERVER_NAME)],
        )
        with channel:
            stub: Any = node_pb2_grpc.NodeStub(channel)
            with pytest.raises(grpc.RpcError):
                stub.ListImages(node_pb2.ListImagesRequest(namespace="default"), timeout=10)
        assert node.api.reviews == []

    def test_a_right_taken_away_is_gone_within_ten_seconds(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from agent.kube import access

        passed_s = [0.0]
        clock = types.SimpleNamespace(monotonic_s=lambda: passed_s[0])
        monkeypatch.setattr(access, "clock", clock)
        with node.caller("list") as agent:
            agent.images("default")
            agent.images("default")
            assert len(node.api.reviews) == 1
            node.api.rights["ada"].clear()

            def refused() -> bool:
                try:
                    agent.images("default")
                except errors.Forbidden:
                    return True
                return False

            passed_s[0] = 9.9
            assert not refused()
            passed_s[0] = 10.0
            assert refused()

    def test_nobody_is_let_in_while_the_api_server_is_away(self, node: Node) -> None:
        with node.caller("list") as agent:
            node.api.down = True
            with pytest.raises(errors.Unreachable):
                agent.images("default")
            node.api.down = False
            assert agent.images("default") == []

    def test_tokens_are_in_no_log(
        self, node: Node, host: Host, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(0)
        node.add_pod("counter", host.start().pid)
        with node.caller(*VERBS) as agent:
            dump(agent)
        with (
            node.connected(token="wrong-token-0815") as agent,
            pytest.raises(errors.Unauthenticated),
        ):
            agent.images("default")
        facts = [getattr(record, "facts", {}) for record in caplog.records]
        assert {"Dump", "ListImages"} <= {fact.get("method") for fact in facts}
        said = caplog.text + repr(facts)
        for token in (*node.api.users, "wrong-token-0815", "the-agents-own-token"):
            assert token not in said


class TestServer:
    def test_health_and_reflection_answer_without_an_identity(self, node: Node) -> None:
        target = f"localhost:{node.server.token_port}"
        health.check(target, node.authority.pem, SERVER_NAME, 10)
        node.server.set_serving(serving=False)
        with pytest.raises(errors.Unreachable, match="does not serve"):
            health.check(target, node.authority.pem, SERVER_NAME, 10)
        with pytest.raises(errors.Unreachable):
            health.check(target, Authority("other").pem, SERVER_NAME, 10)
        channel = grpc.secure_channel(
            target,
            grpc.ssl_channel_credentials(node.authority.pem),
            options=[("grpc.ssl_target_name_override", SERVER_NAME)],
        )
        with channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            named = health_pb2.HealthCheckRequest(service="agent.rpc.v1.Node")
            assert stub.Check(named, timeout=10).status == 2
            reflect: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            answer = next(iter(reflect.ServerReflectionInfo(iter([asked]), timeout=10)))
            names = {each.name for each in answer.list_services_response.service}
            assert {"agent.rpc.v1.Node", "grpc.health.v1.Health"} <= names

    def test_a_new_certificate_is_served_without_a_restart(self, node: Node) -> None:
        with node.caller("list") as agent:
            agent.images("default")
        old, node.authority = node.authority, Authority("ckpt-agent-2")
        nodes.certify(node.folder / "tls", node.authority)
        with node.caller("list", user="bea") as agent:
            assert agent.images("default") == []
        node.authority = old
        with node.caller("list", user="cid") as agent, pytest.raises(errors.Unreachable):
            agent.images("default")

    def test_a_half_written_certificate_leaves_the_old_one_in_use(
        self, node: Node, caplog: pytest.LogCaptureFixture
    ) -> None:
        other, _ = Authority("other").issue("x", hosts=(SERVER_NAME,))
        (node.folder / "tls/tls.crt").write_bytes(other)
        with node.caller("list") as agent:
            assert agent.images("default") == []
        assert "the last good one stays in use" in caplog.text

    def test_images_come_in_pages(self, node: Node, host: Host) -> None:
        target = host.start()
        node.add_pod("counter", target.pid)
        node.add_pod("again", target.pid)
        with node.caller(*VERBS) as agent:
            for pod in ("counter", "again", "counter"):
                dump(agent, pod)
            names = [f"{i.group}@{i.epoch}" for i in agent.images("default")]
            assert [name.split("@")[0] for name in names] == ["again", "counter", "counter"]
            token, paged = "", []
            while True:
                answer = agent._stub.ListImages(
                    node_pb2.ListImagesRequest(namespace="default", page_size=1, page_token=token),
                    metadata=agent._metadata(),
                )
                paged += [image.name for image in answer.images]
                token = answer.next_page_token
                if not token:
                    break
            assert paged == names
            report = agent.prune("default", keep_last=1, keep_within_s=None, dry_run=False)
            assert len(report["items"]) == 1
            with pytest.raises(errors.InvalidInput, match="what to keep"):
                agent.prune("default", keep_last=None, keep_within_s=None, dry_run=False)

    def test_the_watch_comes_back_by_itself(self, node: Node) -> None:
        wait_for(lambda: node.api.watches)
        node.api.end_watches()
        node.api.put("one", NODE)
        wait_for(lambda: node.watch.get("default", "one"))
        node.api.end_watches(forget=True)
        node.api.put("two", NODE)
        node.api.put("elsewhere", "n2")
        wait_for(lambda: node.watch.get("default", "two"))
        node.api.down = True
        node.api.end_watches()
        time.sleep(0.5)
        node.api.remove("one")
        node.api.down = False
        wait_for(lambda: node.watch.get("default", "one") is None)
        assert node.watch.get("default", "two")
        assert node.watch.get("default", "elsewhere") is None

    def test_a_volume_that_is_away_is_no_empty_store(self, node: Node) -> None:
        roots = [Path(node.settings.store.path), *map(Path, node.settings.stores.values())]
        for root in roots:
            root.rmdir()
        with node.caller("list") as agent, pytest.raises(errors.VolumeGone):
            agent.images("default")
        assert not any(root.exists() for root in roots)
