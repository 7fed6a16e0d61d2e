"""A loop that is held at a step boundary, in one process and among ranks."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.host import clock, webcall
from hooks.quiesce import Boundary, Resumed

ROOT = Path(__file__).parents[2]


def wait_for(predicate: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not predicate():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def ask(path: Path, call: str, body: Any = None, within_s: float = 20) -> tuple[int, Any]:
    """As the agent asks."""
    connected = socket.socket(socket.AF_UNIX)
    connected.connect(str(path))
    raw = json.dumps(body or {}).encode()
    answer = webcall.post(connected, call, raw, clock.Deadline.after(within_s))
    return answer.status, json.loads(answer.tail)


class Loop(threading.Thread):
    """Steps, with a boundary after each."""

    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(daemon=True)
        self.boundary = Boundary(str(path), **options)
        self.steps = 0
        self.resumed: list[Resumed] = []
        self.ends = False
        self.start()

    def run(self) -> None:
        while not self.ends:
            self.steps += 1
            if found := self.boundary.reached():
                self.resumed.append(found)
            time.sleep(0.001)

    def stands(self) -> bool:
        before = self.steps
        time.sleep(0.1)
        return self.steps == before

    def goes_on(self) -> None:
        before = self.steps
        wait_for(lambda: self.steps > before + 1)

    def end(self) -> None:
        self.ends = True
        self.boundary.close()
        self.join(20)


def test_the_loop_is_held_from_one_call_to_the_other(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "s")
    assert ask(tmp_path / "s", "/quiesce") == (200, {"held": True})
    assert loop.stands()
    assert ask(tmp_path / "s", "/quiesce") == (200, {"held": True})
    assert ask(tmp_path / "s", "/resume", {"outcome": "captured"}) == (200, {"held": True})
    wait_for(lambda: loop.resumed)
    assert loop.resumed == [Resumed("captured", {"outcome": "captured"})]
    loop.goes_on()
    assert ask(tmp_path / "s", "/resume") == (200, {"held": False})
    loop.goes_on()
    loop.end()
    assert not (tmp_path / "s").exists()


def test_the_loop_goes_on_by_itself_when_nobody_says_so(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "s")
    assert ask(tmp_path / "s", "/quiesce") == (200, {"held": True})
    # Only now: it bounds the way to the boundary too, which a busy machine makes long.
    with loop.boundary._changed:
        loop.boundary._longest_s = 0.2
        loop.boundary._changed.notify_all()
    wait_for(lambda: loop.resumed)
    assert loop.resumed == [Resumed("", {})]
    assert ask(tmp_path / "s", "/resume") == (200, {"held": False})
    loop.end()


def test_a_loop_that_was_let_go_and_has_not_woken_yet_is_held_anew(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "s")
    assert ask(tmp_path / "s", "/quiesce") == (200, {"held": True})
    with loop.boundary._changed:  # the loop wakes when this is let go of, and no sooner
        assert loop.boundary._resume({"outcome": "captured"})
        assert loop.boundary._quiesce()
    assert loop.stands()
    assert [found.outcome for found in loop.resumed] == ["captured"]
    assert ask(tmp_path / "s", "/resume", {"outcome": "committed"}) == (200, {"held": True})
    wait_for(lambda: len(loop.resumed) == 2)
    loop.goes_on()
    loop.end()


def test_a_loop_that_reaches_no_boundary_is_not_waited_for_and_not_held_later(
    tmp_path: Path,
) -> None:
    boundary = Boundary(str(tmp_path / "s"), longest_s=0.2)
    assert ask(tmp_path / "s", "/quiesce") == (503, {"held": False})
    assert boundary.reached() is None
    boundary.close()


def test_a_wish_that_is_taken_back_before_the_boundary_holds_nothing(tmp_path: Path) -> None:
    boundary = Boundary(str(tmp_path / "s"))
    asked: list[Any] = []
    asking = threading.Thread(target=lambda: asked.append(ask(tmp_path / "s", "/quiesce")))
    asking.start()
    wait_for(lambda: boundary._wanted)
    # The agent has hung up at its own deadline, and the epoch is given up.
    assert ask(tmp_path / "s", "/resume", {"outcome": "aborted"}) == (200, {"held": False})
    asking.join(20)
    assert asked == [(503, {"held": False})]
    assert boundary.reached() is None
    boundary.close()


def test_closing_lets_everybody_go(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "s")
    ask(tmp_path / "s", "/quiesce")
    loop.end()
    assert not loop.is_alive()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /quiesce HTTP/1.1\r\n\r\n", b"400"),
        (b"POST /quiesce HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"POST /resume HTTP/1.1\r\nContent-Length: 3\r\n\r\n{{{", b"400"),
        (b"POST /other HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /resume HTTP/1.1\r\nContent-Length: 2\r\n\r\n[]", b"200"),
        (b"POST /resume HTTP/1.1\r\n" + b"X: " + b"y" * 70000, b"400"),
    ],
)
def test_what_is_no_request_disturbs_nothing(tmp_path: Path, sent: bytes, status: bytes) -> None:
    with Boundary(str(tmp_path / "s")) as boundary:
        connected = socket.socket(socket.AF_UNIX)
        connected.connect(str(tmp_path / "s"))
        connected.settimeout(20)
        with contextlib.suppress(BrokenPipeError):  # it reads no more than it must
            connected.sendall(sent)
        assert connected.recv(100).split(b" ")[1] == status
        connected.close()
        assert boundary.reached() is None


class Ranks:
    """Loops whose every step needs all of them, and which agree at every boundary."""

    def __init__(self, folder: Path, count: int, **options: Any) -> None:
        self._barrier = threading.Barrier(count)
        self._votes = [False] * count
        self.paths = [folder / f"s{rank}" for rank in range(count)]
        self.steps = [0] * count
        self.held: list[tuple[int, int, str]] = []
        self._ends = False
        self._boundaries = [
            Boundary(str(path), agree=lambda wanted, r=rank: self._agree(r, wanted), **options)  # type: ignore[misc]
            for rank, path in enumerate(self.paths)
        ]
        self._threads = [
            threading.Thread(target=self._run, args=(rank,), daemon=True) for rank in range(count)
        ]
        for each in self._threads:
            each.start()

    def _agree(self, rank: int, wanted: bool) -> bool:
        self._votes[rank] = wanted
        self._barrier.wait(30)
        found = any(self._votes)
        self._barrier.wait(30)
        return found

    def _run(self, rank: int) -> None:
        try:
            while not self._ends:
                self._barrier.wait(30)  # the step's own collective
                self.steps[rank] += 1
                if found := self._boundaries[rank].reached():
                    self.held.append((rank, self.steps[rank], found.outcome))
        except threading.BrokenBarrierError:
            return

    def end(self) -> None:
        self._ends = True
        self._barrier.abort()
        for each in self._boundaries:
            each.close()
        for thread in self._threads:
            thread.join(20)


def test_ranks_are_held_before_the_same_step_whoever_is_asked_first(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 3)
    wait_for(lambda: min(ranks.steps) > 5)
    for path in ranks.paths:
        assert ask(path, "/quiesce") == (200, {"held": True})
        time.sleep(0.02)
    assert len(set(ranks.steps)) == 1
    for path in reversed(ranks.paths):
        ask(path, "/resume", {"outcome": "captured"})
    wait_for(lambda: len(ranks.held) == 3)
    assert {(step, outcome) for _, step, outcome in ranks.held} == {(ranks.held[0][1], "captured")}
    wait_for(lambda: min(ranks.steps) > ranks.held[0][1] + 3)
    ranks.end()


def test_a_rank_that_is_never_asked_itself_goes_on_soon(tmp_path: Path) -> None:
    ranks = Ranks(tmp_path, 2, unasked_s=0.2)
    ask(ranks.paths[0], "/quiesce")
    ask(ranks.paths[0], "/resume", {"outcome": "aborted"})
    wait_for(lambda: len(ranks.held) == 2)
    assert sorted((rank, outcome) for rank, _, outcome in ranks.held) == [(0, "aborted"), (1, "")]
    wait_for(lambda: min(ranks.steps) > ranks.held[0][1] + 3)
    ranks.end()


def test_it_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "quiesce.py").write_text((ROOT / "hooks" / "quiesce.py").read_text())
    program = "import sys; sys.path.insert(0, '.'); import quiesce; print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "'quiesce'" in done.stdout
    assert "'agent'" not in done.stdout
