"""How much a job is slowed down while its memory is copied, and by epochs every 30 s.

Promises: the job's speed beside a dump is told against its speed just before and after; the speed
with standing epochs counts everything from the end of the first epoch on, stops as well.
Does not: count the stop of a single dump as pre-copy; it is told beside it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from bench import tools
from bench.busy import COUNT
from bench.figures import Samples
from bench.holder import HolderFailed
from bench.machine import Context
from bench.report import Section, Target

_BYTES = {"training": 400 << 20, "writer": 1 << 30}
# Of its speed alone, with a dump's pre-copy and with standing epochs.
_KEEPS = {"training": (0.90, 0.95), "writer": (0.80, 0.90)}
_BASE_S = 4.0
_EVERY_S = 30
_EPOCHS = 2
_STARTED_S = 120.0


class _Busy:
    """A running ``bench.busy``."""

    def __init__(self, directory: str, kind: str) -> None:
        path = os.path.join(directory, "count")
        with open(path, "w+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._shown = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        argv = [sys.executable, "-m", "bench.busy", kind, directory, f"--bytes={_BYTES[kind]}"]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(
            argv, stdin=null, stdout=null, stderr=null, start_new_session=True
        )
        self.pid = self._process.pid
        until_s = time.monotonic() + _STARTED_S
        while not self._done():
            if time.monotonic() > until_s or self._process.poll() is not None:
                raise HolderFailed("the busy job does not start")
            time.sleep(0.05)

    def _done(self) -> int:
        return int(COUNT.unpack_from(self._shown)[0])

    def speed(self, during: Callable[[], float]) -> float:
        """How much it does a second; ``during`` says how many seconds of it do not count."""
        done, began_s = self._done(), time.monotonic()
        not_counted_s = during()
        took_s = time.monotonic() - began_s - not_counted_s
        return (self._done() - done) / took_s

    def alone(self) -> float:
        """Its speed alone."""

        def wait() -> float:
            time.sleep(_BASE_S)
            return 0.0

        return self.speed(wait)

    def kill(self) -> None:
        """End it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def measure(context: Context, kind: str) -> Section:
    """Dumps, then a watch of a few epochs."""
    section = Section(
        name=kind,
        title=f"Speed of a {kind} beside dumps",
        how=(
            f"`bench.busy {kind}`, {_BYTES[kind] >> 20} MiB, all of which it writes all the time."
            f" A dump with the default settings; then `watch --every {_EVERY_S}s`, from the end of"
            f" the first epoch to that of number {_EPOCHS}. Speeds are parts of the job's own,"
            f" alone for {_BASE_S:g} s before and after."
        ),
        heads=("what", "speed, of alone", "stop, ms", "durable after, s"),
    )
    job = _Busy(context.work, kind)
    try:
        job.alone()
        parts: list[float] = []
        stops: list[float] = []
        durable: list[float] = []
        before = job.alone()
        for number in range(context.pairs):
            agent = tools.Agent(os.path.join(context.work, f"store-{number}"))

            def dump(agent: tools.Agent = agent) -> float:
                _, document = agent.dump(job.pid, "bench")
                stops.append(document["stopSeconds"])
                durable.append(document["durableSeconds"])
                return stops[-1]

            beside = job.speed(dump)
            shutil.rmtree(agent.store)
            after = job.alone()
            parts.append(2 * beside / (before + after))
            before = after
            context.say(f"{kind}: {parts[-1]:.2f} of its speed, stop {stops[-1]:.3f} s")
        watched = _watched(context, job, before)
    finally:
        job.kill()
    told = [Samples.of(values) for values in (parts, stops, durable)]
    section.rows.append(
        ("a dump, but for its stop", told[0].told(), told[1].told(digits=0, scale=1e-3),
         told[2].told(digits=1))
    )  # fmt: skip
    section.rows.append((f"an epoch every {_EVERY_S} s", f"{watched:.2f}", "", ""))
    section.data = {
        "beside_dump": told[0].document(),
        "stop_s": told[1].document(),
        "durable_s": told[2].document(),
        "with_epochs": watched,
    }
    single, standing = _KEEPS[kind]
    section.targets += [
        Target(
            f"speed of a {kind} during pre-copy",
            f">= {single:.0%}",
            told[0].told(),
            told[0].median >= single,
        ),
        Target(
            f"speed of a {kind} with an epoch every {_EVERY_S} s",
            f">= {standing:.0%}",
            f"{watched:.2f}",
            watched >= standing,
        ),
    ]
    return section


def _watched(context: Context, job: _Busy, before: float) -> float:
    """Its speed with standing epochs, of that alone."""
    argv = [tools.program("ckpt-agent"), "watch", "--pid", str(job.pid), "--name", "bench"]
    argv += ["--every", f"{_EVERY_S}s", "--count", str(_EPOCHS)]
    argv += ["--store", os.path.join(context.work, "watched"), "-o", "name"]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as watch:
        if watch.stdout is None or not watch.stdout.readline():
            raise HolderFailed("the watch made no epoch")

        def rest() -> float:
            if watch.wait(_STARTED_S * _EPOCHS):
                raise HolderFailed(f"the watch ended with status {watch.returncode}")
            return 0.0

        beside = job.speed(rest)
    part = 2 * beside / (before + job.alone())
    context.say(f"{part:.2f} of its speed with an epoch every {_EVERY_S} s")
    return part
