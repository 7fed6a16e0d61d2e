"""Experiment 3: the most memory that ckpt-agent has at once, above its start.

Promises: *start* is what the same program needs to list a store; the kernel's own high-water mark
is read, not samples of the size.
Does not: count CRIU, which is a program of its own.
"""

from __future__ import annotations

import os

from bench import tools
from bench.figures import MIB, mib
from bench.holder import Holder
from bench.machine import Context
from bench.report import Section, Target

_LIMIT_BYTES = 256 * MIB


def measure(context: Context) -> Section:
    """A first epoch, a second with 5 % dirty pages, and a restore, of the largest tree."""
    section = Section(
        name="memory",
        title="Peak memory of ckpt-agent",
        how="",
        heads=("what", "peak", "above the start"),
    )
    with Holder(os.path.join(context.work, "holder"), context.memory_size_bytes) as holder:
        size_bytes = holder.rss_bytes()
        agent = tools.Agent(os.path.join(context.work, "store"))
        first = agent.dump(holder.pid, "bench")[0].peak_bytes
        start = agent.look().peak_bytes
        holder.dirty(5)
        ran, report = agent.dump(holder.pid, "bench")
        holder.kill()
        restored = agent.restore(report["name"])
        holder.wait_running(restored.began_ns)
    section.how = (
        f"One tree with {mib(size_bytes)} of anonymous memory; the program's start needs"
        f" {mib(start)}."
    )
    peaks = {
        "dump, first epoch": first,
        "dump, 5 % dirty": ran.peak_bytes,
        "restore": restored.peak_bytes,
    }
    for what, peak in peaks.items():
        section.rows.append((what, mib(peak), mib(peak - start)))
    worst = max(peaks.values()) - start
    section.targets.append(
        Target(
            f"ckpt-agent's peak memory above its start, tree of {mib(size_bytes)}",
            f"<= {mib(_LIMIT_BYTES)}",
            mib(worst),
            worst <= _LIMIT_BYTES,
        )
    )
    section.data = {"tree_bytes": size_bytes, "start_bytes": start, "peak_bytes": peaks}
    return section
