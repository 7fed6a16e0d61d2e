"""Experiment 4: what several epochs of real trainings take up in a store.

Promises: for each epoch the tree stands still (SIGSTOP) while ckpt-agent and then criu dump it,
so that all figures are of the same memory; the yardsticks are computed from criu's image files.
Does not: stop at a framework that is not installed; the report names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import zstandard

from bench import programs, tools
from bench.figures import mib
from bench.machine import Context
from bench.pages import PAGE_BYTES
from bench.report import Section, Target
from demo import job

_HEADS = (
    "training",
    "epochs",
    "raw",
    "zstd-3",
    "unique pages",
    "stored",
    "ratio",
    "stored / unique",
    "zstd-3 / stored",
)
_STEPS_APART = 10
_PACE_S = 0.05
_DEADLINE_S = 180.0
_ZERO = bytes(PAGE_BYTES)
# Memory, and files that have no name any more: Ray's shared object store is one of those.
_PAGES = ("pages-", "ghost-file-")
_RATIO, _OVER_UNIQUE, _UNDER_ZSTD3 = 5.0, 1.10, 1.5
_WORKLOADS = os.path.join(os.path.dirname(__file__), "workloads")


@dataclass(frozen=True)
class Kind:
    """A training: how it is started in ``directory``, and why it cannot be, if it cannot."""

    name: str
    epochs: int
    command: list[str]
    directory: str
    env: dict[str, str] = field(default_factory=dict)
    missing: str = ""


class Yardsticks:
    """What simpler ways would have stored for the same dumps."""

    def __init__(self) -> None:
        self.raw_bytes = 0
        self.zstd3_bytes = 0
        self.unique_bytes = 0
        """Every 4 KiB page once over all epochs and ranks, each at zstd -1 by itself; pages of
        zeros and all that is not a page are free."""
        self._seen: set[bytes] = set()

    def add(self, images: str) -> None:
        """Count one dump's image files."""
        whole = zstandard.ZstdCompressor(3, threads=2).compressobj()
        page_by_page = zstandard.ZstdCompressor(1)
        for name in sorted(os.listdir(images)):
            with open(os.path.join(images, name), "rb") as file:
                content = file.read()
            self.raw_bytes += len(content)
            self.zstd3_bytes += len(whole.compress(content))
            if not name.startswith(_PAGES):
                continue
            for at in range(0, len(content), PAGE_BYTES):
                page = content[at : at + PAGE_BYTES]
                digest = hashlib.blake2b(page, digest_size=16).digest()
                if digest not in self._seen and page != _ZERO:
                    self._seen.add(digest)
                    self.unique_bytes += min(PAGE_BYTES, len(page_by_page.compress(page)))
        self.zstd3_bytes += len(whole.flush())


class Tree:
    """A training that runs."""

    def __init__(self, kind: Kind) -> None:
        os.makedirs(kind.directory, exist_ok=True)
        self._log = os.path.join(kind.directory, "rank-0.log")
        with open(os.path.join(kind.directory, "job.log"), "w") as log:
            self._process = subprocess.Popen(
                kind.command,
                env=os.environ | kind.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def step(self) -> int:
        """The last step in the log; 0 if there is none."""
        with contextlib.suppress(FileNotFoundError), open(self._log, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 1000))
            for line in reversed(log.read().decode(errors="replace").splitlines()[:-1]):
                if seen := job.read_step(line):
                    return seen[0]
        return 0

    def wait_for(self, step: int) -> None:
        """Return when ``step`` was seen."""
        until_s = time.monotonic() + _DEADLINE_S
        while self.step() < step:
            if not job.running(self.pid) or time.monotonic() > until_s:
                raise job.JobFailed(f"step {step} was not reached; see {self._log}")
            time.sleep(0.01)

    def signal(self, number: int) -> list[int]:
        """Send a signal to all processes; return them."""
        pids = [self.pid, *job.descendants(self.pid)]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def close(self) -> None:
        """Kill all processes."""
        pids = self.signal(signal.SIGKILL)
        self._process.wait()
        job.reap(pids[1:])


def kinds(work: str) -> list[Kind]:
    """The trainings; each in a folder of its own below ``work``."""
    cache = os.environ.get("CKPT_AGENT_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ckpt-agent"
    )
    at = {name: os.path.join(work, name) for name in ("demo", "np", "jax", "torch", "ray")}
    env = {"DATA": os.path.join(work, "digits.npz"), "PACE": str(_PACE_S)}
    env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def launch(python: str, name: str, script: str, ranks: int = 2) -> list[str]:
        launcher = os.path.join(_WORKLOADS, "launch.py")
        return [python, launcher, os.path.join(_WORKLOADS, script), str(ranks), at[name]]

    jax = os.path.join(cache, "bench", "jax", "bin", "python")
    ray = os.path.join(cache, "bench", "ray", "bin", "python")
    torch = os.path.join(cache, "bench", "torch", "python")
    setup = "not installed: run scripts/bench-setup"
    endless = [sys.executable, "-m", "demo.train", at["demo"], "--steps=1000000"]
    return [
        Kind("demo: numpy, 3 ranks, ring", 10, endless, at["demo"]),
        Kind("np: numpy, 2 ranks", 5, launch(sys.executable, "np", "numpy_tcp.py"), at["np"], env),
        Kind(
            "jax: jax.distributed, 2 ranks",
            5,
            launch(jax, "jax", "jax_pjit.py"),
            at["jax"],
            env,
            "" if os.path.exists(jax) else setup,
        ),
        Kind(
            "torch: DDP over gloo, 2 ranks",
            5,
            launch(torch, "torch", "torch_ddp.py"),
            at["torch"],
            env,
            "" if os.path.exists(torch) else setup,
        ),
        Kind(
            "ray: 2 actors, 10 processes",
            5,
            launch(ray, "ray", "ray_actors.py", 1),
            at["ray"],
            # A short path, since Ray's socket names below it must fit into 107 bytes.
            env | {"RAY_DIR": os.path.join(work, "r"), "RAY_USAGE_STATS_ENABLED": "0"},
            "" if os.path.exists(ray) else setup,
        ),
    ]


def measure(context: Context) -> Section:
    """Dump each training several times, ten steps apart."""
    section = Section(
        name="trainings",
        title="Epochs of real trainings",
        how=(
            f"Dumps {_STEPS_APART} steps apart. *Raw* are criu's image files, *zstd-3* each dump by"
            " itself, *unique pages* every 4 KiB page once over all epochs and ranks at zstd -1"
            " each (nothing counted for page tables and metadata), *stored* all files of the store."
        ),
        heads=_HEADS,
    )
    save_digits(os.path.join(context.work, "digits.npz"))
    raw = kept = 0
    for kind in kinds(context.work):
        if kind.missing:
            section.notes.append(f"{kind.name}: {kind.missing}")
            continue
        try:
            yard, stored = _epochs(context, kind)
        except (programs.ProgramFailed, job.JobFailed) as exc:
            context.say(f"{kind.name}: {exc}")
            section.targets.append(Target(kind.name, "measured", str(exc).splitlines()[0], False))
            continue
        raw += yard.raw_bytes
        kept += stored
        _add(section, kind, yard, stored)
    ratio = raw / kept
    section.targets.insert(
        0,
        Target("all trainings together", f">= {_RATIO:.0f}:1", f"{ratio:.2f}:1", ratio >= _RATIO),
    )
    return section


def _epochs(context: Context, kind: Kind) -> tuple[Yardsticks, int]:
    yard = Yardsticks()
    agent = tools.Agent(kind.directory + "-store")
    tree = Tree(kind)
    try:
        for epoch in range(kind.epochs):
            tree.wait_for(_STEPS_APART if epoch == 0 else tree.step() + _STEPS_APART)
            _stop(tree)
            stored = agent.dump(tree.pid, "bench")[1]["storedBytes"]
            criu = tools.Criu(kind.directory + "-images")
            criu.dump(tree.pid)
            before = (yard.raw_bytes, yard.unique_bytes)
            yard.add(criu.images)
            shutil.rmtree(criu.images)
            tree.signal(signal.SIGCONT)
            raw, unique = yard.raw_bytes - before[0], yard.unique_bytes - before[1]
            context.say(
                f"{kind.name}: epoch {epoch + 1}: raw {mib(raw)}, unique pages {mib(unique)},"
                f" stored {mib(stored)}"
            )
    finally:
        tree.close()
    total = tools.tree_bytes(agent.store)
    shutil.rmtree(agent.store)
    return yard, total


def _stop(tree: Tree) -> None:
    until_s = time.monotonic() + _DEADLINE_S
    pids = tree.signal(signal.SIGSTOP)
    while any(job.state(pid) != "T" for pid in pids):
        if time.monotonic() > until_s:
            raise job.JobFailed("the training cannot be stopped")
        time.sleep(0.01)


def _add(section: Section, kind: Kind, yard: Yardsticks, stored: int) -> None:
    ratio, unique = yard.raw_bytes / stored, stored / yard.unique_bytes
    zstd3 = yard.zstd3_bytes / stored
    sizes = (yard.raw_bytes, yard.zstd3_bytes, yard.unique_bytes, stored)
    told = (f"{ratio:.2f}:1", f"{unique:.3f}", f"{zstd3:.2f}")
    section.rows.append((kind.name, str(kind.epochs), *map(mib, sizes), *told))
    section.targets += [
        Target(
            f"{kind.name}: against unique 4 KiB pages at zstd-1 each",
            f"<= {_OVER_UNIQUE:.2f}x",
            f"{unique:.3f} x",
            unique <= _OVER_UNIQUE,
        ),
        Target(
            f"{kind.name}: smaller than zstd-3 of each dump",
            f">= {_UNDER_ZSTD3}x",
            f"{zstd3:.2f} x",
            zstd3 >= _UNDER_ZSTD3,
        ),
    ]
    if (possible := yard.zstd3_bytes / yard.unique_bytes) < _UNDER_ZSTD3:
        section.notes.append(
            f"{kind.name}: the unique pages themselves are only {possible:.2f} times smaller than"
            " zstd-3 of each dump: too much of this small training changes between epochs"
        )
    if unique > 1:
        section.slower.append(f"{kind.name}: stored is {unique:.3f} times the unique pages")
    section.data[kind.name] = {
        "epochs": kind.epochs,
        "raw_bytes": yard.raw_bytes,
        "zstd3_bytes": yard.zstd3_bytes,
        "unique_bytes": yard.unique_bytes,
        "stored_bytes": stored,
    }


def save_digits(path: str) -> None:
    """Write what all but the demo train on."""
    from sklearn.datasets import load_digits  # here: slow, and only this experiment needs it

    bunch = load_digits()
    np.savez(path, x=(bunch.data / 16).astype(np.float32), y=bunch.target.astype(np.int64))
