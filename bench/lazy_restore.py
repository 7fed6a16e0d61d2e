"""Experiment 7: from the request to a tree that runs while its memory still comes, and to all of
it, against ``criu restore`` and against our own restore of all memory first.

Promises: the images of all sides are dropped from the page cache before each restore; after each
restore every worker's memory has the digest it had before.
Does not: slow the volume down.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable

from bench import programs, tools
from bench.figures import MIB, Samples, mib
from bench.holder import Holder, HolderFailed
from bench.machine import Context, evict, warm
from bench.report import Section, Target

_GIB = 1 << 30
_LAZY, _EAGER, _CRIU = "ckpt-agent restore --lazy", "ckpt-agent restore", "criu restore"
_RUNNING_S, _PEAK_BYTES = 0.3, 256 * MIB
_HEADS = (
    "memory",
    "tool",
    "itself: running, s",
    "first sign of life, s",
    "whole, s",
    "peak memory",
)


def measure(context: Context) -> Section:
    """1 GiB and 4 GiB, in turns; a quick run only the smaller ones."""
    section = Section(
        name="lazy-restore",
        title="A restore that runs at once",
        how=(
            "The tree of the first experiment, killed and restored in place. *Itself: running* is"
            " what ckpt-agent says of the restore, without the start of its program; *first sign of"
            " life* is that of the last worker, from the start of the command; *whole* is when all"
            " memory is in, and the command ends."
        ),
        heads=_HEADS,
    )
    big = context.size_bytes >= _GIB
    for size_bytes in [_GIB, 4 * _GIB] if big else [_GIB // 4, _GIB]:
        warm(2 * size_bytes)
        _measure(context, size_bytes, section)
    return section


def _measure(context: Context, size_bytes: int, section: Section) -> None:
    said_s: dict[str, list[float]] = defaultdict(list)
    running_s: dict[str, list[float]] = defaultdict(list)
    whole_s: dict[str, list[float]] = defaultdict(list)
    peak_bytes: dict[str, int] = defaultdict(int)
    work = os.path.join(context.work, str(size_bytes))
    os.makedirs(work)
    with Holder(os.path.join(work, "holder"), size_bytes) as holder:
        agent = tools.Agent(os.path.join(work, "store"))
        criu = tools.Criu(os.path.join(work, "images"))
        image = agent.dump(holder.pid, "bench")[1]["name"]
        criu.dump(holder.pid)
        expected = holder.digests()
        sides: list[tuple[str, str, Callable[[], programs.Ran]]] = [
            (_LAZY, agent.store, lambda: agent.restore(image, "--lazy")),
            (_EAGER, agent.store, lambda: agent.restore(image)),
            (_CRIU, criu.images, criu.restore),
        ]
        for number in range(context.pairs):
            for name, place, restore in sides if number % 2 == 0 else reversed(sides):
                holder.kill()
                evict(place)
                ran = restore()
                running = holder.wait_running(ran.began_ns)
                running_s[name].append(running)
                whole_s[name].append(max(running, ran.took_s))
                peak_bytes[name] = max(peak_bytes[name], ran.peak_bytes)
                if name != _CRIU:
                    said_s[name].append(json.loads(ran.stdout)["runningSeconds"])
                if holder.digests() != expected:
                    raise HolderFailed(f"{name}: the restored memory differs")
                context.say(f"{mib(size_bytes)}: {name} {running:.2f} s, {ran.took_s:.2f} s")
    _tell(section, size_bytes, said_s, running_s, whole_s, peak_bytes)


def _tell(
    section: Section,
    size_bytes: int,
    said_s: dict[str, list[float]],
    running_s: dict[str, list[float]],
    whole_s: dict[str, list[float]],
    peak_bytes: dict[str, int],
) -> None:
    for name in whole_s:
        said = Samples.of(said_s[name]).told() if said_s[name] else ""
        running, whole = Samples.of(running_s[name]), Samples.of(whole_s[name])
        figures = (said, running.told(), whole.told(), mib(peak_bytes[name]))
        section.rows.append((mib(size_bytes), name, *figures))
        section.data[f"{mib(size_bytes)}: {name}"] = {
            "running_s": running.document(),
            "whole_s": whole.document(),
            "peak_bytes": peak_bytes[name],
        }
    own = Samples.of(said_s[_LAZY])
    share = Samples.of(whole_s[_LAZY]).over(Samples.of(whole_s[_CRIU]))
    peak = peak_bytes[_LAZY]
    section.targets += [
        Target(
            f"restore to running, {mib(size_bytes)}",
            f"<= {_RUNNING_S} s",
            own.told("s"),
            own.median <= _RUNNING_S,
        ),
        Target(
            f"restore to complete against criu restore, {mib(size_bytes)}",
            "<= 1x",
            share.told("x"),
            share.median <= 1,
        ),
        Target(
            f"the agent's memory, {mib(size_bytes)}",
            f"<= {mib(_PEAK_BYTES)}",
            mib(peak),
            peak <= _PEAK_BYTES,
        ),
    ]
