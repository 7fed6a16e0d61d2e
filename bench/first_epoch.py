"""Experiment 1: from the request to durable, for a first epoch.

Promises: all backups of a round work on the same images; CRIU's images are on the disk (synced,
untimed) before a backup of them is timed, and still in the page cache: the best case for it.
Does not: time the making of an empty repository.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict

from bench import tools
from bench.figures import Samples, mib
from bench.holder import Holder, Pulse
from bench.machine import Context, warm
from bench.report import Section, Target

_HEADS = (
    "tool",
    "alone, s",
    "with criu dump, s",
    "times ckpt-agent",
    "alone, times ckpt-agent",
    "stored",
    "stop, ms",
    "felt, ms",
)
_AGENT = "ckpt-agent dump"
_CRIU = "criu dump"
_REQUIRED = {"tar | zstd -1 -T2": 2.0, "restic backup": 3.0, "borg create (zstd,1)": 3.0}


class _Round:
    """The figures of all rounds, by name of the tool."""

    def __init__(self) -> None:
        self.took_s: dict[str, list[float]] = defaultdict(list)
        self.stop_s: dict[str, list[float]] = defaultdict(list)
        self.felt_s: dict[str, list[float]] = defaultdict(list)
        self.stored_bytes: dict[str, list[float]] = defaultdict(list)
        self.raw_bytes = 0
        self.peak_bytes: list[float] = []


def measure(context: Context) -> Section:
    """Dump a tree of ``context.size_bytes`` with every tool, in turns."""
    warm(2 * context.size_bytes)
    figures = _Round()
    with Holder(os.path.join(context.work, "holder"), context.size_bytes) as holder:
        for number in range(context.pairs):
            # Whoever is first in one round is last in the next.
            for turn in (_agent, _others) if number % 2 == 0 else (_others, _agent):
                turn(context, holder, figures)
            context.say(f"round {number + 1}: " + _told(figures))
        mix = ", ".join(f"{kind} {mib(size)}" for kind, size in holder.mix.items())
    return _section(context, figures, mix)


def _agent(context: Context, holder: Holder, figures: _Round) -> None:
    agent = tools.Agent(os.path.join(context.work, "store"))
    os.sync()
    with Pulse(holder) as pulse:
        ran, report = agent.dump(holder.pid, "bench")
    figures.took_s[_AGENT].append(ran.took_s)
    figures.stop_s[_AGENT].append(report["stopSeconds"])
    figures.felt_s[_AGENT].append(pulse.longest_s)
    figures.stored_bytes[_AGENT].append(tools.tree_bytes(agent.store))
    figures.peak_bytes.append(ran.peak_bytes)
    shutil.rmtree(agent.store)


def _others(context: Context, holder: Holder, figures: _Round) -> None:
    criu = tools.Criu(os.path.join(context.work, "images"))
    os.sync()
    with Pulse(holder) as pulse:
        figures.took_s[_CRIU].append(criu.dump(holder.pid).took_s)
    figures.stop_s[_CRIU].append(criu.stop_s())
    figures.felt_s[_CRIU].append(pulse.longest_s)
    figures.raw_bytes = tools.tree_bytes(criu.images)
    backups: list[tools.Backup] = [
        tools.Tar(os.path.join(context.work, "tar")),
        tools.Restic(os.path.join(context.work, "restic")),
        tools.Borg(os.path.join(context.work, "borg")),
    ]
    turn = len(figures.took_s[_CRIU]) % len(backups)
    for backup in backups[turn:] + backups[:turn]:
        backup.prepare()
        os.sync()
        figures.took_s[backup.name].append(backup.save(criu.images))
        figures.stored_bytes[backup.name].append(tools.tree_bytes(backup.place))
        shutil.rmtree(backup.place)
    shutil.rmtree(criu.images)


def _told(figures: _Round) -> str:
    return ", ".join(f"{name} {values[-1]:.2f} s" for name, values in figures.took_s.items())


def _section(context: Context, figures: _Round, mix: str) -> Section:
    took = {name: Samples.of(values) for name, values in figures.took_s.items()}
    section = Section(
        name="first-epoch",
        title="Dump to durable, first epoch",
        how=(
            f"A tree of a root and 4 workers, images of {mib(figures.raw_bytes)}: {mix}. Every tool"
            " ends with its bytes synced to the same volume. Backups read CRIU's images from the"
            " page cache; *with criu dump* adds the time in which these images were made, *alone*"
            " does not. *Felt* is the longest silence of a worker, measured from outside."
        ),
        heads=_HEADS,
    )
    agent = took[_AGENT]
    for name, own in took.items():
        whole = own if name in (_AGENT, _CRIU) else own.plus(took[_CRIU])
        stored = figures.stored_bytes.get(name)
        stops = (figures.stop_s.get(name), figures.felt_s.get(name))
        section.rows.append(
            (
                name,
                own.told(),
                whole.told(),
                whole.over(agent).told(),
                own.over(agent).told(),
                mib(Samples.of(stored).median) if stored else mib(figures.raw_bytes),
                *(Samples.of(s).told(digits=0, scale=1e-3) if s else "" for s in stops),
            )
        )
        section.data[name] = {
            "alone_s": own.document(),
            "with_criu_s": whole.document(),
            "stored_bytes": Samples.of(stored).document() if stored else None,
            "stop_s": Samples.of(stops[0]).document() if stops[0] else None,
            "felt_s": Samples.of(stops[1]).document() if stops[1] else None,
        }
        _judge(section, name, whole.over(agent), own.over(agent))
    section.data["raw_bytes"] = figures.raw_bytes
    section.data["agent_peak_bytes"] = Samples.of(figures.peak_bytes).document()
    _compare_stops(section, figures)
    return section


def _judge(section: Section, name: str, whole: Samples, alone: Samples) -> None:
    if name in _REQUIRED:
        section.targets.append(
            Target(
                f"dump to durable against criu dump + {name}",
                f">= {_REQUIRED[name]:.0f}x",
                f"{whole.told('x')}; against the backup alone {alone.told('x')}",
                whole.median >= _REQUIRED[name],
            )
        )
    if name != _AGENT and alone.median < 1:
        section.slower.append(
            f"first epoch: {name} alone took {alone.median:.2f} of ckpt-agent's time"
        )


def _compare_stops(section: Section, figures: _Round) -> None:
    for what, values in (("stop", figures.stop_s), ("felt stop", figures.felt_s)):
        own, other = Samples.of(values[_AGENT]), Samples.of(values[_CRIU])
        if own.median > other.median:
            section.slower.append(
                f"first epoch: the {what} of ckpt-agent is {own.over(other).told('times')} that"
                " of criu dump"
            )
