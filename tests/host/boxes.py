"""Real containers by runc, as a node's runtime would make them, for the container engine's tests.

Each has an overlay on one Debian root, ``hold`` as pid 1 from a volume, the volumes of a pod, and
its output goes through runc's pipes into a log.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agent import errors
from agent.engines.base import (
    CaptureOptions,
    CaptureReport,
    Disposition,
    RestoredTree,
    RestoreOptions,
)
from agent.engines.container import holding
from agent.engines.container.engine import ContainerEngine
from agent.host import proc
from agent.model.container import Container, Mount
from tests.host.conftest import Cut, Gate
from tests.host.image import MemoryImage, MemorySource
from tests.host.packages import CACHE, install

ROOT = Path(__file__).parents[2]
TARGETS = Path(__file__).parent / "targets"
EMPTY_DIR = "volumes/kubernetes.io~empty-dir"
DIGEST = "sha256:" + "1" * 64
# Programs that these tests run, and the packages that have them.
PROGRAMS = {"runc": "runc", "nft": "nftables", "ip": "iproute2", "mmdebstrap": "mmdebstrap"}


def prepare() -> None:
    """Install and build what the containers need; safe to repeat, a minute the first time."""
    install(PROGRAMS)
    debian_root()
    made("hold/build", "hold")
    made("scripts/criu-bundle", "criu-bundle")


def debian_root() -> Path:
    """A small Debian with Python, made once."""
    place = CACHE / "container-root"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "container-root.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            new = place.with_suffix(".new")
            shutil.rmtree(new, ignore_errors=True)
            make = '. "$1" && debian_root bookworm "$2" python3'
            script = str(ROOT / "tests/cluster/debian.sh")
            subprocess.run(["bash", "-ec", make, "bash", script, str(new)], check=True)
            new.rename(place)
    return place


def made(script: str, name: str) -> Path:
    """What one of the project's build scripts makes, in the cache."""
    place = CACHE / name
    subprocess.run([str(ROOT / script), str(place)], check=True, stdout=subprocess.DEVNULL)
    return place


class Box:
    """One container."""

    def __init__(self, boxes: Boxes, name: str, argv: list[str], **options: Any) -> None:
        self.boxes = boxes
        self.name = name
        self.folder = boxes.folder / name
        self.rootfs = self.folder / "rootfs"
        self.log = self.folder / "log"
        self.id = f"{boxes.folder.name}-{os.getpid()}-{name}"
        self.options = options
        self._mounted: list[Path] = []
        self._popen: subprocess.Popen[bytes] | None = None
        boxes.all.append(self)
        self._prepare(argv)
        self._popen = self._start()
        self.pid = self._find_pid()

    def _prepare(self, argv: list[str]) -> None:
        for sub in ("rootfs", "upper", "work", "agent", f"{EMPTY_DIR}/disk", f"{EMPTY_DIR}/memory"):
            (self.folder / sub).mkdir(parents=True)
        lower, upper, work = debian_root(), self.folder / "upper", self.folder / "work"
        self._mount(
            *("-t", "overlay", "overlay", self.rootfs),
            options=f"lowerdir={lower},upperdir={upper},workdir={work},index=off",
        )
        memory = self.folder / EMPTY_DIR / "memory"
        self._mount("-t", "tmpfs", "tmpfs", memory, options="size=64m")
        shutil.copy2(made("hold/build", "hold"), self.folder / "agent" / "hold")
        if suffix := self.options.get("hold_suffix"):
            with (self.folder / "agent" / "hold").open("ab") as hold:
                hold.write(suffix)
        config = self._config(argv)
        (self.folder / "config.json").write_text(json.dumps(config))
        self.mounts = tuple(
            Mount(
                m["destination"],
                m.get("source", ""),
                m.get("type", ""),
                tuple(m.get("options", ())),
            )
            for m in config["mounts"]
        )

    def _mount(self, *argv: str | Path, options: str) -> None:
        subprocess.run(["mount", *map(str, argv), "-o", options], check=True)
        self._mounted.append(Path(argv[-1]))

    def _config(self, argv: list[str]) -> dict[str, Any]:
        subprocess.run(["runc", "spec"], cwd=self.folder, check=True)
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        env = [
            "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
            f"CKPT_AGENT_CONTAINER={self.options.get('container', 'main')}",
        ]
        env += self.options.get("env", [])
        capabilities = self.options.get("capabilities", ["CAP_KILL", "CAP_NET_BIND_SERVICE"])
        config["process"].update(
            terminal=False,
            args=argv,
            env=env,
            capabilities=dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
            rlimits=[],
        )
        if user := self.options.get("user"):
            config["process"]["user"] = {"uid": user, "gid": user}
            os.chown(self.folder / EMPTY_DIR / "disk", user, user)
        config["root"] = {"path": "rootfs", "readonly": self.options.get("read_only", False)}
        config["hostname"] = self.name
        config["linux"]["cgroupsPath"] = f"/ckpt-agent-test/{self.id}"
        config["linux"]["resources"]["memory"] = {
            "limit": self.options.get("memory_mib", 512) << 20
        }
        if "seccomp" in self.options:
            config["linux"]["seccomp"] = self.options["seccomp"]
        kinds = ["pid", "ipc", "uts", "mount", "network"]
        config["linux"]["namespaces"] = [
            {"type": kind, **self.options.get("namespaces", {}).get(kind, {})}
            for kind in kinds
            if self.options.get("namespaces", {}).get(kind, {}) is not None
        ]
        disk = self.options.get("disk", str(self.folder / EMPTY_DIR / "disk"))
        bind = {"type": "bind", "options": ["rbind", "rw"]}
        config["mounts"] += [
            {"destination": "/.ckpt-agent", "source": str(self.folder / "agent"), **bind},
            {"destination": "/disk", "source": disk, **bind},
            {"destination": "/memory", "source": str(self.folder / EMPTY_DIR / "memory"), **bind},
            {"destination": "/targets", "source": str(TARGETS), **bind},
            *self.options.get("mounts", []),
        ]
        return config

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as log:
            return subprocess.Popen(
                [
                    "runc",
                    "--root",
                    str(self.boxes.state),
                    "run",
                    "--bundle",
                    str(self.folder),
                    self.id,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _find_pid(self) -> int:
        deadline = time.monotonic() + 20
        while True:
            assert time.monotonic() < deadline, self.log.read_text()
            assert self.popen.poll() is None, self.log.read_text()
            done = self.boxes.runc("state", self.id)
            if done.returncode == 0:
                state = json.loads(done.stdout)
                if state["status"] == "running" and _is_itself(state["pid"]):
                    return int(state["pid"])
            time.sleep(0.02)

    @property
    def popen(self) -> subprocess.Popen[bytes]:
        assert self._popen is not None
        return self._popen

    @property
    def container(self) -> Container:
        return Container(
            id=self.id,
            name=self.options.get("container", "main"),
            pid=self.pid,
            rootfs=str(self.rootfs),
            mounts=self.mounts,
            image_digest=self.options.get("digest", DIGEST),
            terminal=self.options.get("terminal", False),
        )

    def inside(self, number: int) -> int:
        """The number on this host of the container's process ``number``."""
        for pid in self.pids():
            with contextlib.suppress(errors.NotFound):  # others come and go
                if proc.status(pid).ns_pids[-1] == number:
                    return pid
        raise AssertionError(f"no process {number} in {self.name}")

    def pids(self) -> list[int]:
        path = Path("/sys/fs/cgroup/memory/ckpt-agent-test") / self.id / "cgroup.procs"
        if not path.exists():
            path = Path("/sys/fs/cgroup/ckpt-agent-test") / self.id / "cgroup.procs"
        return sorted(int(line) for line in path.read_text().split())

    def root(self, path: str) -> Path:
        """A path of the container as it sees it."""
        return Path(f"/proc/{self.pid}/root") / path.lstrip("/")

    def exec(self, *argv: str, check: bool = True) -> str:
        done = self.boxes.runc("exec", self.id, *argv)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def execute(self, argv: list[str], timeout_s: int) -> tuple[int, bytes, bytes]:
        """As a runtime does it for a probe (``fakes.cri.FakeContainer.execute``)."""
        command = ["runc", "--root", str(self.boxes.state), "exec", self.id, *argv]
        try:
            done = subprocess.run(command, capture_output=True, timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise TimeoutError from exc
        # What runc says for itself, as distinct from the command.
        if done.returncode == 255 and b"exec failed" in done.stderr:
            raise ChildProcessError(done.stderr.decode())
        return done.returncode, done.stdout, done.stderr

    def wait(self, timeout_s: float = 20) -> int:
        return self.popen.wait(timeout_s)

    def close(self) -> None:
        self.boxes.runc("delete", "--force", self.id)
        if self._popen is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._popen.wait(10)
            self._popen.kill()
            self._popen.wait()
        for path in reversed(self._mounted):
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        for path in Path("/sys/fs/cgroup").glob(f"*/ckpt-agent-test/{self.id}"):
            with contextlib.suppress(OSError):
                path.rmdir()


class Boxes:
    """The containers of one test, and the engine's directories."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "runc"
        self.work = folder / "work"
        self.runtime = folder / "run"
        self.bundle = made("scripts/criu-bundle", "criu-bundle")
        self.all: list[Box] = []
        self.trees: list[RestoredTree] = []
        self.execs: list[subprocess.Popen[bytes]] = []

    def runc(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["runc", "--root", str(self.state), *argv], capture_output=True, text=True, timeout=60
        )

    def popen_exec(self, box: Box, *argv: str) -> subprocess.Popen[bytes]:
        """``runc exec``, as a probe or ``kubectl exec`` does it; ends with the boxes."""
        popen = subprocess.Popen(
            ["runc", "--root", str(self.state), "exec", box.id, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.execs.append(popen)
        return popen

    def start(self, name: str, *argv: str, **options: Any) -> Box:
        """A container with this workload, or one that has ended already."""
        return _held(Box(self, name, ["/.ckpt-agent/hold", "run", *argv], **options))

    def placeholder(self, name: str, **options: Any) -> Box:
        """A container that waits for a restore."""
        return _held(Box(self, name, ["/.ckpt-agent/hold", "wait"], **options))

    def tree(
        self,
        name: str,
        *features: str,
        folder: str = "/work",
        under: tuple[str, ...] = (),
        **options: Any,
    ) -> Box:
        """A container with ``targets/tree.py``, started by the program ``under``, standing."""
        argv = [*under, *_tree(folder, features)]
        return self._standing(self.start(name, *argv, **options), folder)

    def ordinary(self, name: str, *features: str, folder: str = "/work", **options: Any) -> Box:
        """Likewise, of a pod that was not opted in: ``tree.py`` is the container's pid 1."""
        return self._standing(Box(self, name, _tree(folder, features), **options), folder)

    def _standing(self, box: Box, folder: str) -> Box:
        deadline = time.monotonic() + 20
        while not box.root(f"{folder}/answer").exists():
            assert box.popen.poll() is None, box.log.read_text()
            assert time.monotonic() < deadline, box.log.read_text()
            time.sleep(0.02)
        return box

    def engine(self, *boxes: Box) -> ContainerEngine:
        return ContainerEngine(
            [box.container for box in boxes],
            bundle=str(self.bundle),
            work_dir=str(self.work),
            runtime_dir=str(self.runtime),
        )

    def dump(
        self,
        box: Box,
        image: MemoryImage | None = None,
        cut: Cut | None = None,
        options: CaptureOptions | None = None,
    ) -> MemoryImage:
        image = image or MemoryImage()
        self.capture(box, image, cut, options)
        return image

    def stop(self, box: Box) -> MemoryImage:
        """Dump and kill; the box is a placeholder then."""
        cut = Cut(disposition=Disposition.KILL)
        image = self.dump(box, cut=cut, options=CaptureOptions(kill=True))
        deadline = time.monotonic() + 10
        while not holding.waits(box.pid):
            assert time.monotonic() < deadline, "hold does not wait"
            time.sleep(0.01)
        return image

    def capture(
        self,
        box: Box,
        image: MemoryImage,
        cut: Cut | None = None,
        options: CaptureOptions | None = None,
    ) -> CaptureReport:
        return self.engine(box).capture(box.pid, image, cut or Cut(), options or CaptureOptions())

    def restore(
        self,
        image: MemoryImage,
        box: Box,
        gate: Gate | None = None,
        options: RestoreOptions | None = None,
    ) -> RestoredTree:
        tree = self.engine(box).restore(
            MemorySource(image), options or RestoreOptions(), gate or Gate()
        )
        self.trees.append(tree)
        return tree

    def check(self, box: Box, folder: str = "/work") -> None:
        """Let ``tree.py`` check itself."""
        answer = box.root(f"{folder}/answer")
        answer.unlink(missing_ok=True)
        # The stem hands it on.
        os.kill(stem(box), signal.SIGUSR1)
        deadline = time.monotonic() + 40
        while not answer.exists():
            assert time.monotonic() < deadline, f"no answer: {box.log.read_text()}"
            time.sleep(0.01)
        said = json.loads(answer.read_text())
        assert {name: text for name, text in said.items() if text} == {}

    def assert_clean(self) -> None:
        """Nothing of an operation is left on the node or in a container."""
        subs = ("ops", "locks", "tables", "strays")
        for folder in (self.work, *(self.runtime / sub for sub in subs)):
            if folder.exists():
                assert list(folder.iterdir()) == []
        children = [proc.stat(pid) for pid in proc.children(os.getpid())]
        assert [c for c in children if c.comm in ("criu", "ld.so", "nsenter")] == []
        for box in self.all:
            if box.popen.poll() is None:
                assert tables(box) == ""
                assert not box.root("/run/criu.kdat").exists()
                assert not box.root("/run/criu.kdat.tmp").exists()

    def close(self) -> None:
        for tree in self.trees:
            tree.close()  # type: ignore[attr-defined]
        for box in reversed(self.all):
            box.close()
        for popen in self.execs:
            popen.kill()
            popen.wait()
        # Empty when nobody else's containers are there.
        for path in Path("/sys/fs/cgroup").glob("*/ckpt-agent-test"):
            with contextlib.suppress(OSError):
                path.rmdir()


def _is_itself(pid: int) -> bool:
    """Whether the container's first process has become what it was told to: runc says that it runs
    when it is only about to.
    """
    with contextlib.suppress(errors.NotFound):
        return not proc.stat(pid).comm.startswith("runc:")
    return False


def _held(box: Box) -> Box:
    """The container when its hold says what it does."""
    deadline = time.monotonic() + 20
    while not (holding.waits(box.pid) or holding.follows(box.pid) or box.popen.poll() is not None):
        assert time.monotonic() < deadline, box.log.read_text()
        time.sleep(0.01)
    return box


def _tree(folder: str, features: tuple[str, ...]) -> list[str]:
    script = f"mkdir -p {folder} && exec python3 /targets/tree.py {folder} {' '.join(features)}"
    return ["sh", "-c", script]


def stem(box: Box) -> int:
    """The number on this host of the root of the box's tree."""
    if not holding.is_hold(box.pid):
        return box.pid
    (child,) = proc.children(box.pid)
    return child


def tables(box: Box) -> str:
    """The packet filter of the box."""
    done = subprocess.run(
        ["nsenter", "--target", str(box.pid), "--net", "nft", "list", "ruleset"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@contextlib.contextmanager
def boxes_in(folder: Path) -> Iterator[Boxes]:
    found = Boxes(folder)
    try:
        yield found
    finally:
        found.close()
