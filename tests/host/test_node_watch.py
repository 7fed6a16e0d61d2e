"""A pod that its agent watches, over real gRPC and TLS: what each epoch reads, who else may have
the pod meanwhile, and how a watch ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.kube import access
from agent.rpc import results
from tests.host import nodes
from tests.host.conftest import Host
from tests.host.nodes import VERBS, Node, wait_for
from tests.host.test_short_stop import NO_RSEQ
from tests.host.test_watch import MEMORY_MIB


class Engine:
    """The engine, which notes how each capture went, and fails those that it is told to."""

    def __init__(self, host: Host) -> None:
        self._engine = host.engine
        self.name, self.promises = host.engine.name, host.engine.promises
        self.check_restore, self.restore = host.engine.check_restore, host.engine.restore
        self.read_bytes: list[int] = []
        self.failing: set[int] = set()
        self.tried = 0
        self.before: Callable[[], None] = lambda: None

    def capture(self, pid: int, sink: Any, cut: Any, options: Any) -> Any:
        self.before()
        self.tried += 1
        if self.tried in self.failing:
            raise errors.CriuFailed("CRIU said no")
        report = self._engine.capture(pid, sink, cut, options)
        how = report.engine_facts["stop"]
        rounds = sum(size for size, _ in how.get("rounds", ()))
        self.read_bytes.append(how.get("read_at_cut_bytes", 0) + rounds)
        return report


@pytest.fixture
def engine(host: Host) -> Engine:
    return Engine(host)


@pytest.fixture
def node(engine: Engine, tmp_path: Path) -> Iterator[Node]:
    with nodes.running(tmp_path, engine) as found:
        yield found


class Watching:
    """A watch of the pod in a thread of its own, and what its caller hears."""

    def __init__(self, agent: Any, **more: Any) -> None:
        self.cancel = threading.Event()
        self.done: list[results.DumpOutcome] = []
        self.failed: list[errors.CkptError] = []
        self.ends: list[results.Watched | errors.CkptError] = []
        self._agent, self._more = agent, {"every_s": 1.0, **more}
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            found = self._agent.watch(
                "default",
                "counter",
                pod_uid="",
                deadline_s=60.0,
                cancel=self.cancel,
                done=self.done.append,
                failed=self.failed.append,
                **self._more,
            )
        except errors.CkptError as exc:
            self.ends.append(exc)
        else:
            self.ends.append(found)

    def join(self) -> results.Watched | errors.CkptError:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.ends[0]


def descriptors() -> list[str]:
    """What this process, which is the agent, follows others' memory by."""
    found = []
    for each in Path("/proc/self/fd").iterdir():
        try:
            found.append(os.readlink(each))
        except FileNotFoundError:
            continue
    return [each for each in found if "userfaultfd" in each]


def test_each_epoch_of_a_pod_reads_what_was_written_and_a_failed_one_costs_only_itself(
    node: Node, host: Host, engine: Engine
) -> None:
    target = host.start("memory", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)
    node.add_pod("counter", target.pid)
    engine.failing = {4}
    with node.caller(*VERBS) as agent:
        watching = Watching(agent, count=5)
        assert watching.join() == results.Watched(4, 1, None, ended=False)
        assert [each.message for each in watching.failed] == ["CRIU said no"]
        names = [each.image.epoch for each in watching.done]
        assert [each.epoch for each in agent.images("default", "counter")] == names
        assert agent.verify("default", f"counter@{names[-1]}").good
    first, second, third, after_the_failure = engine.read_bytes
    assert first > 24 << 20
    assert second < first / 4
    assert third < first / 4
    assert after_the_failure > first / 2
    assert not descriptors()
    wait_for(lambda: node.api.events)
    assert [each["reason"] for each in node.api.events] == ["CheckpointFailed"]
    host.assert_running(target)
    host.assert_clean()


def test_between_two_epochs_others_have_the_pod_but_for_another_watch(
    node: Node, host: Host, engine: Engine
) -> None:
    target = host.start("memory", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)
    node.add_pod("counter", target.pid)
    with node.caller(*VERBS) as agent:
        watching = Watching(agent, every_s=12.0)
        wait_for(lambda: watching.done and not node.operations.running(), 30)
        with pytest.raises(errors.TargetBusy, match="watched already"):
            agent.watch("default", "counter", pod_uid="", deadline_s=60.0)
        other = agent.dump("default", "counter", pod_uid="", deadline_s=60.0)
        wait_for(lambda: len(watching.done) == 2, 30)
        # It builds on the other's image, of which nothing is kept.
        assert engine.read_bytes[-1] > engine.read_bytes[0] / 2
        # The agent is told by the connection, and ends the watch.
        watching.cancel.set()
        assert isinstance(watching.join(), errors.Interrupted)
        wait_for(lambda: not descriptors(), 20)
        images = [each.epoch for each in agent.images("default", "counter")]
        assert images[1] == other.image.epoch
        for each in images:
            assert agent.verify("default", f"counter@{each}").good
        # It may be watched again.
        assert isinstance(Watching(agent, count=1).join(), results.Watched)
    host.assert_running(target)
    host.assert_clean()


def test_a_watch_ends_with_its_containers_and_needs_the_right_to_create_images(
    node: Node, host: Host, engine: Engine
) -> None:
    target = host.start()
    node.add_pod("counter", target.pid)
    with node.caller("get", "list", user="bob") as bob:
        found = Watching(bob).join()
        assert isinstance(found, errors.Forbidden)
    with node.caller(*VERBS) as agent:
        for every_s in (0.5, float("nan"), 1e9):
            assert isinstance(Watching(agent, every_s=every_s).join(), errors.InvalidInput)
        watching = Watching(agent)
        wait_for(lambda: watching.done, 30)
        host.kill(target)
        found = watching.join()
        assert isinstance(found, results.Watched)
        assert found.ended
        engine.failing = {engine.tried + 1}
        other = host.start()
        node.add_pod("other", other.pid)
        with pytest.raises(errors.CriuFailed):
            agent.watch("default", "other", pod_uid="", deadline_s=60.0)
    host.assert_running(other)


def test_a_watch_ends_when_its_caller_may_not_make_images_any_more(
    node: Node, host: Host, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "ALLOWED_S", 0.1)
    target = host.start("memory", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)
    node.add_pod("counter", target.pid)
    with node.caller(*VERBS) as agent:
        watching = Watching(agent)
        wait_for(lambda: watching.done, 30)
        node.api.rights["ada"] = set()
        found = watching.join()
    assert isinstance(found, errors.Forbidden)
    assert "the pod goes on: ada may not create images" in found.message
    assert not watching.failed
    assert not descriptors()
    assert engine.tried == len(watching.done)
    host.assert_running(target)
    host.assert_clean()


@pytest.mark.parametrize("when", ["between two epochs", "in one"])
def test_an_agent_that_is_told_to_end_lets_go_of_the_pods_that_it_watches(
    node: Node, host: Host, engine: Engine, when: str
) -> None:
    target = host.start("memory", MEMORY_MIB=MEMORY_MIB, GLIBC_TUNABLES=NO_RSEQ)
    node.add_pod("counter", target.pid)
    with node.caller(*VERBS) as agent:
        watching = Watching(agent, every_s=3600.0 if when == "between two epochs" else 1.0)
        wait_for(lambda: watching.done and not node.operations.running(), 30)
        assert descriptors()
        if when == "in one":
            engine.before = node.operations.close
            wait_for(lambda: engine.tried == 2)
        node.operations.close()
        node.server.stop(0.5)
        found = watching.join()
        assert isinstance(found, errors.Unreachable)
        assert found.facts["begun"]
    wait_for(lambda: not descriptors())
    host.assert_running(target)
    host.assert_clean()
