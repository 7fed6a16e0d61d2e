"""What the coordinator writes down, and who may: two replicas at one API server."""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from agent import errors
from agent.coordination import leading
from agent.coordination.book import Book
from agent.coordination.records import Deposed, Records
from agent.coordination.runner import Runner
from agent.coordination.service import Lead
from agent.coordination.work import Handle, Work
from agent.kube import connection
from agent.kube.leases import Lease
from agent.model.operations import Kind, Operation, Stage, State
from tests import coordinated
from tests.coordinated import Cluster, wait_for
from tests.unit.test_operations import operation

SPACE = "ckpt-agent"


@pytest.fixture
def cluster(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with coordinated.running(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def api(cluster: Cluster) -> Iterator[connection.Connection]:
    with contextlib.closing(connection.connect()) as made:
        yield made


def book(api: connection.Connection, replica: str) -> Book:
    made = Book(Records(api, SPACE, replica))
    made.load()
    return made


def test_what_one_replica_recorded_another_goes_on_with_and_the_first_is_deposed(
    api: connection.Connection,
) -> None:
    first = book(api, "first")
    first.begin(operation(id="queued"), wait=False)
    first.begin(operation(id="runs", group="g"), wait=False)
    first.begin(operation(id="over", group="h"), wait=False)
    first.change("runs", state=State.RUNNING, stage=Stage.NAMED, epoch="e")
    first.change("over", state=State.SUCCEEDED, ended_s=1.0)
    second = Book(Records(api, SPACE, "second"))
    left = {each.id: each for each in second.load()}
    assert set(left) == {"queued", "runs"}
    assert (left["runs"].takeovers, left["queued"].takeovers) == (1, 0)
    assert (left["runs"].stage, left["runs"].epoch) == (Stage.NAMED, "e")
    with pytest.raises(Deposed):
        first.change("runs", stage=Stage.COMMITTED)
    assert first.deposed.is_set()
    # And nothing else is written by it.
    with pytest.raises(Deposed):
        first.begin(operation(id="new", group="i"), wait=False)
    assert second.get("team", "runs").stage is Stage.NAMED
    second.change("runs", stage=Stage.COMMITTED)


def test_whoever_takes_over_waits_for_an_api_server_that_comes_back(
    api: connection.Connection, cluster: Cluster
) -> None:
    first = book(api, "first")
    for number in range(3):
        first.begin(operation(id=f"o{number}", group=f"g{number}"), wait=False)
    cluster.extra.busy = 2
    second = Book(Records(api, SPACE, "second"))
    assert {each.id for each in second.load()} == {"o0", "o1", "o2"}
    assert cluster.extra.busy == 0


def test_a_write_whose_answer_was_lost_is_known_again(
    api: connection.Connection, cluster: Cluster
) -> None:
    made = book(api, "only")
    made.begin(operation(), wait=False)
    place = ("configmaps", SPACE, "ckpt-agent-operation-a")
    cluster.extra.stored[place]["metadata"]["resourceVersion"] = "999"
    assert made.change("a", state=State.RUNNING).state is State.RUNNING
    records = Records(api, SPACE, "only")
    records.create(operation(id="b"))
    records.create(operation(id="b"))
    assert records.create(operation(id="b", kind=Kind.MIGRATE)) == operation(id="b")
    made.begin(operation(id="b", group="other"), wait=False)
    with pytest.raises(errors.InvalidInput, match="something else"):
        made.begin(operation(id="b", group="other", kind=Kind.MIGRATE), wait=False)


def test_what_cannot_be_written_has_not_changed(
    api: connection.Connection, cluster: Cluster
) -> None:
    made = book(api, "only")
    made.begin(operation(), wait=False)
    cluster.extra.down = True
    with pytest.raises(errors.Unreachable):
        made.change("a", state=State.RUNNING)
    assert made.get("team", "a").state is State.QUEUED
    # A step is told whoever answers, and recorded when somebody does.
    made.step("a", "freezing")
    assert made.get("team", "a").step == "freezing"
    cluster.extra.down = False
    made.change("a")
    (found,) = Records(api, SPACE, "other").load()
    assert found.step == "freezing"


def test_a_record_that_is_none_keeps_nobody_from_the_others(
    api: connection.Connection, cluster: Cluster
) -> None:
    made = book(api, "only")
    made.begin(operation(), wait=False)
    place = ("configmaps", SPACE, "ckpt-agent-operation-a")
    odd = {**cluster.extra.stored[place], "data": {"operation": "{"}}
    cluster.extra.stored["configmaps", SPACE, "odd"] = {
        **odd,
        "metadata": {**odd["metadata"], "name": "odd"},
    }
    assert [each.id for each in Records(api, SPACE, "other").load()] == ["a"]


def test_what_ended_long_ago_is_forgotten(api: connection.Connection, cluster: Cluster) -> None:
    made = book(api, "only")
    made.begin(operation(), wait=False)
    made.change("a", state=State.SUCCEEDED, ended_s=100.0)
    made.forget_old(100.0 + 86399.0)
    assert made.get("team", "a").over
    # What cannot be removed now is tried again.
    cluster.extra.down = True
    made.forget_old(100.0 + 86401.0)
    cluster.extra.down = False
    assert made.get("team", "a").over
    made.forget_old(100.0 + 86401.0)
    with pytest.raises(errors.NotFound):
        made.get("team", "a")
    assert cluster.records() == []


def test_a_group_has_a_long_name_and_its_record_a_label(
    api: connection.Connection, cluster: Cluster
) -> None:
    book(api, "only").begin(operation(group="g" * 253), wait=False)
    (record,) = cluster.records()
    assert len(record["metadata"]["labels"]["ckpt-agent.dev/group"]) <= 63


# The lease.


class Server:
    """Notes whether callers are told to come."""

    def __init__(self) -> None:
        self.serving: list[bool] = []

    def start(self) -> None:
        """Nothing listens."""

    def set_serving(self, *, serving: bool) -> None:
        self.serving.append(serving)

    def stop(self, grace_s: float) -> None:
        """Nothing listens."""

    def close(self) -> None:
        """Nothing listens."""


def parts(
    api: connection.Connection,
    server: Server,
    holder: str,
    began: list[str],
    *,
    stops_s: float = 60.0,
) -> leading.Parts:
    def do(operation: Operation, handle: Handle) -> None:
        began.append(f"{operation.id} by {holder}")

    def take_lead() -> tuple[Lead, list[Operation]]:
        made = Book(Records(api, SPACE, holder))
        left = made.load()
        return Lead(made, Runner(made, do, do, 1), cast(Work, None)), left

    return leading.Parts(
        server=server,
        probes=server,
        lease=Lease(api, SPACE, "lease", holder=holder, duration_s=120),
        take_lead=take_lead,
        refresh=lambda: None,
        grace_s=1.0,
        period_s=0.1,
        stops_s=stops_s,
    )


@contextlib.contextmanager
def leads(
    api: connection.Connection, *, stops_s: float = 60.0
) -> Iterator[tuple[Server, list[Any]]]:
    """A replica that does; what it ends with is put into the list."""
    server, ends = Server(), list[Any]()

    def run() -> None:
        try:
            made = parts(api, server, "first", [], stops_s=stops_s)
            leading.Replica().run(made, threading.Event())
        except errors.CkptError as exc:
            ends.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: server.serving)
    yield server, ends
    thread.join(60)
    assert not thread.is_alive()
    assert server.serving[-1] is False


def test_a_leader_that_cannot_renew_its_lease_ends_before_another_may_begin(
    api: connection.Connection, cluster: Cluster
) -> None:
    assert leading._STOPS_S < leading.LEASE_S
    with leads(api, stops_s=1.0) as (_, ends):
        cluster.extra.down = True
        wait_for(lambda: ends)
    assert isinstance(ends[0], errors.Unreachable)
    cluster.extra.down = False
    # The lease was not let go by it: another waits for its end.
    assert cluster.extra.stored["leases", SPACE, "lease"]["spec"]["holderIdentity"] == "first"


def test_a_leader_whose_lease_is_anothers_ends_at_once(
    api: connection.Connection, cluster: Cluster
) -> None:
    with leads(api) as (_, ends):
        cluster.extra.change(
            ("leases", SPACE, "lease"),
            holderIdentity="second",
            renewTime="2026-01-01T00:00:00.000000Z",
        )
        wait_for(lambda: ends)
    assert isinstance(ends[0], errors.Unreachable)
    assert cluster.extra.stored["leases", SPACE, "lease"]["spec"]["holderIdentity"] == "second"


def test_one_that_is_told_to_end_lets_the_lease_go_to_the_next(
    api: connection.Connection, cluster: Cluster
) -> None:
    stop = threading.Event()
    first, second = Server(), Server()
    began: list[str] = []
    threads = []
    for server, holder in ((first, "first"), (second, "second")):
        run = leading.Replica().run
        mine = stop if holder == "first" else threading.Event()
        thread = threading.Thread(target=run, args=(parts(api, server, holder, began), mine))
        thread.start()
        threads.append((thread, mine))
        wait_for(lambda: first.serving == [True])
    stop.set()
    wait_for(lambda: second.serving == [True])
    assert first.serving[-1] is False
    for thread, event in threads:
        event.set()
        thread.join(60)
        assert not thread.is_alive()
