"""Where no thread can be started: that is said, and nobody waits for one that never ran."""

from __future__ import annotations

import os
import threading
from typing import Any, cast

import pytest

from agent import errors
from agent.engines.base import CaptureOptions
from agent.engines.criu.pageserver import PageServer
from agent.host import clock, injection, proc, ptrace, underway
from agent.host.moves import Moves
from agent.model import ids
from agent.node import dump
from agent.node.dump import Cancel, Member


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Threads whose names begin with one of these are not to be had."""
    names: set[str] = set()
    start = threading.Thread.start

    def limited(thread: threading.Thread) -> None:
        if thread.name.startswith(tuple(names)):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return names


def test_who_needs_a_thread_to_trace_says_that_there_is_none(refusing: set[str]) -> None:
    refusing |= {"inject", "underway", "any"}
    with pytest.raises(errors.EnvironmentUnfit, match="no thread"):
        ptrace.by_thread("any", lambda: None)
    me = proc.identity(os.getpid())
    # What takes it for a reason to go another way: all is compared, nothing is known to be over.
    with pytest.raises(injection.InjectionRefused, match="no thread"):
        injection.userfaultfd(me)
    assert not underway.over(me.pid, clock.Deadline.after(1.0))


def test_what_is_not_told_of_moves_keeps_no_descriptor(refusing: set[str]) -> None:
    before = os.listdir("/proc/self/fd")
    refusing.add("moves")
    with pytest.raises(errors.EnvironmentUnfit, match="no thread"):
        Moves()
    assert os.listdir("/proc/self/fd") == before


def test_a_page_server_that_got_only_one_of_its_threads_ends(refusing: set[str]) -> None:
    server = PageServer(lambda *given: None, clock.Deadline.after(5.0))
    refusing.add(server._thread.name)
    with pytest.raises(errors.EnvironmentUnfit, match="no thread"):
        server.start()
    ending = threading.Thread(target=server.close, daemon=True)
    ending.start()
    ending.join(5.0)
    assert not ending.is_alive()


class _Waits:
    """An engine whose members wait for each other."""

    def capture(self, pid: int, sink: Any, cut: Any, options: CaptureOptions) -> Any:
        cut.ready()


def test_members_do_not_wait_for_one_that_has_no_thread(refusing: set[str]) -> None:
    refusing.add("member_1")
    members = [Member(ids.member_name(name), os.getpid()) for name in ("a", "b")]
    cut = dump._GroupCut(2, 60.0, Cancel(), dump._Nothing())
    with pytest.raises(errors.EnvironmentUnfit, match="no thread"):
        dump._capture_all(
            cast("Any", _Waits()),
            members,
            cast("Any", _Writer()),
            cut,
            dump._Meter(lambda progress: None, Cancel()),
            CaptureOptions(),
        )


class _Writer:
    def member(self, name: ids.MemberName) -> Any:
        return None
