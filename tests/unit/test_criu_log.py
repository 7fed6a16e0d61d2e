"""CRIU's log: the cause first, noise left out, hints where the cause is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engines.criu import log

NOISE = "(00.000030) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: x"


def test_the_first_error_that_matters_is_the_cause() -> None:
    raw = "\n".join(
        [
            NOISE,
            "(00.012345) some step",
            "(00.020000) Error (criu/files-reg.c:1): Can't dump ghost file /x of 9 size",
            "(00.020100)   4711: Error (criu/cr-dump.c:2): Dump files (pid: 4711) failed with -1",
            "(00.030000) Error (criu/cr-dump.c:2128): Dumping FAILED.",
        ]
    )
    failure = log.failure("dump", log.parse(raw.encode()))
    assert failure.message == (
        "CRIU could not dump: Error (criu/files-reg.c:1): Can't dump ghost file /x of 9 size"
    )
    assert "ghost limit" in failure.hint
    tail = failure.facts["log_tail"]
    assert isinstance(tail, list)
    assert tail[-1].endswith("Dumping FAILED.")


def test_the_reply_speaks_where_the_log_is_empty_but_noise_does_not() -> None:
    said = log.failure("dump", log.Log((), ()), "No such process")
    assert said.message == "CRIU could not dump: No such process"
    noise = log.failure("dump", log.Log((), ()), NOISE)
    assert noise.message == "CRIU could not dump: it gave no reason"
    assert noise.hint


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("1: Error (criu/pie/parasite.c:588): send_fds failed (-22)", "io_uring"),
        ("Error (criu/files.c:1): Unknown anon_inode:[io_uring]", "io_uring"),
        ("Error (criu/sk-unix.c:1): External socket is used. Consider --ext-unix-sk", "outside"),
        ("Error (criu/sk-tcp.c:1): In-flight connection (l)", "not accepted"),
        ("Error (criu/cr-restore.c:1): Can't fork for 7: File exists", "--isolate"),
        ("Error (criu/files-reg.c:1): File x has bad size 1 (expect 2)", "changed"),
        ("Error (criu/files-reg.c:1): Can't open file x on restore: No such file", "not here"),
        ("Error (compel/x.c:1): Unable to interrupt task: 7 (Operation not permitted)", "tracer"),
        ("Error (criu/sk-inet.c:1): inet: Can't bind inet socket: Address already in use", "taken"),
        ("Error (criu/proc_parse.c:118): handle_device_vma plugin failed: No such file", "a GPU"),
        ("Error (criu/sk-inet.c:1): Connected TCP socket, consider using --x", "live TCP"),
    ],
)
def test_known_causes_have_a_way_out(line: str, hint: str) -> None:
    assert hint in log.parse(line.encode()).hint


@given(st.binary(max_size=4096))
def test_any_bytes_are_a_log(raw: bytes) -> None:
    found = log.parse(raw)
    assert len(found.tail) <= 20
    assert all(len(line) <= 300 for line in found.tail)


def test_a_log_that_was_never_opened_is_empty() -> None:
    assert log.read("/nonexistent/log") == log.Log((), ())


@pytest.mark.parametrize(
    ("line", "late", "number"),
    [
        ("Error (criu/uffd.c:1): Unable to open an userfaultfd descriptor", True, False),
        ("Error (criu/pie/restorer.c:1): lazy-pages: register 7 failed: rc:-22", True, False),
        ("Error (criu/kerndat.c:1): Lazy pages are not available", True, False),
        ("Error (criu/cr-restore.c:1): Can't fork for 7: File exists", False, True),
        ("9: Error (criu/pie/restorer.c:1): Unable to create a thread: -17", False, True),
        ("9: Error (criu/pie/restorer.c:1): Unable to create a thread: -11", False, False),
        ("Error (criu/sk-inet.c:1): Can't bind inet socket: Address already in use", False, False),
    ],
)
def test_what_another_attempt_may_help_against_is_known(
    line: str, late: bool, number: bool
) -> None:
    failure = log.failure("restore", log.parse(line.encode()))
    assert log.blames_lazy_mode(failure) is late
    assert log.blames_numbers(failure) is number
