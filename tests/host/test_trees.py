"""What a tree can hold and still be dumped, run on, be killed, and come back as it was."""

from __future__ import annotations

import pytest

from agent.engines.base import CaptureOptions, Disposition, RestoreOptions
from tests.host.conftest import Cut, Host

FEATURES = (
    *("memory", "threads", "children", "pipes", "unix_sockets", "tcp", "unlinked", "shared_memory"),
    *("memfd", "timers", "pending_signals", "sessions", "stopped", "eventfd", "open_file"),
    "hard_link",
)


def test_a_tree_with_everything_survives_three_cycles_of_dump_and_restore(host: Host) -> None:
    target = host.start(*FEATURES)
    for _ in range(3):
        image = host.dump(target)
        host.assert_running(target)
        image = host.dump(target, Cut(disposition=Disposition.KILL), CaptureOptions(kill=True))
        for popen in host.popens:
            popen.wait()
        for tree in host.trees:
            tree.wait(10)
        tree = host.restore(image)
        assert tree.pid == target.pid
        host.assert_running(target)
    host.assert_clean()


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_survives_a_dump_that_runs_on_and_an_isolated_restore(
    host: Host, feature: str
) -> None:
    target = host.start(feature)
    image = host.dump(target)
    host.assert_running(target)
    host.kill(target)
    tree = host.restore(image, RestoreOptions(isolate=True))
    target.check(tree.pid)
    host.assert_clean()
    assert list(target.folder.glob("link_remap*")) == []
