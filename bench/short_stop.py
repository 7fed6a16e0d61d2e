"""Experiment 6: how long a job stands still, by its own clock, against ``criu dump`` to tmpfs.

Promises: both dump the same process in turns; its memory is warm; the pause without any dump is
told beside them.
Does not: count what the agent's dump takes after the job runs again; that is experiment 1.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator

from bench import tools
from bench.clockwork import LOOKS, PAUSE
from bench.figures import Samples
from bench.holder import HolderFailed
from bench.machine import Context, warm
from bench.report import Section, Target

_GIB = 1 << 30
_TMPFS = "/dev/shm"
_STARTED_S = 300.0
_IDLE_S = 1.0
_HEADS = ("memory", "nothing, ms", "ckpt-agent, ms", "criu dump, ms", "criu dump / ckpt-agent")


class _Clockwork:
    """A running ``bench.clockwork``."""

    def __init__(self, directory: str, size_bytes: int) -> None:
        os.makedirs(directory)
        path = os.path.join(directory, "pause")
        with open(path, "w+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._shown = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        argv = [sys.executable, "-m", "bench.clockwork", directory, f"--bytes={size_bytes}"]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(
            argv, stdin=null, stdout=null, stderr=null, start_new_session=True
        )
        self.pid = self._process.pid
        until_s = time.monotonic() + _STARTED_S
        while not LOOKS.unpack_from(self._shown, 8)[0]:
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise HolderFailed("the process with the clock does not start")
            time.sleep(0.05)

    @contextlib.contextmanager
    def pause(self, into: list[float]) -> Iterator[None]:
        """Append the longest pause while the block ran."""
        PAUSE.pack_into(self._shown, 0, 0.0)
        yield
        looks = LOOKS.unpack_from(self._shown, 8)[0]
        until_s = time.monotonic() + _STARTED_S
        while LOOKS.unpack_from(self._shown, 8)[0] < looks + 2:
            if time.monotonic() > until_s:
                raise HolderFailed("the process with the clock stands still")
            time.sleep(0.001)
        into.append(PAUSE.unpack_from(self._shown)[0])

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


def measure(context: Context) -> Section:
    """1 GiB and 4 GiB, in turns; a quick run only the smaller."""
    sizes = [_GIB, 4 * _GIB] if context.size_bytes >= _GIB else [_GIB // 4, _GIB]
    section = Section(
        name="short-stop",
        title="The job's own longest pause",
        how=(
            "One process that writes to 1 % of its pages a second and watches its clock."
            " `ckpt-agent dump` with precopy, and `criu dump --leave-running` to tmpfs, in turns."
        ),
        heads=_HEADS,
    )
    for size_bytes in sizes:
        warm(3 * size_bytes)
        _measure(context, size_bytes, section)
    return section


def _measure(context: Context, size_bytes: int, section: Section) -> None:
    idle: list[float] = []
    ours: list[float] = []
    theirs: list[float] = []
    gib = size_bytes / _GIB
    images = os.path.join(_TMPFS, f"bench-{os.getpid()}")
    job = _Clockwork(os.path.join(context.work, f"clock-{size_bytes}"), size_bytes)
    try:
        for number in range(context.pairs):
            with job.pause(idle):
                time.sleep(_IDLE_S)
            agent = tools.Agent(os.path.join(context.work, f"store-{size_bytes}-{number}"))
            criu = tools.Criu(images)
            os.sync()
            turns = ("agent", "criu") if number % 2 == 0 else ("criu", "agent")
            for turn in turns:
                if turn == "agent":
                    with job.pause(ours):
                        agent.dump(job.pid, "bench")
                    shutil.rmtree(agent.store)
                else:
                    with job.pause(theirs):
                        criu.dump(job.pid)
                    shutil.rmtree(images)
            context.say(
                f"{gib:g} GiB: idle {idle[-1]:.3f} s, ckpt-agent {ours[-1]:.3f} s,"
                f" criu {theirs[-1]:.3f} s"
            )
    finally:
        job.kill()
        shutil.rmtree(images, ignore_errors=True)
    own, other = Samples.of(ours), Samples.of(theirs)
    ratio = other.over(own)
    section.rows.append(
        (
            f"{gib:g} GiB",
            *(Samples.of(v).told(digits=1, scale=1e-3) for v in (idle, ours, theirs)),
            ratio.told(digits=0),
        )
    )
    section.data[f"{gib:g} GiB"] = {
        "idle_s": Samples.of(idle).document(),
        "agent_s": own.document(),
        "criu_s": other.document(),
    }
    most_s = (10 + 5 * gib) / 1e3
    section.targets.append(
        Target(
            f"longest pause at {gib:g} GiB",
            f"<= 1/100 of criu dump, and <= {most_s * 1e3:g} ms",
            f"1/{ratio.median:.0f}; {own.told('ms', 1, 1e-3)}",
            ratio.median >= 100 and own.median <= most_s,
        )
    )
