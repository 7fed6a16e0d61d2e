"""Whether a cut is told from a tear by the ends of connections alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import errors
from agent.engines.criu import tcpends
from agent.model import cut
from agent.model.cut import End

CUTS = Path(__file__).parent / "cuts"
_WORLD = 1 << 32


def captured(name: str) -> list[End]:
    return [
        dataclasses.replace(end, place=rank)
        for rank in ("r0", "r1")
        for end in tcpends.read(str(CUTS / name / rank))
    ]


def test_a_real_cut_behind_a_barrier_is_consistent() -> None:
    verdict = cut.check(captured("consistent"))
    assert verdict.consistent
    assert (verdict.pairs, verdict.leaving) == (1, ())


def test_a_real_cut_half_a_second_apart_is_not_and_says_where_and_by_how_much() -> None:
    verdict = cut.check(captured("inconsistent"))
    assert not verdict.consistent
    worst = max(verdict.torn, key=lambda each: abs(each.lag_bytes))
    assert abs(worst.lag_bytes) > 1_000_000
    assert worst.sender.name in str(worst)
    assert {worst.sender.place, worst.receiver.place} == {"r0", "r1"}


def test_a_stream_image_that_breaks_off_is_damaged(tmp_path: Path) -> None:
    for path in (CUTS / "consistent" / "r0").iterdir():
        raw = path.read_bytes()
        (tmp_path / path.name).write_bytes(raw if path.name == "files.img" else raw[:20])
    with pytest.raises(errors.Corrupt, match="tcp-stream"):
        tcpends.read(str(tmp_path))


def pair(written_seq: int = 1000, unacknowledged_bytes: int = 100) -> list[End]:
    sent = written_seq, unacknowledged_bytes
    a = End("10.0.0.1", 4000, "10.0.0.2", 5000, *sent, 77, "pod-a")
    b = End("10.0.0.2", 5000, "10.0.0.1", 4000, 77, 0, 950, "pod-b")
    return [a, b]


@given(
    written=st.integers(0, _WORLD - 1),
    flying=st.integers(0, 1 << 26),
    arrived=st.integers(-(1 << 26), 1 << 27),
)
def test_what_arrived_lies_between_what_is_forgotten_and_what_was_written(
    written: int, flying: int, arrived: int
) -> None:
    """``arrived`` counts from the last byte that the sender has forgotten."""
    a, b = pair(written_seq=written, unacknowledged_bytes=flying)
    received = (written - flying + arrived) % _WORLD
    verdict = cut.check([a, dataclasses.replace(b, received_seq=received)])
    assert verdict.consistent == (0 <= arrived <= flying)
    if arrived < 0:
        assert verdict.torn[0].lag_bytes == -arrived
    if arrived > flying:
        assert verdict.torn[0].lag_bytes == flying - arrived


def test_an_end_without_the_other_leaves_the_group() -> None:
    a, _ = pair()
    verdict = cut.check([a])
    assert verdict.consistent
    assert verdict.leaving == (a,)


def test_the_loopback_of_one_pod_is_not_that_of_another() -> None:
    a = End("127.0.0.1", 4000, "127.0.0.1", 5000, 10, 0, 20, "pod-a")
    b = End("127.0.0.1", 5000, "127.0.0.1", 4000, 999, 0, 999, "pod-b")
    assert cut.check([a, b]).leaving == (a, b)
    inside = dataclasses.replace(b, place="pod-a", written_seq=20, received_seq=10)
    assert cut.check([a, inside]).pairs == 1


def test_a_connection_is_missed_if_it_comes_from_what_is_cut_as_well() -> None:
    waiting = [
        ("10.1.0.5:80", "10.1.0.6:1"),
        ("10.1.0.5:80", "10.9.9.9:2"),
        ("[fd00::5]:80", "[fd00::6]:3"),
        ("127.0.0.1:80", "127.0.0.1:4"),
        ("[::1]:80", "[::1]:5"),
    ]
    assert cut.unaccepted(waiting, {"10.1.0.6", "fd00::6"}) == (
        "10.1.0.6:1 -> 10.1.0.5:80",
        "[fd00::6]:3 -> [fd00::5]:80",
    )
    own = ("127.0.0.1:4 -> 127.0.0.1:80", "[::1]:5 -> [::1]:80")
    assert cut.unaccepted(waiting, {cut.LOCALHOST}) == own
    assert cut.unaccepted(waiting, ()) == ()
