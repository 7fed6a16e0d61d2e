"""Experiment 3: from the request to a tree that runs, and to a tree that is whole.

Promises: the images of both sides are dropped from the page cache before each restore, programs
and libraries stay in it; after each restore every worker's memory has the digest it had before.
Does not: use lazy restore on either side, so that a tree is whole when the command returns.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable

from bench import programs, tools
from bench.figures import Samples
from bench.holder import Holder, HolderFailed
from bench.machine import Context, evict, warm
from bench.report import Section, Target

_AGENT, _CRIU = "ckpt-agent restore", "criu restore"


def measure(context: Context) -> Section:
    """Dump once with both, then kill and restore in turns."""
    warm(2 * context.size_bytes)
    running_s: dict[str, list[float]] = defaultdict(list)
    whole_s: dict[str, list[float]] = defaultdict(list)
    with Holder(os.path.join(context.work, "holder"), context.size_bytes) as holder:
        agent = tools.Agent(os.path.join(context.work, "store"))
        criu = tools.Criu(os.path.join(context.work, "images"))
        image = agent.dump(holder.pid, "bench")[1]["name"]
        criu.dump(holder.pid)
        expected = holder.digests()
        sides: list[tuple[str, str, Callable[[], programs.Ran]]] = [
            (_AGENT, agent.store, lambda: agent.restore(image)),
            (_CRIU, criu.images, criu.restore),
        ]
        for number in range(context.pairs):
            for name, place, restore in sides if number % 2 == 0 else reversed(sides):
                holder.kill()
                if cached := evict(place):
                    context.say(f"{cached:.0%} of the files in {place} are cached still")
                ran = restore()
                running = holder.wait_running(ran.began_ns)
                running_s[name].append(running)
                whole_s[name].append(max(running, ran.took_s))
                if holder.digests() != expected:
                    raise HolderFailed(f"{name}: the restored memory differs")
                context.say(f"round {number + 1}: {name} {ran.took_s:.2f} s")
    return _section(running_s, whole_s)


def _section(running_s: dict[str, list[float]], whole_s: dict[str, list[float]]) -> Section:
    section = Section(
        name="restore",
        title="Restore",
        how=(
            "The tree of the first experiment, killed and restored in place. ckpt-agent reads and"
            " verifies its whole image before it starts a process; criu verifies nothing."
            " *Running* is the first sign of life of the last worker."
        ),
        heads=("tool", "running, s", "whole, s", "times ckpt-agent"),
    )
    own = Samples.of(whole_s[_AGENT])
    for name in whole_s:
        running, whole = Samples.of(running_s[name]), Samples.of(whole_s[name])
        section.rows.append((name, running.told(), whole.told(), whole.over(own).told()))
        section.data[name] = {"running_s": running.document(), "whole_s": whole.document()}
    share = own.over(Samples.of(whole_s[_CRIU]))
    section.targets.append(
        Target(
            "restore to complete against criu restore", "<= 1x", share.told("x"), share.median <= 1
        )
    )
    if share.median > 1:
        section.slower.append(f"restore: ckpt-agent takes {share.told('times')} as long as criu")
    return section
