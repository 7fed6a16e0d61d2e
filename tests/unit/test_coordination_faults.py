"""What goes wrong around a coordinator: answers that are lost, an API server that is away, a leader
that was stopped and goes on too late, callers who ask for too much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from agent import errors
from agent.coordination import book, leading
from agent.coordination.records import Records
from agent.kube import connection
from agent.model.operations import State
from tests import coordinated
from tests.coordinated import Cluster, wait_for
from tests.unit import test_coordination_records as records_tests
from tests.unit.test_coordination import TRAIN, asking, ended, serves
from tests.unit.test_coordination_takeover import Killer, begun
from tests.unit.test_operations import operation


@pytest.fixture
def cluster(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with coordinated.running(tmp_path, monkeypatch) as made:
        made.jobsets.add()
        yield made


def test_a_request_that_would_fill_its_record_is_refused(cluster: Cluster) -> None:
    """One that just fitted could never be recorded again, and would keep its place for ever."""
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as ada:
        wait_for(lambda: serves(ada))
        for storage in ("\x01" * 20_000, "s" * 70_000):
            with pytest.raises(errors.InvalidInput, match="64 KiB"):
                ada.create_epoch(asking(), TRAIN, storage=storage)
        assert cluster.records() == []


def test_one_namespace_has_a_share_of_what_may_wait(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(book, "EACH_WAITING", 2)
    with contextlib.closing(connection.connect()) as api:
        made = book.Book(Records(api, records_tests.SPACE, "only"))
        for number in range(2):
            made.begin(operation(id=f"a{number}", group=f"g{number}"), wait=False)
        with pytest.raises(errors.Overloaded, match="in namespace team"):
            made.begin(operation(id="a2", group="g2"), wait=False)
        made.begin(operation(id="b", namespace="other"), wait=False)


def test_a_key_is_not_good_for_another_kind_of_operation(cluster: Cluster) -> None:
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as ada:
        wait_for(lambda: serves(ada))
        ended(ada, ada.create_epoch(asking("k"), TRAIN).id)
        with pytest.raises(errors.InvalidInput, match="something else"):
            ada.restore(asking("k"), TRAIN)


def test_an_operation_whose_record_was_made_and_not_told_is_found_by_its_key(
    cluster: Cluster,
) -> None:
    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as ada:
        wait_for(lambda: serves(ada))
        cluster.extra.lost = True
        with pytest.raises(errors.Unreachable):
            ada.create_epoch(asking("k"), TRAIN)
        cluster.extra.lost = False
        assert ended(ada, ada.create_epoch(asking("k"), TRAIN).id).state is State.SUCCEEDED
        assert len(cluster.agents.images) == 1


def test_a_takeover_waits_for_an_api_server_that_comes_back(cluster: Cluster) -> None:
    killer = Killer(cluster)
    try:
        with coordinated.client(cluster, killer.process.port) as first:
            wait_for(lambda: serves(first))
        killer.after_decision(1)
        identifier = begun(
            cluster, killer, lambda first: first.migrate(asking(), "train", ["n2", "n1"])
        )

        def written(found: Any) -> None:
            if '"stage":"committed"' in found.get("data", {}).get("operation", ""):
                cluster.extra.away = 1
                cluster.extra.written = lambda found: None

        cluster.extra.written = written
        with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as second:
            wait_for(lambda: serves(second))
            last = ended(second, identifier)
        assert (last.state, last.error) == (State.SUCCEEDED, None)
        assert cluster.extra.away == 0
        wait_for(lambda: set(cluster.processes().values()) == {"running"})
    finally:
        killer.process.kill()


def test_a_move_goes_to_its_end_though_the_api_server_was_away(cluster: Cluster) -> None:
    def written(found: Any) -> None:
        if '"stage":"intended"' in found.get("data", {}).get("operation", ""):
            cluster.extra.away = 1
            cluster.extra.written = lambda found: None

    with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as ada:
        wait_for(lambda: serves(ada))
        cluster.extra.written = written
        last = ended(ada, ada.migrate(asking(), "train", ["n2", "n1"]).id)
    assert (last.state, last.error, last.takeovers) == (State.SUCCEEDED, None, 0)
    assert cluster.extra.away == 0
    assert set(cluster.processes().values()) == {"running"}
    assert "running" not in cluster.jobsets.ended


def test_a_leader_that_was_stopped_ends_nothing_that_another_let_run_meanwhile(
    cluster: Cluster,
) -> None:
    first = coordinated.Process(cluster)
    stopped = threading.Event()

    def written(found: Any) -> None:
        # It has recorded that it is about to suspend the JobSet, and hears so when it goes on.
        if (
            '"stage":"intended"' in found.get("data", {}).get("operation", "")
            and not stopped.is_set()
        ):
            os.kill(first._process.pid, signal.SIGSTOP)
            stopped.set()

    try:
        with coordinated.client(cluster, first.port) as ada:
            wait_for(lambda: serves(ada))
            cluster.extra.written = written
            identifier = ada.migrate(asking(), "train", ["n2", "n1"]).id
            assert stopped.wait(60)
            stopped_s = time.monotonic()
        cluster.outlive()
        with coordinated.replica(cluster) as port, coordinated.client(cluster, port) as second:
            wait_for(lambda: serves(second))
            last = ended(second, identifier)
            assert (last.state, last.error) == (State.SUCCEEDED, None)
            wait_for(lambda: set(cluster.processes().values()) == {"running"})
            cluster.jobsets.ended.clear()
            # A lease lasts longer than whoever holds it may go on without renewing it.
            time.sleep(max(0.0, stopped_s + leading._STOPS_S - time.monotonic()))
            os.kill(first._process.pid, signal.SIGCONT)
            first._process.communicate(timeout=60)
            assert cluster.jobsets.ended == []
            assert not cluster.jobsets.found()["spec"]["suspend"]
    finally:
        first.kill()


def test_a_deposed_leader_ends_whoever_still_waits_for_its_answer(cluster: Cluster) -> None:
    first = coordinated.Process(cluster)
    release = threading.Event()
    asked = threading.Event()

    def hang() -> None:
        asked.set()
        release.wait(120)

    try:
        with coordinated.client(cluster, first.port) as ada:
            wait_for(lambda: serves(ada))
            cluster.agents.fails["PlanDump"] = hang
            caller = threading.Thread(target=lambda: _planned(ada))
            caller.start()
            assert asked.wait(60)
            cluster.extra.change(
                coordinated.LEASE,
                holderIdentity="second",
                renewTime="2026-01-01T00:00:00.000000Z",
            )
            # Its caller waits for longer.
            first._process.communicate(timeout=60)
            assert not release.is_set()
    finally:
        release.set()
        caller.join(20)
        first.kill()


def _planned(client: Any) -> None:
    try:
        client.plan("default", TRAIN)
    except errors.CkptError:
        return


def test_a_leader_that_can_begin_nothing_any_more_ends(
    cluster: Cluster,
) -> None:
    with contextlib.closing(connection.connect()) as api:
        server, ends = records_tests.Server(), list[BaseException]()

        def broken() -> None:
            raise KeyError("a defect")

        made = dataclasses.replace(records_tests.parts(api, server, "first", []), refresh=broken)
        stop = threading.Event()

        def run() -> None:
            try:
                leading.Replica().run(made, stop)
            except errors.CkptError as exc:
                ends.append(exc)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_for(lambda: ends)
        finally:
            stop.set()
            thread.join(10)


def test_one_callers_calls_that_wait_for_agents_leave_threads_to_others(cluster: Cluster) -> None:
    release, together = threading.Event(), 140
    refused: list[errors.CkptError] = []

    def hang() -> None:
        release.wait(120)

    cluster.agents.fails["PlanDump"] = hang

    def plan() -> None:
        try:
            ada.plan("default", TRAIN)
        except errors.CkptError as exc:
            refused.append(exc)

    with (
        coordinated.replica(cluster) as port,
        coordinated.client(cluster, port) as ada,
        coordinated.client(cluster, port, coordinated.BOB) as bob,
    ):
        wait_for(lambda: serves(bob))
        callers = [threading.Thread(target=plan) for _ in range(together)]
        for each in callers:
            each.start()
        try:
            wait_for(lambda: len(refused) > together // 2)
            assert bob.operations("default") == []
        finally:
            release.set()
            for each in callers:
                each.join(60)
    assert all(isinstance(each, errors.Overloaded) for each in refused)
