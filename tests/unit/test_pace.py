"""How quickly a running job's memory is copied."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from agent.engines.tracking import pace as pace_module
from agent.engines.tracking.pace import UNLIMITED, Limits, Pace
from agent.host import clock, system

MIB = 1 << 20


def started(program: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", program]) as popen:
        yield popen.pid
        popen.kill()


@pytest.fixture
def computes() -> Iterator[int]:
    yield from started("while True: pass")


@pytest.fixture
def sleeps() -> Iterator[int]:
    yield from started("import time; time.sleep(1000)")


def work(cpu_s: float) -> None:
    until_s = time.process_time() + cpu_s
    while time.process_time() < until_s:
        pass


def test_who_has_taken_more_processor_time_than_it_may_waits(
    computes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    # On a busy machine the job may get less than that of a core.
    monkeypatch.setattr(pace_module, "_IDLE", 0.0)
    pace = Pace(computes, Limits(cpu_percent=10), clock.Deadline.after(1000))
    pace.wait(MIB)
    assert pace._due_s() <= 0
    began_s = time.monotonic()
    while time.process_time() - pace._took_s < 0.7 + 0.1 * (time.monotonic() - began_s):
        work(0.05)
    pace.wait(MIB)
    # However much is owed, by other work of this program say: a tenth of a second's worth.
    assert pace.held_back_s > 0.5
    assert not pace.hurried


@pytest.mark.parametrize(("idle", "cores"), [(0.0, 0.1), (0.5, 0.25), (8.0, 0.8)])
def test_what_it_may_take_is_of_one_core_but_for_those_that_are_idle(
    computes: int, monkeypatch: pytest.MonkeyPatch, idle: float, cores: float
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(clock, "monotonic_s", lambda: now_s)
    monkeypatch.setattr(system, "idle_s", lambda on: idle * now_s * (on == set(range(8))))
    pace = Pace(computes, Limits(cpu_percent=10), clock.Deadline.after(1000))
    for _ in range(3):
        pace.wait(MIB)
        now_s += 1.0
    assert pace._cores == pytest.approx(cores)


def test_a_job_that_does_not_compute_is_not_spared(sleeps: int) -> None:
    pace = Pace(sleeps, Limits(cpu_percent=1), clock.Deadline.after(1000))
    until_s = time.monotonic() + 30
    while True:
        work(0.3)
        before_s = pace.held_back_s
        pace.wait(MIB)
        if pace.held_back_s - before_s < 0.01:
            break
        assert time.monotonic() < until_s, "it is held back for ever"


def test_memory_is_read_at_the_rate_that_is_given(sleeps: int) -> None:
    pace = Pace(sleeps, Limits(bytes_per_s=8 * MIB), clock.Deadline.after(1000))
    began_s = time.monotonic()
    for _ in range(4):
        pace.wait(MIB)
    assert time.monotonic() - began_s > 0.4
    assert pace.held_back_s > 0


def test_a_deadline_counts_more_than_any_limit(computes: int) -> None:
    """A notice of 30 s that the machine goes away must be enough."""
    pace = Pace(computes, Limits(cpu_percent=1, bytes_per_s=MIB), clock.Deadline.after(0.4))
    for _ in range(3):
        pace.wait(1000 * MIB)
    assert pace.hurried


def test_without_limits_nothing_waits(computes: int) -> None:
    pace = Pace(computes, UNLIMITED, clock.Deadline.after(0.0))
    work(0.3)
    pace.wait(1 << 50)
    assert pace.held_back_s == 0
    assert not pace.hurried
