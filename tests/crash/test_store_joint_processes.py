"""Real processes on a real directory that write, commit, abandon and prune joint epochs at once,
and some are killed: all are told the same of every epoch, and what is committed is whole."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.host import clock
from agent.model import ids
from agent.store import intents, layout
from agent.store.repository import Store
from agent.store.retention import Retention
from agent.volumes.directory import DirectoryVolume
from tests import images
from tests.images import EMPTY, GROUP

ROUNDS = 14
RANKS = tuple(ids.member_name(f"rank-{number}") for number in range(2))

_WORKER = """
import contextlib, json, sys
from agent import errors
from agent.host import clock
from agent.model import ids
from agent.model.protocol import Decision
from agent.store.repository import Part, Store
from agent.store.retention import Retention
from agent.volumes.directory import DirectoryVolume
from tests import images

store = Store.open(DirectoryVolume(sys.argv[1]))
group = images.GROUP

def settle(writer, epoch):
    decision = store.abandon(group, epoch)
    writer.keep() if decision is Decision.COMMITTED else writer.drop()
    return decision.value

def commit(epoch, parts):
    parts = [Part.decode(text.encode()) for text in parts]
    with contextlib.suppress(errors.Conflict):
        store.commit_joint(group, epoch, parts, {}, now_s=clock.wall_s())
    return store.abandon(group, epoch).value

def prune():
    with contextlib.suppress(errors.Conflict):
        store.prune(Retention(keep_last=3), now_s=clock.wall_s())

def write(stack, epoch, rank, first):
    writer = stack.enter_context(store.join(group, epoch, now_s=clock.wall_s()))
    images.write(writer, {rank: images.simple(first, 300)[images.MEMBER]})
    return writer

with contextlib.ExitStack() as stack:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        given = json.loads(line)
        what, epoch = given["what"], given.get("epoch")
        if what == "write":
            writer = write(stack, epoch, given["rank"], given["first"])
            answer = writer.finish().encode().decode()
        elif what == "settle":
            answer = settle(writer, epoch)
        elif what == "commit":
            answer = commit(epoch, given["parts"])
        elif what == "abandon":
            answer = store.abandon(group, epoch).value
        elif what == "prune":
            answer = prune()
        print(json.dumps(answer), flush=True)
"""


class Worker:
    """A process that does one thing after the other."""

    def __init__(self, url: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str, **given: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, **given}) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        self._process.kill()
        with self._process:
            pass


@pytest.fixture
def volume(tmp_path: Path) -> DirectoryVolume:
    return DirectoryVolume(str(tmp_path / "store"), create=True)


@contextlib.contextmanager
def workers(url: str, count: int) -> Iterator[list[Worker]]:
    found = [Worker(url) for _ in range(count)]
    try:
        for each in found:
            assert each.answer() == "ready"
        yield found
    finally:
        for each in found:
            each.kill()


def test_many_processes_are_told_the_same(volume: DirectoryVolume) -> None:
    store = Store.open(volume, create=True)
    rng = random.Random(1)
    outcomes: dict[str, str] = {}
    with workers(volume.url, 6) as (*members, committer, second, silent, pruner):
        for number in range(ROUNDS):
            epoch = store.new_epoch(GROUP, now_s=clock.wall_s())
            for rank, member in zip(RANKS, members, strict=True):
                member.ask("write", epoch=epoch, rank=rank, first=number)
            parts = [member.answer() for member in members]
            who: list[tuple[Worker, dict[str, Any]]] = [
                (committer, {"what": "commit", "parts": parts}),
                (second, {"what": "commit", "parts": parts[::-1]}),
                (silent, {"what": "abandon"}),
                (pruner, {"what": "prune"}),
            ]
            who += [(member, {"what": "settle"}) for member in members]
            told = []
            if number < 2:  # one of each for certain, the rest in any order
                worker, request = who.pop(2 * number)
                worker.ask(epoch=epoch, **request)
                told.append(worker.answer())
            rng.shuffle(who)
            for worker, request in who:
                worker.ask(epoch=epoch, **request)
            told += [worker.answer() for worker, _ in who]
            (outcomes[epoch],) = {answer for answer in told if answer is not None}
    assert set(outcomes.values()) == {"committed", "abandoned"}
    _assert_sound(store, outcomes)


def test_whoever_is_killed_leaves_an_epoch_or_none(volume: DirectoryVolume) -> None:
    store = Store.open(volume, create=True)
    rng = random.Random(2)
    outcomes: dict[str, str] = {}
    for number in range(4):
        epoch = store.new_epoch(GROUP, now_s=clock.wall_s())
        with workers(volume.url, 4) as (*members, committer, pruner):
            for rank, member in zip(RANKS, members, strict=True):
                member.ask("write", epoch=epoch, rank=rank, first=number)
            parts = [member.answer() for member in members]
            committer.ask("commit", epoch=epoch, parts=parts)
            pruner.ask("prune")
            for worker in rng.sample([*members, committer, pruner], 3):
                worker.kill()
        # All are dead, and this process knows: so what is not committed goes at once.
        store.prune(Retention(keep_last=100), now_s=clock.wall_s())
        outcomes[epoch] = store.abandon(GROUP, epoch).value
        assert list(volume.list(layout.INTENTS)) == []
        _assert_sound(store, outcomes)
    late_s = clock.wall_s() + 1.01 * intents.STALE_S
    store.prune(Retention(keep_last=100), now_s=late_s)
    volume.sweep(0.0)
    for summary in store.epochs():
        store.delete(GROUP, summary.epoch)
    assert [info.name for info in volume.list()] == EMPTY


def _assert_sound(store: Store, outcomes: dict[str, str]) -> None:
    listed = [summary.epoch for summary in store.epochs()]
    committed = sorted(each for each, outcome in outcomes.items() if outcome == "committed")
    assert listed[-3:] == committed[-3:]
    for epoch in listed:
        assert store.verify(GROUP, epoch).good
        first = list(outcomes).index(epoch)
        image = images.simple(first, 300)[images.MEMBER]
        images.assert_epoch(store.read(GROUP, epoch), dict.fromkeys(RANKS, image))
