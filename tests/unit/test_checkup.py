"""The check-up: every fault of a host is a line with its consequence and its cure."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from agent import errors
from agent.host import kernel
from agent.model import checkup
from agent.model.checkup import Check, Criu, Folder, Host, Kernel, StoreState, judge

_KERNEL = Kernel(
    release="6.18",
    userfaultfd=True,
    wp_async=True,
    pagemap_scan=True,
    soft_dirty_unusable="there are none",
    nf_tables=True,
    ptrace_scope=1,
    time_namespaces=True,
    pidfd=True,
    kcmp=True,
    set_pid=True,
    cgroup="v2",
    capabilities=frozenset(kernel.CAPABILITIES),
)
_HOST = Host(
    kernel=_KERNEL,
    criu=Criu("/usr/sbin/criu", "4.2.1", lazy_pages=True),
    root=True,
    work_dir=Folder("/work", "", 10 << 30),
    stores=(StoreState("/store", True, 3, 0, 100 << 30, None),),
    leftovers=(),
)


def not_ok(host: Host) -> list[Check]:
    return [check for check in judge(host) if check.status != "ok"]


def with_kernel(**changes: Any) -> Host:
    return dataclasses.replace(_HOST, kernel=dataclasses.replace(_KERNEL, **changes))


def with_store(**changes: Any) -> Host:
    return dataclasses.replace(_HOST, stores=(dataclasses.replace(_HOST.stores[0], **changes),))


def test_a_good_host_is_ok_throughout() -> None:
    assert not_ok(_HOST) == []
    assert {check.name for check in judge(_HOST)} >= {"criu", "store", "work-dir", "leftovers"}


_GONE = errors.VolumeGone("not mounted")
_MISSING_CRIU = errors.CriuMissing("CRIU is not installed", hint="install it")


@pytest.mark.parametrize(
    ("host", "name", "status"),
    [
        (dataclasses.replace(_HOST, criu=_MISSING_CRIU), "criu", "missing"),
        (
            dataclasses.replace(_HOST, criu=Criu("/c", "4.2", lazy_pages=False)),
            "criu-lazy-pages",
            "degraded",
        ),
        (dataclasses.replace(_HOST, root=False), "root", "missing"),
        (with_kernel(kcmp=False), "kernel-kcmp", "missing"),
        (with_kernel(set_pid=False), "kernel-set-pid", "missing"),
        (with_kernel(ptrace_scope=3), "kernel-ptrace-scope", "missing"),
        (with_kernel(nf_tables=False), "kernel-nf-tables", "degraded"),
        (with_kernel(time_namespaces=False), "kernel-time-namespaces", "degraded"),
        (with_kernel(pidfd=False), "kernel-pidfd", "degraded"),
        (with_kernel(cgroup="none"), "cgroup", "degraded"),
        (dataclasses.replace(_HOST, work_dir=Folder("/w", "full", 0)), "work-dir", "missing"),
        (dataclasses.replace(_HOST, work_dir=Folder("/w", "", 1)), "work-dir", "degraded"),
        (with_store(problem=_GONE), "store", "missing"),
        (with_store(problem=_GONE, name="fast"), "store fast", "degraded"),
        (with_store(free_bytes=1, name="fast"), "store-space fast", "degraded"),
        (with_store(damaged=1), "store", "degraded"),
        (with_store(free_bytes=5), "store-space", "degraded"),
        (dataclasses.replace(_HOST, leftovers=("dump-1-2-0",)), "leftovers", "degraded"),
    ],
)
def test_each_fault_is_one_line_with_consequence_and_cure(
    host: Host, name: str, status: str
) -> None:
    (check,) = not_ok(host)
    assert (check.name, check.status) == (name, status)
    assert check.found
    assert check.consequence
    assert check.cure


@pytest.mark.parametrize("name", sorted(kernel.CAPABILITIES))
def test_each_capability_that_is_not_held_is_a_line_of_its_own(name: str) -> None:
    (check,) = not_ok(with_kernel(capabilities=frozenset(kernel.CAPABILITIES) - {name}))
    assert check.name == name
    assert name in check.cure
    assert check.consequence


def test_soft_dirty_is_needed_only_where_nothing_better_is() -> None:
    assert not_ok(with_kernel(soft_dirty_unusable="")) == []
    found = not_ok(with_kernel(wp_async=False))
    assert [check.name for check in found] == ["kernel-userfaultfd", "kernel-soft-dirty"]
    (found_with_bits,) = not_ok(with_kernel(wp_async=False, soft_dirty_unusable=""))
    assert found_with_bits.consequence != found[0].consequence


def test_what_is_hidden_from_others_than_root_is_not_called_missing_from_the_kernel() -> None:
    host = dataclasses.replace(with_kernel(userfaultfd=False, wp_async=False), root=False)
    lines = {check.name: check for check in judge(host)}
    assert "hidden without root" in lines["kernel-userfaultfd"].found
    assert "hidden" not in {c.name: c for c in judge(_HOST)}["kernel-soft-dirty"].found


def test_a_store_that_the_first_dump_will_make_is_ok() -> None:
    assert not_ok(with_store(exists=False)) == []


def test_space_that_cannot_be_told_is_not_judged() -> None:
    assert "store-space" not in {check.name for check in judge(with_store(free_bytes=None))}


def test_the_probes_answer_on_this_machine_and_change_nothing() -> None:
    first, second = kernel.probe(), kernel.probe()
    assert first == second
    assert first.release
    assert first.cgroup in ("v1", "v2", "hybrid", "none")
    assert first.capabilities == kernel.capabilities()
    # WP_ASYNC is a feature of userfaultfd.
    assert first.userfaultfd or not first.wp_async
    assert isinstance(first, checkup.Kernel)
