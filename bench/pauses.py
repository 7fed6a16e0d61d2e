"""How long jobs stand still, are slowed down, and take to come back: ``python -m bench.pauses``.

Each case is a section of ``bench/pauses.md`` and ``.json``. With ``--only CASE`` a run renews these
sections and leaves the others: all of them together take half an hour, and nothing else may run.

Promises: what it measures is paired: the agent and ``criu dump`` to tmpfs stop the same job in
turns, a job's speed beside a dump is told against its speed just before and after, and ``criu
restore`` brings the same tree back in turns with the agent.
Does not: leave anything but the report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import holder, machine, programs, report, restoring, short_stop, slowdown, tools
from bench.short_stop import Case
from demo import job

_GIB = 1 << 30
_PLAIN = {"CKPT_AGENT_PRECOPY": "false"}
_FAST = 100.0
_TREE, _FALLBACK, _SHARED, _NEVER_WORSE = 50.0, 10.0, 10.0, 1.0


def _most_s(gib: int) -> float:
    return (10 + 5 * gib) / 1e3


_PAUSES = {
    "1-gib": Case("1 GiB", _GIB, _FAST, most_s=_most_s(1)),
    "4-gib": Case("4 GiB", 4 * _GIB, _FAST, most_s=_most_s(4)),
    "8-gib": Case("8 GiB", 8 * _GIB, _FAST, most_s=_most_s(8)),
    "tree": Case("8 processes, 50 threads, 1 GiB", _GIB, _TREE, ("--processes=8", "--threads=50")),
    "memfd": Case("1 GiB in one memfd", _GIB, _SHARED, ("--memfd",)),
    "direct": Case("1 GiB, with direct I/O", _GIB, _FALLBACK, ("--direct",)),
    "untracked": Case("1 GiB that cannot be followed", _GIB, _FALLBACK, ("--asynchronous",)),
    "plain": Case("1 GiB, the plain way", _GIB, _NEVER_WORSE, environment=_PLAIN),
}
_OTHERS: dict[str, Callable[[machine.Context], report.Section]] = {
    "training": lambda context: slowdown.measure(context, "training"),
    "writer": lambda context: slowdown.measure(context, "writer"),
    "restore-1-gib": lambda context: restoring.compare(context, "restore-1-gib", "1 GiB", _GIB),
    "restore-4-gib": lambda context: restoring.compare(context, "restore-4-gib", "4 GiB", 4 * _GIB),
}


def main(arguments: list[str]) -> int:
    """Measure and renew the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.pauses", description=__doc__)
    cases = [*_PAUSES, *_OTHERS]
    parser.add_argument("--only", action="append", choices=cases, help="repeatable")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", default="bench", help="folder of pauses.md and pauses.json")
    options = parser.parse_args(arguments)
    job.become_reaper()
    sections = report.known(Path(options.out, "pauses.json"))
    command = shlex.join(["python", "-m", "bench.pauses", *arguments])
    for name in options.only or cases:
        load = os.getloadavg()[0]
        work = tempfile.mkdtemp(prefix="bench-")
        began_s = time.monotonic()
        try:
            context = machine.Context(work, 0, 0, options.pairs, _say)
            section = _measured(context, name)
            facts = machine.facts(work) | tools.versions()
        finally:
            shutil.rmtree(work)
        took_s = time.monotonic() - began_s
        section.notes.append(f"`{command}`, load before {load:.2f}, took {took_s:.0f} s")
        sections[name] = section
        _write(options.out, sections, facts)
    return 0


def _measured(context: machine.Context, name: str) -> report.Section:
    try:
        if name in _PAUSES:
            return short_stop.compare(context, name, _PAUSES[name])
        return _OTHERS[name](context)
    except (programs.ProgramFailed, holder.HolderFailed) as exc:
        _say(str(exc))
        return report.Section(name, name, f"Not measured: {exc}")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _write(out: str, sections: dict[str, report.Section], facts: dict[str, str]) -> None:
    chosen = [sections[name] for name in (*_PAUSES, *_OTHERS) if name in sections]
    command = "python -m bench.pauses"
    told = {name: fact for name, fact in facts.items() if name != "load before"}
    for ending, text in (("md", report.markdown), ("json", report.document)):
        with open(os.path.join(out, f"pauses.{ending}"), "w", encoding="utf-8") as file:
            file.write(text(chosen, command, told))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
