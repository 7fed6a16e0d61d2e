"""How a group of two pods comes back: ``python -m bench.group_restore [--rounds N] [--stand S]``.

Containers by runc in network namespaces of their own, with an agent each, as the host tests make
them; a stream of numbers between them that ends if one is lost, repeated or reordered. It is
dumped once and then restored N times, each time with other addresses and agents exchanged.

Promises: prints how long the decision and the last steps took from the moment when all stood, when
the streams went on after the word to run, and the longest pause in them during the second after.
``--stand`` lets everything stand so long before the word.
Does not: leave anything running. Needs root, as the host tests do.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from agent.coordinator.machine import State
from bench import machine
from bench.figures import Samples
from tests.host.boxes import boxes_in, prepare
from tests.host.groups import PROGRAM, Group, Member, group_in
from tests.host.test_container_network import echoing

_INSIDE = "CKPT_AGENT_BENCH_NETWORK"
_FIRST, _LAST = 4, 250
_WATCHED_S = 1.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stand", type=float, default=0.0, metavar="S")
    options = parser.parse_args()
    if _INSIDE not in os.environ:
        # The pods' bridge is in a network of its own.
        up = 'ip link set lo up && exec "$@"'
        argv = [
            "unshare",
            "--net",
            "sh",
            "-c",
            up,
            "sh",
            sys.executable,
            "-m",
            "bench.group_restore",
        ]
        os.execvpe(argv[0], [*argv, *sys.argv[1:]], {**os.environ, _INSIDE: "1"})
    about = machine.facts(".")
    print(f"{about['machine']}; {about['system']}; load before: {about['load before']}")
    prepare()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        _measure(Path(folder), options.rounds, options.stand, found)
    for name, values in found.items():
        print(f"{name}: {Samples.of(values).told('ms', 1, 1e-3)}, {len(values)} values")


def _measure(folder: Path, rounds: int, stand_s: float, found: dict[str, list[float]]) -> None:
    for name in ("boxes", "agents"):
        (folder / name).mkdir()
    with (
        echoing(),
        boxes_in(folder / "boxes") as boxes,
        group_in(boxes, folder / "agents") as group,
    ):
        old = [
            group.add("w-0", "a", "10.77.0.2", *_argv("serve")),
            group.add("w-1", "b", "10.77.0.3", *_argv("send")),
        ]
        for each in old:
            each.flows()
        epoch = group.dump(old).image.epoch
        for first in range(_FIRST, min(_LAST, _FIRST + 2 * rounds), 2):
            with _placeholders(group, first) as new:
                _restore(group, epoch, old, new, stand_s, found)


def _argv(role: str) -> tuple[str, ...]:
    return "python3", "-c", PROGRAM, role, "10.77.0.2"


@contextlib.contextmanager
def _placeholders(group: Group, first: int) -> Iterator[list[Member]]:
    agents = ("b", "a") if first % 4 == 0 else ("a", "b")
    new = [group.add(f"w-{i}", agent, f"10.77.0.{first + i}") for i, agent in enumerate(agents)]
    try:
        yield new
    finally:
        for each in new:
            group.remove(each)


def _restore(
    group: Group,
    epoch: str,
    old: Sequence[Member],
    new: Sequence[Member],
    stand_s: float,
    found: dict[str, list[float]],
) -> None:
    told_s: dict[State, float] = {}

    def watch(state: State) -> None:
        if state is State.COMMITTING:
            time.sleep(stand_s)
        told_s[state] = time.time()

    moved = {before.address: after.address for before, after in zip(old, new, strict=True)}
    done = group.restore(epoch, new, moved, watch=watch, again=True)
    time.sleep(_WATCHED_S)
    for each in new:
        each.flows()
        lines = [line["at"] for line in each.lines]
        pauses = [after - before for before, after in itertools.pairwise(lines)]
        found.setdefault("word to run to first number", []).append(lines[0] - told_s[State.RUNNING])
        found.setdefault("longest pause in the stream", []).append(max(pauses))
    spans_s = done.spans_s
    last = (State.RELEASING, State.RUNNING)
    if not stand_s:  # else it is decided while all are made to stand
        found.setdefault("all stand to decided", []).append(spans_s[State.COMMITTING])
    found.setdefault("decided to all run and said so", []).append(sum(spans_s[s] for s in last))
    found.setdefault("request to all run", []).append(done.running_s - stand_s)


if __name__ == "__main__":
    main()
