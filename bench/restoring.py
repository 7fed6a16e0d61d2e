"""From the start of the command to a tree that runs, and to one with all of its memory.

Promises: the images of all sides are dropped from the page cache before each restore, programs and
libraries stay in it; after each restore every worker's memory has the digest it had before.
Does not: slow the volume down.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable

from bench import programs, tools
from bench.figures import MIB, Samples, mib
from bench.holder import Awakening, Holder, HolderFailed
from bench.machine import Context, evict, warm
from bench.report import Section, Target

_LATE, _FIRST, _CRIU = "ckpt-agent restore", "ckpt-agent restore --eager", "criu restore"
_RUNNING_S, _PEAK_BYTES = 0.3, 256 * MIB
_HOW = (
    "A tree of a root and 4 workers, killed and restored in place, by each side in turns."
    " ckpt-agent verifies each byte of its image before a process sees it; criu verifies nothing."
    " *Runs* is what ckpt-agent says of the restore, from the request; *first sign of life* is that"
    " of the last worker, from the start of the command; *complete* is when all memory is in, and"
    " the command ends."
)
_HEADS = ("tool", "runs, s", "first sign of life, s", "complete, s", "peak memory")


class _Side:
    """What was measured of one way to restore."""

    def __init__(self, restore: Callable[[], programs.Ran], place: str) -> None:
        self.restore = restore
        self.place = place
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peak_bytes = 0

    def add(self, ran: programs.Ran, alive_s: float) -> None:
        """One restore more."""
        if ran.stdout:
            self.seconds["runs"].append(json.loads(ran.stdout)["runningSeconds"])
        self.seconds["alive"].append(alive_s)
        self.seconds["complete"].append(max(alive_s, ran.took_s))
        self.peak_bytes = max(self.peak_bytes, ran.peak_bytes)

    def samples(self, moment: str) -> Samples:
        """The seconds to one moment."""
        return Samples.of(self.seconds[moment])


def compare(context: Context, name: str, title: str, size_bytes: int) -> Section:
    """Dump once with both, then kill and restore in turns."""
    warm(2 * size_bytes)
    with Holder(os.path.join(context.work, "holder"), size_bytes) as holder:
        agent = tools.Agent(os.path.join(context.work, "store"))
        criu = tools.Criu(os.path.join(context.work, "images"))
        image = agent.dump(holder.pid, "bench")[1]["name"]
        criu.dump(holder.pid)
        expected = holder.digests()
        sides = {
            _LATE: _Side(lambda: agent.restore(image), agent.store),
            _FIRST: _Side(lambda: agent.restore(image, "--eager"), agent.store),
            _CRIU: _Side(criu.restore, criu.images),
        }
        for number in range(context.pairs):
            for side, what in list(sides.items())[:: -1 if number % 2 else 1]:
                holder.kill()
                if cached := evict(what.place):
                    context.say(f"{cached:.0%} of the files in {what.place} are cached still")
                with Awakening(holder) as life:
                    ran = what.restore()
                what.add(ran, life.after_s(ran.began_ns))
                if holder.digests() != expected:
                    raise HolderFailed(f"{side}: the restored memory differs")
                last = ", ".join(f"{m} {v[-1]:.3f} s" for m, v in what.seconds.items())
                context.say(f"{title}: {side}: {last}")
    section = Section(name=name, title=f"Restore: {title}", how=_HOW, heads=_HEADS)
    _tell(section, title, sides)
    return section


def _tell(section: Section, title: str, sides: dict[str, _Side]) -> None:
    for name, side in sides.items():
        told = [
            side.samples(moment).told(digits=3) if side.seconds.get(moment) else ""
            for moment in ("runs", "alive", "complete")
        ]
        section.rows.append((name, *told, mib(side.peak_bytes)))
        section.data[name] = {
            **{moment: side.samples(moment).document() for moment in side.seconds},
            "peak_bytes": side.peak_bytes,
        }
    runs = sides[_LATE].samples("runs")
    section.targets.append(
        Target(
            f"restore to running, {title}",
            f"<= {_RUNNING_S} s",
            runs.told("s"),
            runs.median <= _RUNNING_S,
        )
    )
    for name in (_LATE, _FIRST):
        share = sides[name].samples("complete").over(sides[_CRIU].samples("complete"))
        section.targets.append(
            Target(
                f"{name} to complete against criu restore, {title}",
                "<= 1x",
                share.told("x"),
                share.median <= 1,
            )
        )
        if share.median > 1:
            section.slower.append(f"{title}: {name} takes {share.told('times')} as long as criu")
    peak_bytes = max(sides[name].peak_bytes for name in (_LATE, _FIRST))
    section.targets.append(
        Target(
            f"the agent's memory in a restore, {title}",
            f"<= {mib(_PEAK_BYTES)}",
            mib(peak_bytes),
            peak_bytes <= _PEAK_BYTES,
        )
    )
