"""What a container that its kubelet captures refuses of a cut, and which connections count."""

from __future__ import annotations

import os

import pytest

from agent import errors
from agent.engines.base import CaptureOptions, Disposition
from agent.engines.kubelet import holdfirst
from agent.host import clock
from agent.model import cut as model_cut
from agent.model.container import Container
from agent.model.cut import End

OWN, OTHER, OUTSIDE = "10.1.0.1", "10.1.0.2", "192.0.2.7"
CONTAINER = Container("f" * 64, "c", os.getpid(), "")


class Held:
    """A hold that stands until it is over."""

    over = False
    let = False

    def check(self) -> None:
        if self.over:
            raise errors.DeadlineExceeded("not silent")

    def let_through(self) -> None:
        self.let = True


class Cut:
    """The others, of whom the hold may have expired meanwhile."""

    def __init__(self, held: Held, *, slow: bool = False) -> None:
        self.held, self.slow = held, slow
        self.told: list[str] = []

    def check(self) -> None:
        pass

    def fail(self, failure: BaseException) -> None:
        assert self.held.let
        self.told.append("failed")

    def captured(self) -> Disposition:
        self.told.append("captured")
        self.held.over = self.slow
        return Disposition.RESUME

    def released(self) -> None:
        assert self.held.let
        self.told.append("released")

    def running(self) -> None:
        self.told.append("running")


def part(*connections: tuple[str, str], slow: bool = False) -> tuple[holdfirst.Part, Cut]:
    held = Held()
    cut = Cut(held, slow=slow)
    return holdfirst.Part(cut, held, clock.Deadline.after(60), connections), cut  # type: ignore[arg-type]


def end(local: str, remote: str) -> End:
    here, port = local.rsplit(":", 1)
    there, other = remote.rsplit(":", 1)
    return End(here.strip("[]"), int(port), there.strip("[]"), int(other), 1, 0, 1)


def test_only_connections_with_other_members_count() -> None:
    known = [
        (f"{OWN}:1", f"{OTHER}:2"),
        (f"{OWN}:3", f"{OUTSIDE}:4"),
        (f"{OWN}:5", f"{OWN}:6"),
        ("127.0.0.1:7", "127.0.0.1:8"),
        ("[fd00::1]:9", "[fd00::2]:10"),
    ]
    sources = holdfirst.others((OWN, OTHER, "fd00::2", model_cut.LOCALHOST), (OWN, "fd00::1"))
    assert sources == {OTHER, "fd00::2"}
    alone = [(f"{OWN}:1", f"{OTHER}:2"), ("[fd00::1]:9", "[fd00::2]:10")]
    assert sorted(holdfirst.between(known, sources, loopback=False)) == sorted(alone)
    with_siblings = [*alone, known[2], known[3]]
    assert sorted(holdfirst.between(known, sources, loopback=True)) == sorted(with_siblings)


def test_a_connection_that_ended_while_it_was_held_tears_the_cut() -> None:
    both = (f"{OWN}:1", f"{OTHER}:2"), ("[fd00::1]:9", "[fd00::2]:10")
    made, _ = part(*both)
    made.check_ends([end(*each) for each in both])
    with pytest.raises(errors.CutTorn, match="fd00::1") as caught:
        made.check_ends([end(*both[0])])
    assert caught.value.facts["reasons"] == ["[fd00::1]:9 -> [fd00::2]:10"]


def test_everything_is_let_through_when_all_were_captured() -> None:
    made, cut = part()
    made.captured()
    assert cut.told == ["captured", "released", "running"]


def test_who_was_not_silent_until_all_were_captured_is_in_no_cut() -> None:
    made, cut = part(slow=True)
    with pytest.raises(errors.DeadlineExceeded):
        made.captured()
    assert cut.told == ["captured"]


def test_without_the_addresses_of_the_others_nothing_is_begun() -> None:
    with pytest.raises(errors.ConnectionUnaccepted, match="addresses"):
        holdfirst.check(CONTAINER, CaptureOptions(hold_first=True))


def test_the_nodes_own_network_is_not_held() -> None:
    options = CaptureOptions(hold_first=True, within=frozenset({OTHER}))
    with pytest.raises(errors.TargetUnsuitable, match="own network"):
        holdfirst.check(CONTAINER, options)
