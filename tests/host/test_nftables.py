"""nf_tables as the kernel itself takes it: whole transactions or nothing, and what is listed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from agent.host import hold, netfilter, nftables


@pytest.fixture
def table() -> Iterator[str]:
    name = f"ckpt-agent-test-{secrets.token_hex(4)}"
    yield name
    with contextlib.suppress(OSError):
        nftables.commit(nftables.delete_table(name))
    assert name not in nftables.tables()


def with_set(table: str, timeout_ms: int = 60_000) -> list[nftables.Change]:
    return [nftables.add_table(table), nftables.add_set(table, "some", 12, 1, timeout_ms)]


def test_keys_are_in_a_set_until_they_leave_or_their_time_is_up(table: str) -> None:
    keys = [bytes([number]) for number in range(200)]
    changes = [nftables.add_key(table, "some", key, 60_000) for key in keys]
    nftables.commit(*with_set(table), *changes)
    assert table in nftables.tables()
    assert sorted(nftables.keys(table, "some")) == keys
    nftables.commit(nftables.delete_key(table, "some", keys[0]))
    assert sorted(nftables.keys(table, "some")) == keys[1:]
    nftables.commit(nftables.delete_table(table))
    began = time.monotonic()
    nftables.commit(*with_set(table), nftables.add_key(table, "some", b"\6", 300))
    assert nftables.keys(table, "some") == [b"\6"] or time.monotonic() - began >= 0.3
    deadline = time.monotonic() + 30
    while nftables.keys(table, "some"):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "wrong",
    [
        nftables.delete_table("ckpt-agent-test-of-nobody"),
        nftables.add_key("ckpt-agent-test-of-nobody", "some", b"\1", 1),
        nftables.add_rule("ckpt-agent-test-of-nobody", "chain", [nftables.verdict(nftables.DROP)]),
    ],
)
def test_one_change_that_is_refused_leaves_nothing_of_the_others(
    table: str, wrong: nftables.Change
) -> None:
    for changes in ([*with_set(table), wrong], [wrong, *with_set(table)]):
        with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
            nftables.commit(*changes)
        assert table not in nftables.tables()


def test_a_rule_that_makes_no_sense_is_refused(table: str) -> None:
    chain = nftables.add_input_chain(table, "arrive", 0)
    rule = nftables.add_rule(table, "arrive", [nftables.within("no-such-set")])
    with pytest.raises(OSError, match=os.strerror(errno.ENOENT)):
        nftables.commit(nftables.add_table(table), chain, rule)
    assert table not in nftables.tables()


def test_what_is_not_there_is_told(table: str) -> None:
    assert not netfilter.delete_table(table)
    assert netfilter.set_keys(table, "some") == set()
    assert not netfilter.renew_key(table, "some", b"\1", 1.0)
    nftables.commit(*with_set(table))
    assert nftables.keys(table, "some") == []
    assert not netfilter.renew_key(table, "some", b"\1", 1.0)


def test_thousands_of_connections_are_held_at_once(table: str) -> None:
    """More than fits into a socket's usual buffer."""
    connections = [hold.Connection("10.9.8.7", port, "10.9.8.6", 80) for port in range(1, 3001)]
    with hold.held(table, connections) as held:
        assert netfilter.tables(table) == {table}
        held.check()


def test_who_may_not_is_told_so() -> None:
    code = (
        "from agent.host import netfilter\n"
        "for look in (lambda: netfilter.tables(''), lambda: netfilter.delete_table('x')):\n"
        "    try: look()\n"
        "    except Exception as exc: print(type(exc).__name__)\n"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["PrivilegeMissing", "PrivilegeMissing"], done.stderr
