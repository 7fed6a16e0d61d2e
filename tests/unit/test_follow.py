"""Who must be cut together, decided from processes and their connections."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.model.follow import Closure, Link, Party, close


def parties(*lines: Party) -> dict[int, Party]:
    return {each.pid: each for each in (Party(1, 0, 1, "init", refused="is the first"), *lines)}


def party(pid: int, parent: int = 1, group: int = 0, **more: Any) -> Party:
    return Party(pid, parent, group or pid, f"p{pid}", **more)


def tcp(a: int, *b: int) -> list[Link]:
    """Both sockets of a connection of ``a``."""
    here, there = frozenset((a,)), frozenset(b)
    ends = [Link(f"tcp {a} -> {sorted(b)}", here, there)]
    return [*ends, Link(f"tcp {sorted(b)} -> {a}", there, here)] if b else ends


def unix(a: int, b: int) -> list[Link]:
    here, there = frozenset((a,)), frozenset((b,))
    return [Link(f"unix {a}", here, there, True), Link(f"unix {b}", there, here, True)]


def test_a_chain_is_followed_to_its_end_and_others_are_left_alone() -> None:
    known = parties(party(10), party(20), party(30), party(40), party(50))
    found = close([10], known, [*tcp(10, 20), *tcp(20, 30), *tcp(40, 50)])
    assert found.roots == (10, 20, 30)
    assert [each.because for each in found.members] == ["", "tcp 10 -> [20]", "tcp 20 -> [30]"]
    assert found.leaving == ()


def test_a_peer_is_cut_with_its_job_as_the_shell_started_it() -> None:
    shell = party(20, terminal=True)
    known = parties(party(10), shell, party(30, 20), party(31, 30, 30), party(40, 20))
    assert close([10], known, tcp(10, 31)).roots == (10, 30)


def test_a_shell_at_a_terminal_is_not_cut_for_what_runs_below_it() -> None:
    known = parties(party(10), party(20, group=20, terminal=True), party(30, 20, 20))
    assert close([10], known, tcp(10, 30)).roots == (10, 30)
    assert close([10], known, tcp(10, 20)).roots == (10, 20)


def test_what_cannot_be_captured_in_halves_is_in_the_smallest_tree_that_holds_both() -> None:
    known = parties(party(5), party(10, 5), party(11, 10), party(12, 10), party(13, 10))
    found = close([11], known, unix(11, 12))
    assert found.roots == (10,)
    assert found.leaving == ()


@pytest.mark.parametrize("above", [party(10, terminal=True), party(10, refused="is ours")])
def test_without_such_a_tree_it_blocks(above: Party) -> None:
    known = parties(above, party(11, 10), party(12, 10))
    found = close([11], known, unix(11, 12))
    assert found.roots == (11,)
    assert [(each.link, each.blocks) for each in found.leaving] == [("unix 11", True)]
    with pytest.raises(errors.TargetUnsuitable, match="unix 11"):
        found.check()


def test_two_members_cannot_share_half_a_connection() -> None:
    known = parties(party(10), party(20))
    found = close([10], known, [*tcp(10, 20), *unix(10, 20)])
    assert found.roots == (10, 20)
    assert {each.link for each in found.leaving} == {"unix 10", "unix 20"}


def test_what_is_never_followed_is_named() -> None:
    known = parties(party(10), party(20, refused="is shared"))
    found = close([10], known, [*tcp(10, 20), *tcp(10)])
    found.check()
    assert found.roots == (10,)
    assert {each.reason for each in found.leaving} == {
        "process 20 (p20) has its other end and is shared",
        "no process that can be seen here holds its other end",
    }


def test_one_tree_too_many_is_refused_with_a_way_out() -> None:
    known = parties(*(party(pid) for pid in range(10, 20)))
    links = [link for pid in range(10, 19) for link in tcp(pid, pid + 1)]
    assert len(close([10], known, links, members_max=10).members) == 10
    with pytest.raises(errors.TargetUnsuitable, match="10 process trees") as refused:
        close([10], known, links, members_max=9)
    assert "--pid" in refused.value.hint


@st.composite
def worlds(draw: st.DrawFn) -> tuple[dict[int, Party], list[Link]]:
    count = draw(st.integers(2, 12))
    known = parties()
    for pid in range(2, count + 2):
        parent = draw(st.integers(1, pid - 1))
        group = pid if draw(st.booleans()) else known[parent].group
        refused = "is refused" if draw(st.integers(0, 5)) == 0 else ""
        terminal = draw(st.integers(0, 5)) == 0
        known[pid] = party(pid, parent, group, refused=refused, terminal=terminal)
    number = st.integers(2, count + 1)
    pairs = draw(st.lists(st.tuples(number, number, st.booleans()), max_size=10))
    links = [link for a, b, whole in pairs for link in (unix(a, b) if whole else tcp(a, b))]
    return known, links


def tree_of(pid: int, found: Closure, known: dict[int, Party]) -> int:
    """The root of the member that holds ``pid``; 0 if none does."""
    while pid and pid not in found.roots:
        pid = known[pid].parent if pid in known else 0
    return pid


@given(worlds(), st.data())
def test_the_answer_is_closed_grounded_and_does_not_depend_on_order(
    world: tuple[dict[int, Party], list[Link]], data: st.DataObject
) -> None:
    known, links = world
    named = data.draw(st.lists(st.sampled_from([pid for pid in known if pid > 1]), min_size=1))
    found = close(named, known, links)
    home = {pid: tree_of(pid, found, known) for pid in known}
    assert all(home[pid] for pid in named)
    # No member is inside another.
    assert all(not home.get(known[root].parent, 0) for root in found.roots)
    # Closed: what leaves is named, and only what may not be followed leaves.
    named_leaving = {each.link for each in found.leaving}
    for link in links:
        for a in link.holders:
            for b in link.others:
                if home[a] and (not home[b] or (link.whole and home[a] != home[b])):
                    assert link.name in named_leaving
                    assert known[b].refused or link.whole
    assert all(home[each.pid] for each in found.leaving)
    # Minimal: a member that nobody named has a connection from another one, so none can be left
    # out; and nothing but the named ones and ends of connections is ever the reason for one.
    for root in found.roots:
        if not any(home[pid] == root for pid in named):
            assert any(
                home[a] not in (0, root) and home[b] == root
                for link in links
                for a in link.holders
                for b in link.others
            )
    again = close(named[::-1], known, data.draw(st.permutations(links)))
    assert set(again.roots) == set(found.roots)
    assert set(again.leaving) == set(found.leaving)
    assert set(close(found.roots, known, links).roots) == set(found.roots)
