"""Experiment 2: a further epoch after a stated share of the pages became dirty at random.

Promises: what is stored is compared with these very pages, read from the processes and compressed
by one zstd -1 stream: no page table, no digests, no durability.
Does not: count pages that the processes change by themselves as dirty ones; 0 % shows them.
"""

from __future__ import annotations

import os
import shutil

import zstandard

from bench import tools
from bench.figures import Samples, mib
from bench.holder import Holder, dirty_content
from bench.machine import Context, warm
from bench.report import Section, Target

_HEADS = (
    "dirty",
    "dirty pages",
    "found new",
    "own size",
    "stored",
    "stored / own",
    "time, s",
    "time / first",
)
_PERCENTS = (0.0, 1.0, 5.0, 20.0)
# The share that has a target, and the target.
_JUDGED_PERCENT, _SIZE_LIMIT, _TIME_LIMIT = 5.0, 1.2, 0.35


def measure(context: Context) -> Section:
    """In every round: a first epoch, then one for each share, in rotating order."""
    warm(2 * context.size_bytes)
    first_s: list[float] = []
    took_s: dict[float, list[float]] = {percent: [] for percent in _PERCENTS}
    stored: dict[float, list[float]] = {percent: [] for percent in _PERCENTS}
    own: dict[float, list[float]] = {percent: [] for percent in _PERCENTS}
    raw: dict[float, list[float]] = {percent: [] for percent in _PERCENTS}
    new: dict[float, list[float]] = {percent: [] for percent in _PERCENTS}
    with Holder(os.path.join(context.work, "holder"), context.size_bytes) as holder:
        # The first time, the workers need memory of their own for this.
        holder.dirty(_PERCENTS[1])
        for number in range(context.pairs):
            agent = tools.Agent(os.path.join(context.work, "store"))
            os.sync()
            first_s.append(agent.dump(holder.pid, "bench")[0].took_s)
            turn = number % len(_PERCENTS)
            for percent in _PERCENTS[turn:] + _PERCENTS[:turn]:
                pages = holder.dirty(percent)
                own[percent].append(_compressed_bytes(pages))
                raw[percent].append(sum(len(at) for _, at in pages) * 4096)
                os.sync()
                ran, report = agent.dump(holder.pid, "bench")
                took_s[percent].append(ran.took_s)
                stored[percent].append(report["storedBytes"])
                new[percent].append(report["newBytes"])
                context.say(
                    f"round {number + 1}: {percent:.0f} % dirty: {ran.took_s:.2f} s,"
                    f" {mib(report['storedBytes'])} stored for {mib(own[percent][-1])}"
                )
            shutil.rmtree(agent.store)
    return _section(Samples.of(first_s), took_s, stored, own, raw, new)


def _compressed_bytes(pages: list[tuple[int, object]]) -> int:
    compressor = zstandard.ZstdCompressor(1).compressobj()
    size = sum(len(compressor.compress(page)) for page in dirty_content(pages))
    return size + len(compressor.flush())


def _section(
    first_s: Samples,
    took_s: dict[float, list[float]],
    stored: dict[float, list[float]],
    own: dict[float, list[float]],
    raw: dict[float, list[float]],
    new: dict[float, list[float]],
) -> Section:
    section = Section(
        name="second-epoch",
        title="Further epochs",
        how=(
            "The tree of the first experiment, some of its pages made dirty at random. *Own size*"
            f" is what these pages alone are as one zstd -1 stream. A first epoch took"
            f" {first_s.told('s')} in these rounds."
        ),
        heads=_HEADS,
        data={"first_s": first_s.document()},
    )
    for percent in _PERCENTS:
        sizes, times = Samples.of(stored[percent]), Samples.of(took_s[percent])
        owned = Samples.of(own[percent])
        ratio = sizes.over(owned) if percent else None
        share = times.over(first_s)
        section.rows.append(
            (
                f"{percent:.0f} %",
                mib(Samples.of(raw[percent]).median),
                mib(Samples.of(new[percent]).median),
                mib(owned.median),
                mib(sizes.median),
                ratio.told() if ratio else "-",
                times.told(),
                share.told(),
            )
        )
        section.data[f"{percent:.0f}"] = {
            "dirty_bytes": Samples.of(raw[percent]).document(),
            "new_bytes": Samples.of(new[percent]).document(),
            "stored_bytes": sizes.document(),
            "own_bytes": owned.document(),
            "took_s": times.document(),
            "time_over_first": share.document(),
        }
        if ratio and percent == _JUDGED_PERCENT:
            section.targets += [
                Target(
                    "second epoch, 5 % dirty: new bytes against the pages' own compressed size",
                    f"<= {_SIZE_LIMIT}x",
                    ratio.told("x"),
                    ratio.median <= _SIZE_LIMIT,
                ),
                Target(
                    "second epoch, 5 % dirty: time against the first",
                    f"<= {_TIME_LIMIT:.0%}",
                    share.told(),
                    share.median <= _TIME_LIMIT,
                ),
            ]
    return section
