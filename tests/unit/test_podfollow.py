"""Which pods are cut together, from what their sockets see."""

from __future__ import annotations

import pytest

from agent import errors
from agent.model import podfollow
from agent.model.podfollow import Closure, Connection, Party

CALLER, SERVER, STORE = (Party(name, (f"10.1.0.{at}",)) for at, name in enumerate("abc", 1))
STRANGER = Party("x", ("10.1.0.9",), refused="is not opted in")
# What a Service's address hides: only the end that hears sees who calls.
SERVICE = "10.96.0.7:80"


def followed(
    named: str, parties: list[Party], there: dict[str, list[Connection]]
) -> tuple[Closure, list[str]]:
    """Ask until it is closed; whom it took."""
    known: dict[str, list[Connection]] = {}
    asked: list[str] = []
    while True:
        found = podfollow.close(named, parties, known)
        if not found.ask:
            return found, asked
        for each in found.ask:
            assert each not in known
            asked.append(each)
            known[each] = there.get(each, [])


def test_a_pod_brings_in_whom_it_is_connected_with_and_those_whom_these_are() -> None:
    there = {
        "a": [("10.1.0.1:4000", "10.1.0.2:80"), ("127.0.0.1:1", "127.0.0.1:2")],
        "b": [("10.1.0.2:80", "10.1.0.1:4000"), ("10.1.0.2:5000", "10.1.0.3:6379")],
        "c": [("10.1.0.3:6379", "10.1.0.2:5000")],
    }
    parties = [CALLER, SERVER, STORE, STRANGER]
    found, asked = followed("a", parties, there)
    assert dict(found.members) == {
        "a": "",
        "b": "connected with a (10.1.0.1:4000 -> 10.1.0.2:80)",
        "c": "connected with b (10.1.0.2:5000 -> 10.1.0.3:6379)",
    }
    assert found.leaving == ()
    assert asked == ["a", "b", "c"]
    # From the other end as well.
    assert set(followed("c", parties, there)[0].members) == {"a", "b", "c"}


def test_through_a_service_the_other_ends_socket_tells_whose_it_is() -> None:
    there = {
        "a": [("10.1.0.1:4000", SERVICE)],
        "b": [("10.1.0.2:8080", "10.1.0.1:4000"), ("10.1.0.2:8080", "10.1.0.9:4000")],
    }
    found, asked = followed("a", [CALLER, SERVER, STORE, STRANGER], there)
    assert found.members["b"] == f"connected with a through a Service (10.1.0.1:4000 -> {SERVICE})"
    assert set(found.members) == {"a", "b"}
    assert found.leaving == ("b: 10.1.0.2:8080 -> 10.1.0.9:4000: pod x is not opted in",)
    # Nobody who may not be cut is asked for it.
    assert sorted(asked) == ["a", "b", "c"]


def test_who_calls_a_pod_from_outside_is_not_taken_for_one_that_calls_it_from_here() -> None:
    there = {
        "a": [("10.1.0.1:4000", "10.1.0.2:80")],
        "b": [("10.1.0.2:80", "10.1.0.1:4000"), ("10.1.0.2:80", "192.0.2.1:5000")],
    }
    found, _ = followed("b", [CALLER, SERVER], there)
    assert found.members["a"] == "connected with b (10.1.0.2:80 -> 10.1.0.1:4000)"
    assert found.leaving == ("b: 10.1.0.2:80 -> 192.0.2.1:5000: no pod here is known to hear it",)


def test_whom_nothing_here_hears_is_named() -> None:
    found, _ = followed("a", [CALLER, SERVER], {"a": [("10.1.0.1:4000", "192.0.2.1:443")]})
    assert set(found.members) == {"a"}
    assert found.leaving == ("a: 10.1.0.1:4000 -> 192.0.2.1:443: no pod here is known to hear it",)


def test_of_a_jobset_all_pods_come() -> None:
    ranks = [Party(f"w-{at}", (f"10.1.1.{at}",), together="JobSet train") for at in range(3)]
    there: dict[str, list[Connection]] = {"a": [("10.1.0.1:4000", "10.1.1.1:80")]}
    found, _ = followed("a", [CALLER, *ranks], there)
    assert set(found.members) == {"a", "w-0", "w-1", "w-2"}
    assert found.members["w-2"].startswith("of JobSet train, as w-")


def test_a_pod_that_shares_its_nodes_network_is_not_taken_for_it() -> None:
    """Its address is that of others, too."""
    found, _ = followed("a", [CALLER, Party("host", ())], {"a": [("10.1.0.1:4000", "10.0.0.5:22")]})
    assert set(found.members) == {"a"}
    assert len(found.leaving) == 1


def test_what_has_no_end_is_refused() -> None:
    crowd = [Party(f"p{at}", (f"10.2.0.{at}",)) for at in range(100)]
    there = {f"p{at}": [(f"10.2.0.{at}:1", f"10.2.0.{at + 1}:1")] for at in range(99)}
    with pytest.raises(errors.TargetUnsuitable, match="more than 64"):
        followed("p0", crowd, there)
    with pytest.raises(errors.NotFound, match="nobody"):
        followed("nobody", crowd, there)
