"""What a member does while it waits for the word to freeze."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from agent.engines.criu import dump
from agent.host import clock


@pytest.mark.parametrize(
    ("copies_s", "waits_s"), [([0.01] * 4, [1, 2, 4, 8]), ([3, 6, 0.5], [30, 60, 120])]
)
def test_the_word_to_freeze_seldom_finds_a_member_that_copies(
    monkeypatch: pytest.MonkeyPatch, copies_s: list[float], waits_s: list[float]
) -> None:
    """The others would stand still until it is through."""
    now_s, left_s, asked_s = 0.0, list(copies_s), list[float]()

    def copy() -> None:
        nonlocal now_s
        now_s += left_s.pop(0)

    def poised(wait_s: float) -> bool:
        asked_s.append(wait_s)
        return not left_s

    monkeypatch.setattr(clock, "monotonic_s", lambda: now_s)
    capture = SimpleNamespace(
        _short=SimpleNamespace(about_to_freeze=copy),
        _cut=SimpleNamespace(poised=poised),
        _deadline=clock.Deadline.after(600),
    )
    dump._Capture._poise(cast("Any", capture))
    assert asked_s == pytest.approx(waits_s)
