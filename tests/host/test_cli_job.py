"""The installed program on a real job: dump, list, show, verify, kill, restore, prune, delete."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Counts to standard output until told to end by a file; exits with 7.
_JOB = """
import os, sys, time
memory = bytearray(b"y" * (16 << 20))
held = open(sys.argv[1] + "/held", "a")
for number in range(10**9):
    with open(sys.argv[1] + "/count.new", "w") as file:
        file.write(str(number))
    os.rename(sys.argv[1] + "/count.new", sys.argv[1] + "/count")
    if os.path.exists(sys.argv[1] + "/end"):
        print("last", number, flush=True)
        sys.exit(7)
    time.sleep(0.01)
"""
_DEADLINE_S = 60.0


class Cli:
    """Runs ``ckpt-agent`` on a store of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.program = os.path.join(os.path.dirname(sys.executable), "ckpt-agent")
        self.common = ["--store", str(folder / "store"), "--work-dir", str(folder / "work")]

    def command(self, *arguments: str) -> list[str]:
        return [self.program, *self.common, *arguments]

    def run(self, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            self.command(*arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
        )
        assert ran.returncode == status, ran.stdout + ran.stderr
        return ran

    def document(self, *arguments: str, status: int = 0) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(
            self.run(*arguments, "-o", "json", status=status).stdout
        )
        return document


class Job:
    """A program that counts; ``pid`` is its root here."""

    def __init__(self, folder: pathlib.Path, pid: int) -> None:
        self.folder, self.pid = folder, pid

    def count(self) -> int:
        return int((self.folder / "count").read_text())

    def counts_on(self) -> bool:
        before = self.count()
        return until(lambda: self.count() > before)

    def end(self) -> None:
        (self.folder / "end").touch()


def until(predicate: Callable[[], bool]) -> bool:
    limit_s = time.monotonic() + _DEADLINE_S
    while time.monotonic() < limit_s:
        if predicate():
            return True
        time.sleep(0.01)
    return False


def alive(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@pytest.fixture
def cli(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    for name in [name for name in os.environ if name.startswith("CKPT_AGENT_")]:
        monkeypatch.delenv(name)
    return Cli(tmp_path)


@contextlib.contextmanager
def started(script: str, tmp_path: pathlib.Path) -> Iterator[Job]:
    """A Python program that has counted to FOLDER/count, FOLDER being its argument."""
    folder = tmp_path / "job"
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        assert until((folder / "count").exists)
        yield Job(folder, process.pid)
        process.kill()
        process.wait()
        # A restored tree has the same number but is nobody's child here; so may anybody else.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if bytes(folder) in pathlib.Path(f"/proc/{process.pid}/cmdline").read_bytes():
                os.kill(process.pid, signal.SIGKILL)
                assert until(lambda: not alive(process.pid))


@pytest.fixture
def job(tmp_path: pathlib.Path) -> Iterator[Job]:
    with started(_JOB, tmp_path) as made:
        yield made


def kill(job: Job) -> None:
    os.kill(job.pid, signal.SIGKILL)
    os.waitpid(job.pid, 0)


def test_a_job_is_dumped_killed_and_restored_and_ends_as_if_nothing_had_been(
    cli: Cli, job: Job, tmp_path: pathlib.Path
) -> None:
    first = cli.run("dump", "--pid", str(job.pid), "--name", "count").stdout.strip()
    assert job.counts_on()
    report = cli.document("dump", "--pid", str(job.pid), "--name", "count")
    assert report["rawBytes"] > 16 << 20
    assert report["newBytes"] < report["rawBytes"] / 4
    assert cli.run("list", "-o", "name").stdout.split() == [first, report["name"]]
    assert cli.document("verify", "--all")["good"]
    kill(job)
    before = job.count()
    job.end()
    log = tmp_path / "log"
    ended = cli.document("restore", report["name"], "--wait", "--stdout", str(log), status=7)
    assert ended["members"] == [{"name": "tree-0", "pid": job.pid, "exitStatus": 7}]
    last = log.read_text().split()
    assert last[0] == "last"
    assert int(last[1]) <= before + 1


def test_show_tells_of_the_real_job(cli: Cli, job: Job) -> None:
    image = cli.run("dump", "--pid", str(job.pid)).stdout.strip()
    (member,) = cli.document("show", image)["detail"]
    (process,) = member["processes"]
    assert process["pid"] == job.pid
    assert process["memoryBytes"] > 16 << 20
    assert member["stop"]["path"] == "precopy"
    assert not member["stop"]["hurried"]
    assert {"path": str(job.folder / "held"), "kind": "file", "bytes": 0, "travels": True} in (
        member["files"]
    )


def test_the_plan_estimates_what_the_dump_then_captures(cli: Cli, job: Job) -> None:
    plan = cli.document("plan", "--pid", str(job.pid))
    assert plan["feasible"]
    report = cli.document("dump", "--pid", str(job.pid))
    assert 0.5 < plan["estimate"]["rawBytes"] / report["rawBytes"] < 2


def test_stop_ends_the_job_after_the_commit(cli: Cli, job: Job) -> None:
    image = cli.run("dump", "--pid", str(job.pid), "--stop").stdout.strip()
    assert until(lambda: not alive(job.pid))
    assert cli.document("verify", image)["good"]


def test_prune_and_delete_leave_a_store_from_which_the_rest_restores(cli: Cli, job: Job) -> None:
    made = [
        cli.run("dump", "--pid", str(job.pid), "--name", "count").stdout.strip() for _ in range(3)
    ]
    cli.run("delete", made[1])
    cli.run("prune", "--keep-last", "1")
    assert cli.run("list", "-o", "name").stdout.split() == [made[2]]
    kill(job)
    cli.run("restore", "count")
    assert alive(job.pid)
    assert job.counts_on()


def test_a_restore_beside_the_running_job_is_refused_and_an_isolated_one_is_not(
    cli: Cli, job: Job
) -> None:
    cli.run("dump", "--pid", str(job.pid), "--name", "count")
    refused = cli.run("restore", "count", "-o", "json", status=3)
    assert refused.stdout == ""
    error = json.loads(refused.stderr)
    assert error["code"] == "restore-conflict"
    assert any(str(job.pid) in reason for reason in error["facts"]["reasons"])
    assert job.counts_on()
    kill(job)
    job.end()
    ended = cli.document("restore", "count", "--isolate", "--wait", status=7)
    assert ended["isolated"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_dump_leaves_the_job_running_and_no_image(
    cli: Cli, job: Job, number: signal.Signals
) -> None:
    def state(pid: int) -> str:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0]

    for _ in range(30):
        with subprocess.Popen(
            cli.command("dump", "--pid", str(job.pid), "--name", "count"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as dump:
            # The job stands still while its memory is read: a good moment to interrupt. What this
            # test sees is so only as long as the dump stands still as well.
            held = False
            while not held and dump.poll() is None:
                if state(job.pid) in "tT":
                    dump.send_signal(signal.SIGSTOP)
                    assert until(lambda dump=dump: state(dump.pid) in "TZ")  # type: ignore[misc]
                    held = state(job.pid) in "tT"
                    if held:
                        dump.send_signal(number)
                    dump.send_signal(signal.SIGCONT)
                time.sleep(0.001)
            out, err = dump.communicate(timeout=_DEADLINE_S)
        if held:
            break
        # On a busy machine it may be through before anybody looks.
        cli.run("delete", out.strip())
    assert (dump.returncode, out) == (130, ""), err
    assert "the job goes on" in err
    assert job.counts_on()
    cli.run("show", "count", status=3)
    assert cli.run("dump", "--pid", str(job.pid), "--name", "count").stdout


def test_a_dump_that_fills_the_local_disk_is_given_up_either_way_and_the_job_goes_on(
    cli: Cli, job: Job, tmp_path: pathlib.Path
) -> None:
    """CRIU writes its description of the job when that stands still; this one finds no room."""
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "tmpfs", work], check=True)
    try:
        failed = cli.run("dump", "--pid", str(job.pid), "--name", "count", status=4)
        assert "the plain way is taken" in failed.stderr
        assert "No space left on device" in failed.stderr
        assert "free space in the work directory" in failed.stderr
        assert job.counts_on()
        assert cli.document("list")["items"] == []
    finally:
        subprocess.run(["umount", work], check=True)
    cli.run("dump", "--pid", str(job.pid), "--name", "count")
    assert cli.document("verify", "--all")["good"]


@pytest.mark.parametrize("verb", ["plan", "dump"])
def test_a_job_cannot_plan_or_dump_itself_from_inside(cli: Cli, verb: str) -> None:
    inside = (
        "import os, subprocess, sys;"
        "sys.exit(subprocess.run([*sys.argv[1:], str(os.getpid())]).returncode)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", inside, *cli.command(verb, "--pid")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
    )
    assert ended.returncode == 3, ended.stderr
    assert "ancestor" in ended.stderr + ended.stdout or "runs below it" in ended.stdout


Watching = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def watching(cli: Cli, job: Job) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``watch`` of the job."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = cli.command("watch", "--pid", str(job.pid), "--name", "job", *arguments)
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return started[-1]

    yield start
    for each in started:
        each.kill()
        each.communicate()


def test_a_watched_job_comes_back_from_its_newest_image(
    cli: Cli, job: Job, watching: Watching
) -> None:
    done = watching("--every", "0.2s", "--count", "4", "--keep-last", "2")
    out, err = done.communicate(timeout=60)
    assert done.returncode == 0, err
    images = out.split()
    assert len(images) == 4
    assert cli.run("list", "-o", "name").stdout.split() == images[-2:]
    assert cli.document("verify", "--all")["good"]
    assert job.counts_on()
    last = job.count()
    os.kill(job.pid, signal.SIGKILL)
    os.waitpid(job.pid, 0)
    cli.run("restore", images[-1], "--files", "rollback")
    assert until(lambda: job.count() > last)


def test_a_watch_removes_nothing_that_it_was_not_told_to(
    cli: Cli, watching: Watching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration's rules are for prune, and one that keeps an image keeps it here too."""
    monkeypatch.setenv("CKPT_AGENT_KEEP_LAST", "1")
    first = watching("--every", "0.2s", "--count", "2")
    images = first.communicate(timeout=60)[0].split()
    assert cli.run("list", "-o", "name").stdout.split() == images
    monkeypatch.setenv("CKPT_AGENT_KEEP_WITHIN", "1d")
    second = watching("--every", "0.2s", "--count", "1", "--keep-last", "1")
    images += second.communicate(timeout=60)[0].split()
    assert cli.run("list", "-o", "name").stdout.split() == images


def test_a_watch_ends_with_its_job(cli: Cli, job: Job, watching: Watching) -> None:
    watch = watching("--every", "0.2s")
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("job@")
    os.kill(job.pid, signal.SIGKILL)
    os.waitpid(job.pid, 0)
    _, err = watch.communicate(timeout=60)
    assert watch.returncode == 0, err
    assert "the job has ended" in err


def test_a_watch_that_stands_still_is_ended(cli: Cli, job: Job, watching: Watching) -> None:
    """Whoever moves a mapping would wait for it."""
    watch = watching("--every", "100s")
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("job@")
    watch.send_signal(signal.SIGSTOP)
    assert watch.wait(60) == -signal.SIGKILL
    assert job.counts_on()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_job_of_a_watch_that_ends_goes_on(
    cli: Cli, job: Job, watching: Watching, number: int
) -> None:
    watch = watching("--every", "0.2s")
    assert watch.stdout is not None
    assert watch.stdout.readline().startswith("job@")
    watch.send_signal(number)
    watch.communicate(timeout=60)
    assert watch.returncode == (0 if number == signal.SIGINT else -signal.SIGKILL)
    assert job.counts_on()
    # Nothing of it is in the job's way, nor in the next dump's.
    assert pathlib.Path(f"/proc/{job.pid}/smaps").read_text().count("uw") == 0
    cli.run("dump", "--pid", str(job.pid), "--name", "job")
    assert job.counts_on()
