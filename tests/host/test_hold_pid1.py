"""hold as the first process of a container: what a workload below it cannot tell from an ordinary
start, what outsiders can tell, and how a placeholder comes to follow a restored root.
"""

from __future__ import annotations

import itertools
import os
import pty
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.host import proc
from tests.host.pid1 import Container, Guest, build, sigqueue, title, until

PYTHON = (sys.executable, "-SEc")
# All but what ends or stops for certain, what hold reaps by, and the C library's own 32 and 33.
FORWARDED = [n for n in range(1, 65) if n not in (signal.SIGKILL, signal.SIGSTOP, 17, 32, 33)]


@pytest.fixture(scope="session")
def binary() -> Iterator[Path]:
    # Not below pytest's own directory, which other users may not enter.
    with tempfile.TemporaryDirectory(prefix="hold-") as folder:
        os.chmod(folder, 0o755)
        yield build(Path(folder))


@pytest.fixture
def start(binary: Path) -> Iterator[Callable[..., Container]]:
    started: list[Container] = []

    def begin(*args: str, **options: object) -> Container:
        started.append(Container(binary, *args, **options))  # type: ignore[arg-type]
        return started[-1]

    yield begin
    for container in started:
        container.close()


Start = Callable[..., Container]


def python(code: str) -> tuple[str, ...]:
    return ("run", *PYTHON, code)


# --- the workload ---


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_ends_with_the_workloads_status(start: Start, status: int) -> None:
    assert start("run", "sh", "-c", f"exit {status}").ended() == status


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGHUP])
def test_ends_as_a_shell_says_when_a_signal_ended_the_workload(start: Start, number: int) -> None:
    code = f"import os, resource; resource.setrlimit(4, (0, 0)); os.kill(os.getpid(), {number})"
    assert start(*python(code)).ended() == 128 + number


def test_a_command_that_is_not_there_is_127_with_its_name(start: Start) -> None:
    container = start("run", "/nonexistent/program")
    assert container.ended() == 127
    assert container.stderr() == "hold: /nonexistent/program: No such file or directory\n"


def test_a_command_that_cannot_be_run_is_126(start: Start, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    container = start("run", str(tmp_path / "text"))
    assert container.ended() == 126
    assert str(tmp_path / "text") in container.stderr()


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("run",),
        ("auto",),
        ("wait", "x"),
        ("install",),
        ("install", "a", "b"),
        ("go",),
        ("hook",),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(binary: Path, args: tuple[str, ...]) -> None:
    done = subprocess.run([str(binary), *args], capture_output=True, check=False)
    assert done.returncode == 64
    assert done.stderr.startswith(b"usage: hold ")


def test_every_signal_arrives_at_the_workload_exactly_once(start: Start) -> None:
    container = start(
        *python(
            "import os, signal, time\n"
            f"for n in {[int(n) for n in FORWARDED]}:\n"
            "    signal.signal(n, lambda n, _: os.write(1, b'%d\\n' % n))\n"
            "os.write(1, b'ready\\n')\n"
            "while True: time.sleep(9)"
        )
    )
    assert container.line() == "ready"
    for number in FORWARDED:
        os.kill(container.pid, number)
        assert container.line() == str(int(number))


def test_sigterm_that_comes_at_once_is_not_lost(start: Start) -> None:
    for _ in range(20):
        container = start("run", "sleep", "1000")
        os.kill(container.pid, signal.SIGTERM)
        assert container.ended() == 128 + signal.SIGTERM


@pytest.mark.parametrize("ignored", [(), (signal.SIGCHLD,), (signal.SIGPIPE, signal.SIGHUP)])
@pytest.mark.parametrize("blocked", [(), (signal.SIGUSR1, 64)])
def test_the_workloads_signal_state_is_the_one_hold_was_given(
    binary: Path, ignored: tuple[int, ...], blocked: tuple[int, ...]
) -> None:
    def prepare() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def state(*under: str) -> bytes:
        done = subprocess.run(
            [*under, "grep", "-E", "^Sig(Blk|Ign|Cgt)|^Cap|^NoNew|^Seccomp:", "/proc/self/status"],
            preexec_fn=prepare,
            stdout=subprocess.PIPE,
            check=True,
        )
        return done.stdout

    assert state(str(binary), "run") == state()


def test_only_the_workload_has_more_than_the_three_descriptors(start: Start) -> None:
    read, write = os.pipe()
    container = start(*python("import time; time.sleep(1000)"), pass_fds=(read,))
    os.close(read)
    os.close(write)
    stem = container.stem()
    until(lambda: bool(proc.children(stem)), "the workload stands")
    (workload,) = proc.children(stem)
    until(lambda: len(os.listdir(f"/proc/{stem}/fd")) == 3, "the stem closed what is not its own")
    until(lambda: len(os.listdir(f"/proc/{container.pid}/fd")) == 3, "hold too")
    assert sorted(os.listdir(f"/proc/{container.pid}/fd")) == ["0", "1", "2"]
    assert str(read) in os.listdir(f"/proc/{workload}/fd")


def test_arguments_arrive_as_they_are(binary: Path) -> None:
    code = "import sys, hashlib; print(hashlib.md5(repr(sys.argv).encode()).hexdigest())"
    args = [*PYTHON, code, "", "a b", "\u00e4\n", *["x" * 100_000] * 10]
    outputs = [
        subprocess.run([*under, *args], stdout=subprocess.PIPE, check=True).stdout
        for under in ([], [str(binary), "run"])
    ]
    assert outputs[0] == outputs[1]


def test_the_environment_arrives_without_what_was_meant_for_hold(binary: Path) -> None:
    code = "import os; print(sorted(os.environ.items()))"
    own = {"CKPT_AGENT_RESTORE": "", "CKPT_AGENT_CONTAINER": "main"}
    outputs = [
        subprocess.run(
            [*under, *PYTHON, code],
            stdout=subprocess.PIPE,
            check=True,
            env={**os.environ, "OTHER": "x", **extra},
        ).stdout
        for under, extra in (([], {}), ([str(binary), "auto"], own))
    ]
    assert outputs[0] == outputs[1]


def test_the_workload_leads_a_session_and_group_of_its_own(start: Start) -> None:
    container = start("run", "sleep", "1000")
    stem = container.stem()
    until(lambda: len(proc.children(stem)) == 1, "the workload stands")
    (workload,) = proc.children(stem)
    until(lambda: proc.stat(workload).session == workload, "its session")
    assert proc.stat(workload).pgid == workload
    assert proc.stat(stem).session == stem


def test_a_terminal_is_the_workloads_and_ctrl_c_reaches_it(binary: Path) -> None:
    ours, theirs = pty.openpty()
    code = (
        "import os, signal\n"
        "def told(n, _): os.write(1, b'interrupted'); os._exit(5)\n"
        "signal.signal(signal.SIGINT, told)\n"
        "fd = os.open('/dev/tty', os.O_RDWR)\n"
        "os.write(1, b'%d\\n' % (os.tcgetpgrp(fd) == os.getpgrp()))\n"
        "while True: signal.pause()"
    )
    # As the runtime starts a container: leader of a session whose terminal this is.
    container = Container(
        "setsid", "--ctty", str(binary), *python(code), stdin=theirs, stdout=theirs
    )
    try:
        os.close(theirs)
        said = b""
        while not said.endswith(b"\n"):
            said += os.read(ours, 100)
        assert said == b"1\r\n"
        os.write(ours, b"\x03")
        said = b""
        while b"interrupted" not in said:
            said += os.read(ours, 100)
        assert container.ended() == 5
    finally:
        container.close()
        os.close(ours)


def test_neither_name_of_hold_is_mistaken_for_the_workload(start: Start) -> None:
    container = start(*python("import time; time.sleep(1000) # train.py"))
    stem = container.stem()
    until(lambda: title(stem) == "hold: stem", "the stem's title")
    assert container.title == f"hold: following {container.inner(stem)}"
    assert proc.stat(container.pid).comm == "hold"


# --- processes of which nobody else takes care ---


def test_what_the_workload_daemonizes_stays_in_the_tree_and_is_reaped(start: Start) -> None:
    container = start(
        *python(
            "import os, time\n"
            "r, w = os.pipe()\n"
            "for n in range(100):\n"
            "    if os.fork() == 0:\n"
            "        os.setsid()\n"
            "        if os.fork() == 0:\n"
            "            os.close(w); os.read(r, 1); os._exit(0)\n"
            "        os._exit(0)\n"
            "    os.wait()\n"
            "os.close(r)\n"
            "print('ready', flush=True); os.read(0, 1); os.close(w); time.sleep(1000)"
        ),
        stdin=subprocess.PIPE,
    )
    assert container.line() == "ready"
    stem = container.stem()
    assert len(proc.children(stem)) == 101
    assert proc.children(container.pid) == [stem]
    assert container.popen.stdin is not None
    container.popen.stdin.close()
    until(lambda: len(proc.children(stem)) == 1, "the orphans' ends are reaped")
    assert len(container.pids()) == 3


def test_orphans_of_an_exec_are_reaped_and_end_nothing(start: Start) -> None:
    container = start("run", "sleep", "1000")
    stem = container.stem()
    for status in (0, 3, -signal.SIGKILL):
        guest = Guest(container)
        guest.given()
        assert container.outer(guest.inner) in proc.children(container.pid)
        guest.end(status)
        until(lambda: proc.children(container.pid) == [stem], "it is reaped")
    assert container.popen.poll() is None


def test_a_killed_stem_ends_the_container(start: Start) -> None:
    container = start("run", "sleep", "1000")
    os.kill(container.stem(), signal.SIGKILL)
    assert container.ended() == 128 + signal.SIGKILL


def test_out_of_memory_is_a_kill(start: Start) -> None:
    with open("/proc/self/cgroup") as stream:
        groups = dict(line.strip().split(":", 2)[1:] for line in stream)
    v1 = "memory" in groups
    if v1:
        parent = Path("/sys/fs/cgroup/memory" + groups["memory"])
        limit = {"memory.limit_in_bytes": "40M"}
    else:
        parent = Path("/sys/fs/cgroup")  # the root: only there may processes and controllers meet
        limit = {"memory.max": "40M", "memory.swap.max": "0"}
    group = parent / f"ckpt-agent-test-hold-{os.getpid()}"
    group.mkdir()
    try:
        for name, value in limit.items():
            (group / name).write_text(value)
        container = start(
            *python("x = [bytearray(b'x' * (1 << 20)) for _ in range(400)]"),
            before=f"echo $$ > {group}/cgroup.procs; echo 0 > {group}/cgroup.procs",
        )
        assert container.ended() == 137
    finally:
        until(lambda: not (group / "cgroup.procs").read_text(), "the group is empty")
        group.rmdir()


def test_outside_of_pid_1_it_adopts_what_its_tree_loses(binary: Path) -> None:
    code = "import os, time\nif os.fork(): os._exit(9)\ntime.sleep(0.2)"
    done = subprocess.run([str(binary), "run", *PYTHON, code], check=False, timeout=20)
    assert done.returncode == 9


# --- a placeholder ---


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, 37],
)
def test_a_placeholder_ends_at_once(start: Start, number: int) -> None:
    container = start("wait")
    assert container.waits()
    assert proc.children(container.pid) == []
    os.kill(container.pid, number)
    assert container.ended() == 128 + number


def test_a_placeholder_waits_on_at_what_ends_nobody(start: Start) -> None:
    container = start("wait")
    for number in (signal.SIGCONT, signal.SIGCHLD, signal.SIGWINCH, signal.SIGTSTP, signal.SIGUSR2):
        os.kill(container.pid, number)
    guest = Guest(container)
    guest.given()
    assert container.waits()
    guest.end(4)
    until(lambda: proc.children(container.pid) == [], "an orphan is reaped")
    assert container.waits()


def named(container: Container, **options: object) -> Guest:
    guest = Guest(container, **options)  # type: ignore[arg-type]
    guest.given()
    sigqueue(container.pid, signal.SIGUSR2, guest.inner)
    until(lambda: container.title == f"hold: following {guest.inner}", "it is followed")
    return guest


@pytest.mark.parametrize("status", [0, 1, 42, 127, -signal.SIGKILL, -signal.SIGTERM])
def test_a_restored_root_is_followed_to_its_end(start: Start, status: int) -> None:
    container = start("wait")
    guest = named(container)
    guest.end(status)
    assert container.ended() == (status if status >= 0 else 128 - status)


def test_signals_go_on_to_a_restored_root(start: Start) -> None:
    container = start("wait")
    named(container, signals=[signal.SIGTERM])
    os.kill(container.pid, signal.SIGTERM)
    assert container.ended() == 100 + signal.SIGTERM


def test_a_root_named_before_it_is_ours_is_followed_once_it_is(start: Start) -> None:
    container = start("wait")
    guest = Guest(container)
    sigqueue(container.pid, signal.SIGUSR2, guest.inner)
    container.run(lambda: None)
    assert container.waits()
    guest.given()
    until(lambda: container.title == f"hold: following {guest.inner}", "it is followed")
    guest.end(6)
    assert container.ended() == 6


def test_a_root_that_died_before_it_was_named_still_gives_its_status(start: Start) -> None:
    container = start("wait")
    guest = Guest(container)
    guest.given()
    guest.end(13)
    until(lambda: proc.children(container.pid) == [], "it is reaped")
    for _ in range(100):  # others that end meanwhile do not push it out
        Guest(container, body=lambda: None).reaped_outside()
    sigqueue(container.pid, signal.SIGUSR2, guest.inner)
    assert container.ended() == 13


def test_the_number_of_an_earlier_attempt_is_not_mistaken_for_the_root(start: Start) -> None:
    container = start("wait")
    container.set_last_pid(500)
    first = Guest(container)
    first.given()
    first.end(99)
    until(lambda: proc.children(container.pid) == [], "the first attempt is reaped")
    container.set_last_pid(500)
    second = Guest(container)
    assert second.inner == first.inner
    sigqueue(container.pid, signal.SIGUSR2, second.inner)  # still CRIU's
    container.run(lambda: None)
    assert container.waits()
    second.given()
    second.end(8)
    assert container.ended() == 8


def test_the_newest_of_two_dead_of_one_number_counts(start: Start) -> None:
    container = start("wait")
    for status in (99, 8):
        container.set_last_pid(500)
        guest = Guest(container)
        guest.given()
        guest.end(status)
        until(lambda: proc.children(container.pid) == [], "it is reaped")
    sigqueue(container.pid, signal.SIGUSR2, guest.inner)
    assert container.ended() == 8


@pytest.mark.parametrize("value", [0, 1, -1, 2, 31000])
def test_a_number_of_nobody_is_ignored(start: Start, value: int) -> None:
    container = start("wait")
    sigqueue(container.pid, signal.SIGUSR2, value & 0xFFFFFFFF)
    container.run(lambda: None)
    assert container.waits()
    named(container).end(3)
    assert container.ended() == 3


def test_a_process_that_is_not_ours_gets_no_signals(start: Start) -> None:
    container = start("wait")
    stranger = Guest(container, signals=[signal.SIGTERM])
    sigqueue(container.pid, signal.SIGUSR2, stranger.inner)
    os.kill(container.pid, signal.SIGTERM)
    assert container.ended() == 128 + signal.SIGTERM


def test_the_last_name_counts_until_one_is_ours(start: Start) -> None:
    container = start("wait")
    stranger = Guest(container)
    sigqueue(container.pid, signal.SIGUSR2, stranger.inner)
    guest = named(container)
    other = Guest(container)
    other.given()
    sigqueue(container.pid, signal.SIGUSR2, other.inner)
    other.end(7)
    until(lambda: len(proc.children(container.pid)) == 1, "the other is reaped")
    assert container.title == f"hold: following {guest.inner}"
    guest.end(5)
    assert container.ended() == 5


def test_a_name_from_inside_the_container_is_refused(start: Start) -> None:
    container = start("wait")
    guest = Guest(container)
    guest.given()
    inner = guest.inner
    container.run(lambda: sigqueue(1, signal.SIGUSR2, inner))
    container.run(lambda: None)
    assert container.waits()
    guest.end(1)
    until(lambda: proc.children(container.pid) == [], "it is reaped")
    assert container.waits()


def test_a_name_never_reaches_a_workload_that_runs(start: Start) -> None:
    container = start("run", "sleep", "1000")  # which SIGUSR2 would end
    stem = container.stem()
    for _ in range(20):
        sigqueue(container.pid, signal.SIGUSR2, 77)
        sigqueue(container.pid, signal.SIGUSR2, container.inner(stem))
    guest = Guest(container)
    guest.given()
    guest.end(0)
    until(lambda: proc.children(container.pid) == [stem], "hold looked at its signals")
    assert container.popen.poll() is None
    assert container.title == f"hold: following {container.inner(stem)}"


@pytest.mark.slow
def test_named_and_dead_in_any_order_gives_the_status(start: Start) -> None:
    orders = list(itertools.permutations(range(3)))
    for turn in range(60):
        container = start("wait")
        guest = Guest(container)
        status = turn % 128
        acts: list[Callable[[], None]] = [
            guest.let_go,
            lambda g=guest, s=status: g.end(s),  # type: ignore[misc]
            lambda c=container, g=guest: sigqueue(c.pid, signal.SIGUSR2, g.inner),  # type: ignore[misc]
        ]
        for act in orders[turn % len(orders)]:
            acts[act]()
        assert container.ended() == status, orders[turn % len(orders)]
        assert guest.reaped_outside() == 0
        container.close()


# --- a tree that is stored and then killed ---


def stopping(container: Container) -> int:
    """The stem's number inside, of a container told that it may be killed."""
    stem = container.inner(container.stem())
    sigqueue(container.pid, signal.SIGUSR2, -stem & 0xFFFFFFFF)
    until(lambda: container.title == f"hold: stopping {stem}", "hold is told")
    return stem


def test_a_stopped_tree_leaves_a_placeholder_not_the_containers_end(start: Start) -> None:
    container = start("run", "sleep", "1000")
    until(lambda: bool(proc.children(container.stem())), "the workload is there")
    os.kill(container.outer(stopping(container)), signal.SIGKILL)
    until(container.waits, "it waits")
    (orphan,) = proc.children(container.pid)  # CRIU kills the whole tree; here the workload is left
    os.kill(orphan, signal.SIGKILL)
    until(lambda: proc.children(container.pid) == [], "it is reaped")
    named(container).end(9)
    assert container.ended() == 9


def test_a_stopped_containers_pod_is_deleted_at_once(start: Start) -> None:
    container = start("run", "sleep", "1000")
    os.kill(container.outer(stopping(container)), signal.SIGKILL)
    until(container.waits, "it waits")
    os.kill(container.pid, signal.SIGTERM)
    assert container.ended() == 128 + signal.SIGTERM


def test_a_tree_that_was_not_killed_after_all_still_ends_the_container(start: Start) -> None:
    container = start("run", "sh", "-c", "read x; exit 7", stdin=subprocess.PIPE)
    stopping(container)
    assert container.popen.stdin is not None
    container.popen.stdin.close()
    assert container.ended() == 7


def test_signals_go_on_while_a_tree_may_be_killed(start: Start) -> None:
    container = start("run", "sleep", "1000")
    stopping(container)
    os.kill(container.pid, signal.SIGTERM)
    assert container.ended() == 128 + signal.SIGTERM


def test_naming_the_stem_again_takes_the_stop_back(start: Start) -> None:
    container = start("run", "sleep", "1000")
    stem = stopping(container)
    sigqueue(container.pid, signal.SIGUSR2, stem)
    until(lambda: container.title == f"hold: following {stem}", "it is taken back")
    os.kill(container.outer(stem), signal.SIGKILL)
    assert container.ended() == 128 + signal.SIGKILL


def test_only_its_own_stem_can_be_stopped_and_only_from_outside(start: Start) -> None:
    container = start("run", "sleep", "1000")
    stem = container.inner(container.stem())
    sigqueue(container.pid, signal.SIGUSR2, -(stem + 1) & 0xFFFFFFFF)
    before = container.title
    guest = Guest(container)
    guest.given()
    guest.end(0)
    until(lambda: len(proc.children(container.pid)) == 1, "hold looked at its signals")
    assert container.title == before == f"hold: following {stem}"
    # From inside it is an ordinary signal, for the workload; the sender may end with its container.
    Guest(container, body=lambda: sigqueue(1, signal.SIGUSR2, -stem & 0xFFFFFFFF)).reaped_outside()
    assert container.ended() == 128 + signal.SIGUSR2


# --- auto: the same command for the first start, the placeholder, and a restart after a restore ---


class Pod:
    """A container whose volume survives its restarts; the host's files are below it, read only in
    effect: what it writes goes to an upper directory.
    """

    def __init__(self, start: Start, binary: Path, folder: Path) -> None:
        self._start = start
        self.binary = binary
        self.volume = folder / "upper/.ckpt-agent"
        self.volume.mkdir(parents=True)
        for name in ("work", "root"):
            (folder / name).mkdir()
        self._root = folder / "root"
        self._before = (
            f"mount -t overlay overlay -o lowerdir=/,upperdir={folder}/upper,workdir={folder}/work"
            f" {folder}/root; mount --rbind /dev {folder}/root/dev"
        )

    def container(self, restore: str | None, name: str | None = "main") -> Container:
        environment = {}
        if restore is not None:
            environment["CKPT_AGENT_RESTORE"] = restore
        if name is not None:
            environment["CKPT_AGENT_CONTAINER"] = name
        return self._start(
            "auto",
            "sh",
            "-c",
            "echo started; exec sleep 1000",
            before=self._before,
            root=self._root,
            environment=environment,
        )


@pytest.fixture
def pod(start: Start, binary: Path, tmp_path: Path) -> Pod:
    return Pod(start, binary, tmp_path)


@pytest.mark.parametrize("restore", [None, ""])
def test_auto_without_an_image_to_wait_for_runs(pod: Pod, restore: str | None) -> None:
    assert pod.container(restore).line() == "started"
    assert list(pod.volume.iterdir()) == []


def test_auto_with_an_image_waits_and_after_the_restore_restarts_ordinarily(pod: Pod) -> None:
    placeholder = pod.container("job@7")
    assert placeholder.waits()
    assert list(pod.volume.iterdir()) == []
    named(placeholder).end(3)
    assert placeholder.ended() == 3
    assert [path.name for path in pod.volume.iterdir()] == ["restored-main"]
    assert pod.container("job@7").line() == "started"
    assert pod.container("job@7", "sidecar").waits()


def test_auto_waits_again_if_nothing_was_restored(pod: Pod) -> None:
    first = pod.container("job@7")
    guest = Guest(first)
    guest.given()
    guest.end(1)  # a restore that failed, and was never named
    os.kill(first.pid, signal.SIGTERM)
    assert first.ended() == 143
    assert pod.container("job@7").waits()


def test_a_root_that_dies_at_once_also_leaves_the_stamp(pod: Pod) -> None:
    for order in itertools.permutations(range(3)):
        container = pod.container("job@7")
        assert container.waits()
        guest = Guest(container)
        acts: list[Callable[[], None]] = [
            guest.let_go,
            lambda g=guest: g.end(2),  # type: ignore[misc]
            lambda c=container, g=guest: sigqueue(c.pid, signal.SIGUSR2, g.inner),  # type: ignore[misc]
        ]
        for act in order:
            acts[act]()
        assert container.ended() == 2
        (pod.volume / "restored-main").unlink()


@pytest.mark.parametrize("name", [None, "x" * 5000])
def test_auto_waits_where_it_cannot_tell(pod: Pod, name: str | None) -> None:
    assert pod.container("job@7", name).waits()


def test_a_link_in_place_of_the_stamp_is_not_followed(pod: Pod, tmp_path: Path) -> None:
    (pod.volume / "restored-main").symlink_to(tmp_path / "elsewhere")
    placeholder = pod.container("job@7")
    assert placeholder.waits()
    named(placeholder).end(0)
    assert placeholder.ended() == 0
    assert not (tmp_path / "elsewhere").exists()


# --- hooks and probes of a container ---


def status_inside(container: Container, *command: str) -> int:
    """The exit status of a program that was started into the container from outside."""
    return Guest(container, body=lambda: os.execv(command[0], command)).reaped_outside()


def test_hooks_run_where_a_workload_runs(start: Start, binary: Path, tmp_path: Path) -> None:
    container = start("run", "sleep", "1000")
    script = f"env > {tmp_path}/environment; exit 3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_AGENT_RESTORE", "job@7")
        patch.setenv("OTHER", "kept")
        assert status_inside(container, str(binary), "hook", "/bin/sh", "-c", script) == 3
    said = (tmp_path / "environment").read_text()
    assert "CKPT_AGENT" not in said
    assert "OTHER=kept" in said
    assert status_inside(container, str(binary), "running") == 0
    assert status_inside(container, str(binary), "hook", "/nonexistent") == 127


def test_hooks_do_nothing_in_a_placeholder_until_it_has_a_workload(
    start: Start, binary: Path, tmp_path: Path
) -> None:
    container = start("wait")
    touch = (str(binary), "hook", "/bin/touch", str(tmp_path / "ran"))
    assert status_inside(container, *touch) == 0
    assert status_inside(container, str(binary), "running") == 1
    assert not (tmp_path / "ran").exists()
    guest = named(container)
    assert status_inside(container, str(binary), "running") == 0
    assert status_inside(container, *touch) == 0
    assert (tmp_path / "ran").exists()
    guest.end(0)


def test_hooks_do_nothing_where_the_workload_was_stored_and_stopped(
    start: Start, binary: Path
) -> None:
    container = start("run", "sleep", "1000")
    stem = container.stem()
    sigqueue(container.pid, signal.SIGUSR2, -container.inner(stem))
    until(lambda: container.title.startswith("hold: stopping"), "hold lets it stop")
    assert status_inside(container, str(binary), "hook", "/bin/false") == 1
    os.kill(stem, signal.SIGKILL)
    until(container.waits, "hold waits")
    assert status_inside(container, str(binary), "hook", "/bin/false") == 0


def test_a_hook_that_comes_before_hold_has_chosen_waits_for_it(
    start: Start, binary: Path, tmp_path: Path
) -> None:
    """A container's postStart begins together with its first process."""
    before = f"echo early; while ! test -e {tmp_path}/go; do sleep 0.01; done"
    container = start("run", "sleep", "1000", before=before, wait=False)
    assert container.line() == "early"
    hook = Guest(container, body=lambda: os.execv(binary, [str(binary), "hook", "/bin/true"]))
    (tmp_path / "go").touch()
    assert hook.reaped_outside() == 0


# --- install ---


def installed(binary: Path, folder: Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [str(binary), "install", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_install_copies_the_program_with_its_time(binary: Path, tmp_path: Path) -> None:
    assert installed(binary, tmp_path, umask=0o077).returncode == 0
    copy = tmp_path / "hold"
    assert copy.read_bytes() == binary.read_bytes()
    assert copy.stat().st_mtime_ns == binary.stat().st_mtime_ns
    assert stat.S_IMODE(copy.stat().st_mode) == 0o755
    assert os.listdir(tmp_path) == ["hold"]


def test_install_replaces_a_program_that_runs(binary: Path, tmp_path: Path) -> None:
    assert installed(binary, tmp_path).returncode == 0
    with subprocess.Popen([str(tmp_path / "hold"), "run", "sleep", "1000"]) as running:
        try:
            # Before it takes signals for its workload, one would end it as any program.
            until(lambda: title(running.pid).startswith("hold:"), "it is hold")
            assert installed(binary, tmp_path).returncode == 0
        finally:
            running.terminate()
    assert running.returncode == 143


def test_install_works_for_any_user_into_a_directory_open_to_all(binary: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        done = installed(binary, Path(folder), user=65534, group=65534, extra_groups=[])
        assert (done.returncode, done.stderr) == (0, "")
        assert stat.S_IMODE((Path(folder) / "hold").stat().st_mode) == 0o755


def test_install_needs_no_other_writable_directory(start: Start, tmp_path: Path) -> None:
    container = start(
        "install",
        str(tmp_path),
        before=f"mount -t tmpfs tmpfs {tmp_path}; mount -o remount,bind,ro /",
    )
    assert (container.ended(), container.stderr()) == (0, "")


def test_an_installation_that_fails_leaves_nothing_and_says_so(
    binary: Path, tmp_path: Path
) -> None:
    script = (
        f"mount -t tmpfs -o size=16k tmpfs {tmp_path}; {binary} install {tmp_path}; echo $?;"
        f" ls -A {tmp_path}"
    )
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
    assert done.stderr == f"hold: {tmp_path}/hold: No space left on device\n"
    gone = installed(binary, tmp_path / "missing")
    assert gone.returncode == 1
    assert "No such file or directory" in gone.stderr


# --- the binary ---


def test_the_binary_needs_nothing_and_is_the_same_each_time(binary: Path, tmp_path: Path) -> None:
    again = build(tmp_path)
    assert again.read_bytes() == binary.read_bytes()
    assert again.stat().st_mtime_ns == binary.stat().st_mtime_ns
    assert binary.stat().st_size < 100_000
    headers = subprocess.run(
        ["readelf", "-lW", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in headers
    assert "DYNAMIC" not in headers
