"""What a coordinator costs for an epoch of many members: ``python -m bench.coordination``.

Members are simulated in virtual time, the coordinator is the one that ships. What it is told by
them is recorded first and then told again without them, so that its own time is measured alone.

Promises: prints a line for each size: seconds of one core for the whole epoch, and the memory that
the process has taken at most.
Does not: send anything over a network.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Mapping

from agent.coordinator.driver import Driver, Event, Limits, Report
from agent.coordinator.machine import Coordination
from agent.model.protocol import LEAVE_RUNNING, Decision, Told
from bench import machine
from tests.simulated import World

_SIZES = (100, 1000, 10_000)


class _Recorded(World):
    """A world that remembers when what arrived."""

    def __init__(self, members: int) -> None:
        super().__init__(LEAVE_RUNNING, members, spend_s=lambda step: 0.3)
        self.seen: list[tuple[float, Event | None]] = []

    def next(self, until_s: float) -> Event | None:
        event = super().next(until_s)
        self.seen.append((self.now_s(), event))
        return event


class _Replayed:
    """The same arrivals, and nobody behind them."""

    def __init__(self, seen: list[tuple[float, Event | None]]) -> None:
        self._seen = iter(seen)
        self._now_s = 0.0

    def now_s(self) -> float:
        return self._now_s

    def next(self, until_s: float) -> Event | None:
        self._now_s, event = next(self._seen)
        return event

    def tell(self, member: int, told: Told) -> None:
        pass

    def decide(self, wish: Decision, parts: Mapping[int, bytes]) -> None:
        pass


def _drive(members: int, world: _Recorded | _Replayed) -> Report:
    return Driver(Coordination(LEAVE_RUNNING, members, 1), world, world, Limits()).run()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    about = machine.facts(".")
    print(f"{about['machine']}; {about['system']}; load before: {about['load before']}")
    for members in _SIZES:
        recorded = _Recorded(members)
        _drive(members, recorded)
        spent = []
        for _ in range(runs):
            began_s = time.process_time()
            report = _drive(members, _Replayed(recorded.seen))
            spent.append(time.process_time() - began_s)
            if not report.committed:
                raise SystemExit(f"the epoch was not committed: {report.cause}")
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{members:6} members: {statistics.median(spent):.3f} s of a core"
            f" ({min(spent):.3f}-{max(spent):.3f}, {runs} runs),"
            f" {len(recorded.seen)} events, peak {peak_mib:.0f} MiB with the members' simulation"
        )


if __name__ == "__main__":
    main()
