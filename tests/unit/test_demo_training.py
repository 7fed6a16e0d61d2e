"""The demo's training is deterministic, and its comparison misses nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from demo import compare, job
from demo.ring import PeerLost, Ring


def _train(directory: Path, ranks: int = 2) -> None:
    command = [sys.executable, "-m", "demo.train", str(directory), f"--ranks={ranks}"]
    small = ["--steps=6", "--hidden=16", "--batch=8"]
    subprocess.run([*command, *small], check=True, timeout=120)


def _rings(world: int) -> list[Ring]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(world)]
    ports = [listener.getsockname()[1] for listener in listeners]
    rings: dict[int, Ring] = {}

    def join(rank: int) -> None:
        rings[rank] = Ring(rank, listeners[rank], ports)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [rings[rank] for rank in range(world)]


def test_two_trainings_write_the_same_bytes_on_every_rank(tmp_path: Path) -> None:
    for name in ("one", "other"):
        _train(tmp_path / name)
    assert compare.differences(str(tmp_path / "one"), str(tmp_path / "other"), 2) == []
    logs = [(tmp_path / "one" / f"rank-{rank}.log").read_text() for rank in range(2)]
    # The ranks agree on the weights at every step, though their batches and own losses differ.
    assert len(logs[0].splitlines()) == 7
    assert logs[0] != logs[1]
    sums = [[line.split("params ")[-1] for line in log.splitlines()[:-1]] for log in logs]
    assert sums[0] == sums[1]


def test_a_rank_that_fails_ends_the_job_with_status_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo.train", str(tmp_path), "--ranks=2", "--hidden=-1"]
    ran = subprocess.run(command, capture_output=True, timeout=120)
    assert ran.returncode == 1


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_ring_gives_every_rank_the_same_bits_of_the_sum(world: int) -> None:
    draw = np.random.default_rng(1)
    # Longer than the socket buffers, and not divisible by the number of ranks.
    values = [draw.standard_normal(3_000_001, dtype=np.float32) for _ in range(world)]
    expected = np.sum(values, axis=0, dtype=np.float64)
    rings = _rings(world)
    threads = [
        threading.Thread(target=ring.all_reduce, args=(own,))
        for ring, own in zip(rings, values, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ring in rings:
        ring.close()
    assert all(own.tobytes() == values[0].tobytes() for own in values)
    np.testing.assert_allclose(values[0], expected, atol=1e-5)


def test_a_lost_peer_is_an_error_and_not_a_hang() -> None:
    one, other = _rings(2)
    other.close()
    with pytest.raises((PeerLost, ConnectionError)):
        one.all_reduce(np.zeros(1000, np.float32))
    one.close()


def _write(directory: Path, logs: list[str], weights: bytes) -> str:
    directory.mkdir()
    for rank, log in enumerate(logs):
        (directory / f"rank-{rank}.log").write_text(log)
    (directory / "weights.npy").write_bytes(weights)
    return str(directory)


@pytest.mark.parametrize(
    ("logs", "weights", "told"),
    [
        (["step 1\nstep 2\n", "a\n"], b"w", []),
        (["step 1\nstep 3\n", "a\n"], b"w", ["rank-0.log: line 2 is 'step 3\\n' instead of"]),
        (["step 1\n", "a\n"], b"w", ["rank-0.log: line 2 is missing"]),
        (["step 1\nstep 2\n", "a\nb\n"], b"w", ["rank-1.log: line 2 is 'b\\n' instead of missing"]),
        (["step 1\nstep 2\n"], b"w", ["rank-1.log: missing"]),
        (["step 1\nstep 2\n", "a\n"], b"v", ["weights.npy"]),
    ],
)
def test_every_difference_is_told_with_its_place(
    tmp_path: Path, logs: list[str], weights: bytes, told: list[str]
) -> None:
    expected = _write(tmp_path / "expected", ["step 1\nstep 2\n", "a\n"], b"w")
    actual = _write(tmp_path / "actual", logs, weights)
    found = compare.differences(expected, actual, 2)
    assert len(found) == len(told)
    assert all(begin in line for line, begin in zip(found, told, strict=True))


def test_two_trainings_without_logs_are_not_called_equal(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    assert compare.differences(str(tmp_path / "one"), str(tmp_path / "other"), 1)


def test_the_watch_sees_each_step_once_and_where_the_log_was_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "rank-0.log"
    lines = [f"step {step} loss {float(step).hex()}\n" for step in range(1, 6)]
    seen = threading.Event()

    def until(condition: Callable[[], bool]) -> None:
        for _ in range(6000):
            if condition():
                return
            seen.wait(0.01)
        raise AssertionError("it did not come about")

    def grown(watch: job.Watch, count: int) -> None:
        until(lambda: len(watch.points) == count)

    watch = job.Watch(str(log), os.getpid(), 0.0)
    alive = threading.Event()
    alive.set()
    monkeypatch.setattr(job, "running", lambda _: alive.is_set())
    with watch:
        log.write_text("".join(lines[:4]) + lines[4][:7])
        grown(watch, 4)
        alive.clear()
        # Put back to step 2 in another file and in two writes, as a restore may do it.
        other = tmp_path / "other"
        other.write_text(lines[0])
        os.rename(other, log)
        until(lambda: watch.rolled_back_at is not None)
        with log.open("a") as file:
            file.write(lines[1])
        until(lambda: watch._read_bytes == log.stat().st_size)
        alive.set()
        until(lambda: not watch._rolling_back)
        with log.open("a") as file:
            file.write(lines[2])
        grown(watch, 5)
    assert [point.step for point in watch.points] == [1, 2, 3, 4, 3]
    assert watch.rolled_back_at == 4
    assert watch.points[-1].loss == 3.0
