"""What two ranks of a training store together: ``python -m bench.ranks [--epochs N]``.

A data-parallel training of two ranks, whose weights are the same. At each epoch both stand still
(SIGSTOP) and are dumped as one image, and each by itself into a store of its own: of the same
memory.

Promises: prints what each epoch stored either way and the ratio, and beside it how many of the
pages that no epoch before had are in both ranks, which is as much as can be had. All memory is read
by CRIU (no copying ahead), so that nothing is stored that was written twice.
Does not: leave anything running. Needs root and CRIU, as a dump does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import machine, programs, trainings
from bench.figures import mib
from bench.pages import PAGE_BYTES
from demo import job

_RANKS, _STEPS_APART = 2, 10


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--training", choices=("np", "torch", "jax"), default="np")
    options = parser.parse_args()
    about = machine.facts(".")
    print(f"{about['machine']}; {about['system']}; load before: {about['load before']}")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        trainings.save_digits(os.path.join(folder, "digits.npz"))
        kind = next(
            each for each in trainings.kinds(folder) if each.name.startswith(options.training)
        )
        if kind.missing:
            sys.exit(kind.missing)
        print(kind.name)
        _measure(kind, Path(folder), options.epochs)


def _measure(kind: trainings.Kind, folder: Path, epochs: int) -> None:
    tree = trainings.Tree(kind)
    try:
        together, apart, seen = [], [], set[bytes]()
        for epoch in range(epochs):
            tree.wait_for(tree.step() + _STEPS_APART)
            ranks = [pid for pid in job.descendants(tree.pid) if _is_rank(pid)]
            if len(ranks) != _RANKS:
                raise job.JobFailed(f"{len(ranks)} of {_RANKS} ranks run")
            tree.signal(signal.SIGSTOP)
            new = [_pages(pid) - seen for pid in ranks]
            seen.update(*new)
            together.append(_stored_bytes(folder / "together", ranks))
            alone = [
                _stored_bytes(folder / f"apart-{number}", [pid]) for number, pid in enumerate(ranks)
            ]
            apart.append(sum(alone))
            tree.signal(signal.SIGCONT)
            print(
                f"epoch {epoch + 1}: one store {mib(together[-1])}, a store each {mib(apart[-1])}"
                f" ({' + '.join(map(mib, alone))}): {together[-1] / apart[-1]:.2f}; of"
                f" {' + '.join(str(len(each)) for each in new)} new pages"
                f" {len(set.intersection(*new))} are in both"
            )
        whole = sum(together) / sum(apart)
        print(f"all epochs: {mib(sum(together))} against {mib(sum(apart))}: {whole:.2f}")
    finally:
        tree.close()


def _is_rank(pid: int) -> bool:
    return b"RANK=" in Path(f"/proc/{pid}/environ").read_bytes()


def _pages(pid: int) -> set[bytes]:
    """Digests of what is in the private writable pages of a process."""
    found = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights, _, _, _, *path = line.split()
            if rights[1:4:2] != "wp" or path[:1] in (["[vvar]"], ["[vsyscall]"]):
                continue
            start, end = (int(each, 16) for each in span.split("-"))
            for at in range(start, end, PAGE_BYTES):
                page = os.pread(memory.fileno(), PAGE_BYTES, at)
                if any(page):
                    found.add(hashlib.blake2b(page, digest_size=16).digest())
    return found


def _stored_bytes(store: Path, pids: list[int]) -> int:
    words = [word for pid in pids for word in ("--pid", str(pid))]
    program = os.path.join(os.path.dirname(sys.executable), "ckpt-agent")
    words += ["--name", "ranks", "--store", str(store)]
    ran = programs.run(
        [program, "dump", *words, "--output", "json", "--quiet"],
        env={"CKPT_AGENT_PRECOPY": "false"},
    )
    return int(json.loads(ran.stdout)["storedBytes"])


if __name__ == "__main__":
    try:
        main()
    except (programs.ProgramFailed, job.JobFailed, subprocess.SubprocessError) as failure:
        sys.exit(str(failure))
