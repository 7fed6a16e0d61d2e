"""A container's processes go on in another container, as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.host.boxes import Boxes

FEATURES = (
    *("memory", "threads", "children", "pipes", "unix_sockets", "tcp", "unlinked"),
    *("shared_memory", "memfd", "timers", "pending_signals", "sessions", "stopped", "eventfd"),
    *("open_file", "hard_link"),
)


@pytest.mark.parametrize("features", [("memory", "children"), FEATURES])
def test_a_tree_goes_on_in_another_container(boxes: Boxes, features: tuple[str, ...]) -> None:
    source = boxes.tree("source", *features)
    image = boxes.dump(source)
    boxes.check(source)
    target = boxes.placeholder("target")
    boxes.restore(image, target)
    boxes.check(target)
    boxes.check(source)
    boxes.assert_clean()
