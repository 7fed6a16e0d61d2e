"""How long a job stands still, by its own clock, against ``criu dump`` to tmpfs.

Promises: both dump the same job in turns; its memory is warm; the pause without any dump is told
beside them.
Does not: count what the agent's dump takes after the job runs again; that is experiment 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

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
_SMALL_BYTES = 8 << 20
_HEADS = (
    *("memory", "nothing, ms", "ckpt-agent, ms", "criu dump, ms", "criu dump / ckpt-agent"),
    "criu dump of 8 MiB, ms",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A job (``arguments`` of ``bench.clockwork``) and what must be reached: the pause of a plain
    dump at least ``ratio`` times ours, and ours no longer than ``most_s``. ``environment`` is the
    agent's.
    """

    title: str
    size_bytes: int
    ratio: float
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    most_s: float | None = None


class _Clockwork:
    """A running ``bench.clockwork``."""

    def __init__(self, directory: str, case: Case) -> None:
        os.makedirs(directory)
        path = os.path.join(directory, "pause")
        with open(path, "w+b") as file:
            file.truncate(mmap.PAGESIZE)
            self._shown = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        argv = [sys.executable, "-m", "bench.clockwork", directory, f"--bytes={case.size_bytes}"]
        null = subprocess.DEVNULL
        self._process = subprocess.Popen(
            [*argv, *case.arguments], stdin=null, stdout=null, stderr=null, start_new_session=True
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
        """End all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


def measure(context: Context) -> Section:
    """1 GiB and 4 GiB, in turns; a quick run only smaller ones."""
    sizes = [_GIB, 4 * _GIB] if context.size_bytes >= _GIB else [_GIB // 4, _GIB]
    section = Section(
        name="short-stop", title="The job's own longest pause", how=_HOW, heads=_HEADS
    )
    for size_bytes in sizes:
        gib = size_bytes / _GIB
        case = Case(f"{gib:g} GiB", size_bytes, 100.0, most_s=(10 + 5 * gib) / 1e3)
        _measure(context, case, section)
    return section


_HOW = (
    "A job that writes to 1 % of its pages a second and watches its clock. `ckpt-agent dump"
    " --precopy-cpu 100` (so that a pair takes less long), and `criu dump --leave-running` to"
    " tmpfs, in turns; memory was touched before, and nothing else runs. The last column is `criu"
    " dump` of the same job with 8 MiB in place of its memory: what a stop by CRIU takes however"
    " little it has to copy."
)


def compare(context: Context, name: str, case: Case) -> Section:
    """One case."""
    section = Section(name=name, title=f"Longest pause: {case.title}", how=_HOW, heads=_HEADS)
    _measure(context, case, section)
    return section


def _measure(context: Context, case: Case, section: Section) -> None:
    warm(2 * case.size_bytes)
    idle: list[float] = []
    ours: list[float] = []
    theirs: list[float] = []
    floor: list[float] = []
    ways: list[dict[str, Any]] = []
    images = os.path.join(_TMPFS, f"bench-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, images, ignore_errors=True)
        folder = os.path.join(context.work, f"clock-{len(section.rows)}")
        job = _Clockwork(folder, case)
        stack.callback(job.kill)
        small = _Clockwork(f"{folder}-small", dataclasses.replace(case, size_bytes=_SMALL_BYTES))
        stack.callback(small.kill)
        for number in range(context.pairs):
            with job.pause(idle):
                time.sleep(_IDLE_S)
            agent = tools.Agent(os.path.join(context.work, "store"), case.environment)
            criu = tools.Criu(images)
            os.sync()
            turns = ("agent", "criu") if number % 2 == 0 else ("criu", "agent")
            for turn in turns:
                if turn == "agent":
                    with job.pause(ours):
                        _, report = agent.dump(job.pid, "bench", "--precopy-cpu=100")
                    ways.append(_way(agent, report["name"]))
                    shutil.rmtree(agent.store)
                else:
                    for dumped, into in ((job, theirs), (small, floor)):
                        with dumped.pause(into):
                            criu.dump(dumped.pid)
                        shutil.rmtree(images)
            context.say(
                f"{case.title}: idle {idle[-1]:.3f} s, ckpt-agent {ours[-1]:.3f} s"
                f" ({ways[-1]['stop']['path']}), criu {theirs[-1]:.3f} s,"
                f" of 8 MiB {floor[-1]:.3f} s"
            )
    _tell(case, section, [Samples.of(values) for values in (idle, ours, theirs, floor)], ways)


def _way(agent: tools.Agent, image: str) -> dict[str, Any]:
    """What the image tells of its stop."""
    (member,) = json.loads(agent.show(image).stdout)["detail"]
    return {"stop": member["stop"]}


def _tell(case: Case, section: Section, samples: list[Samples], ways: list[dict[str, Any]]) -> None:
    idle, own, other, floor = samples
    ratio = other.over(own)
    section.rows.append(
        (
            case.title,
            *(each.told(digits=1, scale=1e-3) for each in (idle, own, other)),
            ratio.told(digits=1),
            floor.told(digits=1, scale=1e-3),
        )
    )
    section.data[case.title] = {
        "idle_s": idle.document(),
        "agent_s": own.document(),
        "criu_s": other.document(),
        "criu_of_8_mib_s": floor.document(),
        "ways": ways,
    }
    if ratio.median < 1:
        section.slower.append(
            f"{case.title}: the pause is {own.over(other).told('times', 1)} that of criu dump"
        )
    required, met = f"<= 1/{case.ratio:g} of criu dump", ratio.median >= case.ratio
    if case.most_s is not None:
        required += f", and <= {case.most_s * 1e3:g} ms"
        met = met and own.median <= case.most_s
    section.targets.append(
        Target(
            f"longest pause, {case.title}",
            required,
            f"1/{ratio.median:.1f}; {own.told('ms', 1, 1e-3)}",
            met,
        )
    )
