"""CRIU started inside a container's file system takes nothing from it, whatever is put there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pycriu import rpc_pb2 as rpc

from agent.engines.container import inside
from agent.engines.container.bundle import Bundle
from agent.host import clock, proc
from tests.host.pid1 import Container, build, until

SCRIPT = Path(__file__).parents[2] / "scripts/criu-bundle"


@pytest.fixture(scope="module")
def bundle() -> Iterator[Bundle]:
    # Not in /tmp, which the engine hides from CRIU while it asks what the kernel can do.
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        subprocess.run([str(SCRIPT), f"{folder}/bundle"], check=True)
        yield Bundle(f"{folder}/bundle")


# Everything that CRIU or its loader would take if it were let: each leaves a mark when it runs.
PROGRAMS = ("sh", "iptables", "ip6tables", "iptables-save", "ip", "tar", "nft", "evil-script")
LIBRARIES = ("usr/lib/criu/evil.so", "usr/lib/evil.so", "usr/lib64/criu/evil.so")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A root file system of somebody who knows that CRIU comes; ``marks`` in it tells what ran."""
    root = tmp_path / "root"
    for folder in ("bin", "usr/bin", "sbin", "usr/sbin", "etc/criu", "root/.criu", "run", "tmp"):
        (root / folder).mkdir(parents=True)
    for folder in ("proc", "dev", "marks", "usr/lib/criu", "usr/lib64/criu", "lib64"):
        (root / folder).mkdir(parents=True)
    build(tmp_path)  # also brings the compiler
    source = tmp_path / "mark.c"
    # Without headers and libraries, which a machine with a compiler need not have.
    source.write_text(
        "int open(const char *, int, ...), close(int), getpid(void);\n"
        "int snprintf(char *, unsigned long, const char *, ...);\n"
        'static void mark(void) { char p[64]; snprintf(p, 64, "/marks/%d", getpid());'
        f" close(open(p, {os.O_CREAT | os.O_WRONLY}, 0600)); }}\n"
        "#ifdef PROGRAM\nint main(void) { mark(); return 0; }\n"
        "#else\n__attribute__((constructor)) static void loaded(void) { mark(); }\n#endif\n"
    )
    program, library = tmp_path / "program", tmp_path / "library"
    subprocess.run(["musl-gcc", "-static", "-DPROGRAM", "-o", program, source], check=True)
    plain = ("-shared", "-fPIC", "-nostdlib", "-fno-stack-protector")
    subprocess.run(["gcc", *plain, "-o", library, source], check=True)
    for name in PROGRAMS:
        for folder in ("bin", "usr/bin", "sbin", "usr/sbin"):
            os.link(program, root / folder / name)
    for name in LIBRARIES:
        os.link(library, root / name)
    (root / "etc/ld.so.preload").write_text("/usr/lib/evil.so\n")
    for name in ("etc/criu/default.conf", "root/.criu/default.conf"):
        (root / name).write_text("action-script /bin/evil-script\nlibdir /usr/lib/criu\n")
    os.mknod(root / "dev/null", 0o20666, os.makedev(1, 3))
    return root


def marks(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "marks").iterdir())


Dump = Callable[[str], bool]


@pytest.fixture
def dump(bundle: Bundle, hostile: Path, tmp_path: Path) -> Iterator[Dump]:
    """Dumps a tree that runs in the hostile root, started by whatever a test says."""
    build(hostile / "bin")
    # No file of the host's: a pipe can be dumped from anywhere.
    pipe = subprocess.PIPE
    container = Container("/bin/hold", "run", "/bin/hold", "wait", root=hostile, stdin=pipe)
    init = proc.identity(container.pid)
    until(lambda: len(container.pids()) == 3, "the tree stands")

    def run(log: str) -> bool:
        images = tmp_path / log
        images.mkdir()
        with inside.worker(bundle, init, str(images), ()) as (worker, name):
            request = rpc.criu_req(type=rpc.DUMP)
            request.opts.images_dir_fd = -1
            request.opts.images_dir = name
            request.opts.log_file = "dump.log"
            request.opts.pid = container.inner(container.stem())
            request.opts.leave_running = True
            request.opts.network_lock = rpc.SKIP
            request.opts.manage_cgroups = True
            request.opts.manage_cgroups_mode = rpc.IGNORE
            response = worker.connection.request(request, None, clock.Deadline.after(60))
        if not response.success:
            print((images / "dump.log").read_text()[-2000:])
        return bool(response.success)

    yield run
    container.close()


def test_the_traps_work(hostile: Path) -> None:
    """What any program started in there would leave: otherwise the next test proves nothing."""
    closure = subprocess.run(
        ["ldd", "/bin/sh"], capture_output=True, text=True, check=True
    ).stdout  # any dynamic program: what matters is the loader and what it preloads
    for path in re.findall(r"(/\S+) \(0x", closure):
        (hostile / path.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, hostile / path.lstrip("/"))
    shutil.copy("/bin/sh", hostile / "bin/honest")
    subprocess.run(["chroot", str(hostile), "/bin/honest", "-c", "exit 0"], check=False)
    preloaded = marks(hostile)
    subprocess.run(["chroot", str(hostile), "iptables"], check=True)
    assert preloaded != []
    assert len(marks(hostile)) == len(preloaded) + 1


def test_nothing_of_the_container_runs(dump: Dump, hostile: Path) -> None:
    assert dump("first")
    assert marks(hostile) == []


def test_without_the_option_a_plugin_of_the_container_would_run(
    dump: Dump, hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Bundle.command
    monkeypatch.setattr(Bundle, "command", lambda self, fd: whole(self, fd)[:-2])
    dump("second")
    assert marks(hostile) != []


def test_the_bundle_is_whole_and_made_once(bundle: Bundle, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(bundle.path, copy, symlinks=True)
    assert Bundle(str(copy)).criu.version == bundle.criu.version
    before = os.stat(bundle.path).st_ino
    subprocess.run([str(SCRIPT), bundle.path], check=True)
    assert os.stat(bundle.path).st_ino == before
    (Path(bundle.path) / "made-from").write_text("something else")
    subprocess.run([str(SCRIPT), bundle.path], check=True)
    assert os.stat(bundle.path).st_ino != before
    assert not list(Path(bundle.path).parent.glob("*.new.*"))
