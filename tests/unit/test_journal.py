"""What operations leave on the host for their successors, without CRIU."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import errors
from agent.engines.criu import journal, recovery, supervisor
from agent.host import proc


@pytest.fixture
def places(tmp_path: Path) -> journal.Places:
    found = journal.Places(str(tmp_path / "run"), str(tmp_path / "work"))
    found.prepare()
    return found


def me() -> proc.Identity:
    return proc.identity(os.getpid())


def test_an_operation_is_in_the_journal_with_its_scratch_folder_while_it_runs(
    places: journal.Places,
) -> None:
    with places.operation("dump", [me()]) as operation:
        (entry,) = places.entries()
        assert entry == operation.entry
        assert entry.agent == me()
        assert os.stat(operation.scratch).st_mode & 0o777 == 0o700
        operation.note_criu(os.getpid())
        operation.note_tables_before({"b", "a"})
        operation.note_table("c")
        (entry,) = places.entries()
        assert (entry.criu, entry.tables_before, entry.table) == (me(), ("a", "b"), "c")
        (Path(operation.folder("images")) / "x").touch()
    assert places.entries() == []
    assert places.scratch_names() == []


def test_an_operation_that_raises_leaves_nothing(places: journal.Places) -> None:
    with pytest.raises(ValueError, match="x"), places.operation("dump", []):
        raise ValueError("x")
    assert places.entries() == []
    assert places.scratch_names() == []


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    """No file can take a byte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_there_is_no_room_it_is_told_and_nothing_stays(
    places: journal.Places, tmp_path: Path
) -> None:
    with no_room():
        with (
            pytest.raises(errors.EnvironmentUnfit, match="cannot write"),
            places.operation("x", []),
        ):
            pass
        with pytest.raises(errors.EnvironmentUnfit, match="cannot write"), places.locked([me()]):
            pass
    assert [*(tmp_path / "run").rglob("*")] == [*(tmp_path / "run").iterdir()]
    with places.locked([me()]):
        os.rmdir(tmp_path / "work")
        with (
            pytest.raises(errors.EnvironmentUnfit, match="cannot write"),
            places.operation("x", []),
        ):
            pass
    assert places.entries() == []


def test_a_torn_entry_is_passed_over(places: journal.Places, tmp_path: Path) -> None:
    (tmp_path / "run" / "ops" / "torn.json").write_text('{"name": "x"')
    (tmp_path / "run" / "ops" / "other.json").write_text("[]")
    assert places.entries() == []


def test_what_an_agent_was_writing_when_it_died_is_removed(
    places: journal.Places, tmp_path: Path
) -> None:
    ops = tmp_path / "run" / "ops"
    dead, living = f"dump-{os.getpid()}-1-0.json.new", f"dump-{me().pid}-{me().start_ticks}-7"
    (ops / dead).write_text("{")
    (ops / "of somebody else.json.new").touch()
    (ops / f"{living}.json.new").write_text("{")
    recovery.recover(places)
    left = {f"{living}.json.new", "of somebody else.json.new"}
    assert {path.name for path in ops.iterdir()} == left


def test_a_process_is_held_by_one_operation_at_a_time(places: journal.Places) -> None:
    held = pytest.raises(errors.TargetBusy, match=f"agent with pid {os.getpid()}")
    with places.locked([me()]), held as refusal, places.locked([me()]):
        pass
    assert refusal.value.retryable
    with places.locked([me()]):
        pass


def test_a_lock_that_is_only_looked_at_is_no_other_operations(
    places: journal.Places, tmp_path: Path
) -> None:
    me = proc.identity(os.getpid())
    path = tmp_path / "run" / "locks" / f"{me.pid}-{me.start_ticks}"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)  # as whoever removes the locks of dead agents
    threading.Timer(0.1, os.close, [fd]).start()
    with places.locked([me]):
        assert path.read_text() == str(os.getpid())


def test_the_lock_of_a_dead_agent_is_void(places: journal.Places, tmp_path: Path) -> None:
    script = (
        "import os\n"
        "from agent.engines.criu import journal\n"
        "from agent.host import proc\n"
        f"places = journal.Places({str(tmp_path / 'run')!r}, {str(tmp_path / 'work')!r})\n"
        f"with places.locked([proc.identity({os.getpid()})]): os._exit(9)\n"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == 9
    with places.locked([me()]):
        pass


def test_many_at_once_never_hold_the_same_process(places: journal.Places) -> None:
    holding = 0
    most = 0
    won = 0

    def one() -> None:
        nonlocal holding, most, won
        for _ in range(50):
            try:
                with places.locked([me()]):
                    holding += 1
                    most = max(most, holding)
                    won += 1
                    holding -= 1
            except errors.TargetBusy:
                continue

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert won > 0


def test_directories_that_others_may_write_to_are_refused(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir(mode=0o777)
    os.chmod(tmp_path / "work", 0o777)
    with pytest.raises(errors.PrivilegeMissing, match="this user alone"):
        journal.Places(str(tmp_path / "run"), str(tmp_path / "work")).prepare()


def test_the_pid_counter_of_an_isolated_tree_is_set_off_its_numbers() -> None:
    assert supervisor.last_pid({5000, 5001}, 32768) == 5002
    high = supervisor.last_pid({32700, 32767}, 32768)
    assert not {32700, 32767} & set(range(high, high + 300))
    crowded = supervisor.last_pid(set(range(300, 2000)) | {32767}, 32768)
    assert crowded == 2000


@pytest.mark.parametrize("nested", [False, True])
def test_a_container_that_ends_while_it_is_looked_at_leaves_nothing_to_end(
    places: journal.Places, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    container = subprocess.Popen(["sleep", "60"])
    gone = proc.identity(container.pid)
    container.kill()
    container.wait()
    monkeypatch.setattr(proc, "alive", lambda who: who == gone)
    about = journal.About(container=gone, numbers=(1,), nested=nested)
    with places.operation("restore", [], about=about) as operation:
        assert recovery.undo_restore(places, operation.entry).killed == []
