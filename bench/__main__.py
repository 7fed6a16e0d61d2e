"""Measure and write the report: ``python -m bench [--quick] [--only NAME ...]``.

Promises: the report tells the command that made it; a section that could not be measured is told
with its reason, and the exit status is then 1. A missed target is in the report, not an error.
Does not: leave anything but the report; the work folder is removed.
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

from bench import (
    first_epoch,
    holder,
    machine,
    peak_memory,
    programs,
    report,
    second_epoch,
    short_stop,
    tools,
    trainings,
)
from demo import job

_EXPERIMENTS: dict[str, Callable[[machine.Context], report.Section]] = {
    "first-epoch": first_epoch.measure,
    "second-epoch": second_epoch.measure,
    "memory": peak_memory.measure,
    "trainings": trainings.measure,
    "short-stop": short_stop.measure,
}
_PAIRS, _QUICK_PAIRS = 5, 3
_FAILURES = (programs.ProgramFailed, holder.HolderFailed, job.JobFailed)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{_QUICK_PAIRS} pairs, smaller trees")
    parser.add_argument("--size-gib", type=float, help="tree of experiments 1-2 [2; quick: 0.5]")
    parser.add_argument("--memory-size-gib", type=float, help="tree of `memory` [4; quick: 1]")
    parser.add_argument("--only", action="append", choices=list(_EXPERIMENTS), help="repeatable")
    parser.add_argument("--out", default="bench", help="folder of report.md and report.json")
    parser.add_argument("--work", help="an existing folder on the volume [the temporary one]")
    options = parser.parse_args(arguments)
    if options.size_gib is None:
        options.size_gib = 0.5 if options.quick else 2.0
    if options.memory_size_gib is None:
        options.memory_size_gib = 1.0 if options.quick else 4.0
    return options


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    """Run what was asked for; return the exit status."""
    options = _options(arguments)
    began_s = time.monotonic()
    job.become_reaper()
    work = tempfile.mkdtemp(prefix="bench-", dir=options.work)
    sections, failed = [], False
    facts = machine.facts(work) | tools.versions()
    try:
        for name in options.only or _EXPERIMENTS:
            context = machine.Context(
                work=os.path.join(work, name),
                size_bytes=int(options.size_gib * (1 << 30)),
                memory_size_bytes=int(options.memory_size_gib * (1 << 30)),
                pairs=_QUICK_PAIRS if options.quick else _PAIRS,
                say=_say,
            )
            os.makedirs(context.work)
            _say(name)
            try:
                sections.append(_EXPERIMENTS[name](context))
            except _FAILURES as exc:
                failed = True
                _say(str(exc))
                sections.append(report.Section(name, name, f"Not measured: {exc}"))
            shutil.rmtree(context.work)
    finally:
        shutil.rmtree(work)
    facts["took"] = f"{time.monotonic() - began_s:.0f} s"
    command = shlex.join(["python", "-m", "bench", *arguments])
    for ending, text in (("md", report.markdown), ("json", report.document)):
        with open(os.path.join(options.out, f"report.{ending}"), "w") as file:
            file.write(text(sections, command, facts))
    missed = [t.measure for section in sections for t in section.targets if not t.met]
    _say(f"report: {options.out}/report.md; missed: {', '.join(missed) or 'nothing'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
