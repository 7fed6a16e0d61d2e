"""Several storages of one agent, over the real API with real dumps: where a dump goes, and what is
found while one of them is away.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import errors
from agent.model import ids, optin
from agent.node.storages import Storages
from agent.node.stores import NamespaceStores
from agent.volumes.directory import DirectoryVolume
from tests.host import nodes
from tests.host.conftest import Host
from tests.host.nodes import VERBS, Node, wait_for


@pytest.fixture
def node(host: Host, tmp_path: Path) -> Iterator[Node]:
    with nodes.running(tmp_path, host.engine) as found:
        yield found


def places(node: Node) -> dict[str, Path]:
    return {"default": Path(node.settings.store.path), "fast": Path(node.settings.stores["fast"])}


def asking(name: str) -> dict[str, Any]:
    return {"annotations": {optin.STORAGE: name}}


def dump(agent: Any, pod: str) -> Any:
    return agent.dump("default", pod, pod_uid="", deadline_s=60.0).image


def name_of(image: Any) -> str:
    return f"{image.group}@{image.epoch}"


def test_a_dump_goes_where_its_pod_else_its_namespace_says_and_is_found_there(
    node: Node, host: Host
) -> None:
    target = host.start()
    node.add_pod("quiet", target.pid)
    node.add_pod("fast", target.pid, metadata=asking("fast"))
    node.add_pod("usual", target.pid, metadata=asking("default"))
    with node.caller(*VERBS) as agent:
        assert dump(agent, "quiet").storage == "default"
        node.api.namespaces["default"] = {optin.STORAGE: "fast"}
        found = {pod: dump(agent, pod) for pod in ("quiet", "fast", "usual")}
        assert {pod: image.storage for pod, image in found.items()} == {
            "quiet": "fast",
            "fast": "fast",
            "usual": "default",
        }
        # The other storage's epoch is no base of the next one.
        assert found["quiet"].new_bytes == found["fast"].new_bytes
        again = dump(agent, "quiet")
        assert again.new_bytes < found["quiet"].new_bytes
        for place in places(node).values():
            assert [each.name for each in place.iterdir()] == ["default"]

        listed = agent.listing("default")
        assert listed.unread == {}
        # Which of two epochs of one second comes first is chance.
        assert sorted((image.group, image.storage) for image in listed.images) == [
            ("fast", "fast"),
            ("quiet", "default"),
            ("quiet", "fast"),
            ("quiet", "fast"),
            ("usual", "default"),
        ]
        assert [i.group for i in agent.listing("default", "", "default").images] == [
            "quiet",
            "usual",
        ]
        # A group is its newest image, wherever it lies.
        shown = agent.image("default", "quiet")
        assert shown.image.epoch == again.epoch
        assert shown.document["storage"] == "fast"
        assert shown.document["previous"] == name_of(found["quiet"])
        assert agent.image("default", "quiet", "default").image.storage == "default"
        with pytest.raises(errors.NotFound):
            agent.image("default", "usual", "fast")
        for image in listed.images:
            assert agent.verify("default", name_of(image)).good

        # What to keep is counted in each storage by itself.
        pruned = agent.prune("default", keep_last=1, keep_within_s=None, dry_run=False)
        assert [(item["name"], item["storage"]) for item in pruned["items"]] == [
            (name_of(found["quiet"]), "fast")
        ]
        deleted = agent.delete("default", name_of(found["usual"]))
        assert [item["storage"] for item in deleted["items"]] == ["default"]
        for wrong in (agent.listing, agent.image, agent.delete):
            with pytest.raises(errors.InvalidInput, match="no storage 'slow'") as caught:
                wrong("default", "quiet", "slow")
            assert "default, fast" in caught.value.hint
    host.assert_running(target)
    host.assert_clean()


@pytest.mark.parametrize(
    ("pod", "namespace", "error"),
    [
        (asking("/etc"), {}, errors.InvalidInput),
        ({}, {optin.STORAGE: "slow"}, errors.InvalidInput),
        ({}, None, errors.Forbidden),
    ],
)
def test_what_cannot_be_placed_is_refused_before_anything_stops(
    node: Node,
    host: Host,
    pod: dict[str, Any],
    namespace: dict[str, str] | None,
    error: type[errors.CkptError],
) -> None:
    """``namespace`` None: the agent may not read it."""
    target = host.start()
    node.add_pod("counter", target.pid, metadata=pod)
    node.api.namespaces["default"] = namespace
    with node.caller(*VERBS) as agent:
        (blocker,) = agent.plan("default", "counter")["blockers"]
        assert blocker["code"] == "storage"
        with pytest.raises(error) as caught:
            dump(agent, "counter")
        assert caught.value.exit_status == 3
        assert agent.listing("default").images == []
    assert node.engines.wanted == []  # no engine was even asked for
    assert not any(list(place.iterdir()) for place in places(node).values())
    wait_for(lambda: "CheckpointFailed" in [event["reason"] for event in node.api.events])
    host.assert_running(target)


def test_a_storage_that_is_away_does_not_hide_the_others(node: Node, host: Host) -> None:
    target = host.start()
    node.add_pod("quiet", target.pid)
    node.add_pod("fast", target.pid, metadata=asking("fast"))
    with node.caller(*VERBS) as agent:
        here, away = dump(agent, "quiet"), dump(agent, "fast")
        shutil.move(places(node)["fast"], places(node)["fast"].with_name("unmounted"))
        listed = agent.listing("default")
        assert [name_of(image) for image in listed.images] == [name_of(here)]
        assert list(listed.unread) == ["fast"]
        assert "cannot be opened" in listed.unread["fast"]
        assert agent.verify("default", name_of(here)).good
        # Its newest image may lie where nobody can look.
        for image in ("quiet", name_of(away)):
            with pytest.raises(errors.VolumeGone, match="fast"):
                agent.image("default", image)
        assert agent.image("default", "quiet", "default").image.epoch == here.epoch
        with pytest.raises(errors.VolumeGone):
            dump(agent, "fast")
        pruned = agent.prune("default", keep_last=1, keep_within_s=None, dry_run=True)
        assert pruned["kept"] == [name_of(here)]
        assert [each["storage"] for each in pruned["unread"]] == ["fast"]
        # Where there is nothing else to look at, it is an error.
        with pytest.raises(errors.VolumeGone):
            agent.listing("default", "", "fast")
        places(node)["default"].rename(node.folder / "unmounted-too")
        with pytest.raises(errors.VolumeGone):
            agent.listing("default")
        assert not any(place.exists() for place in places(node).values())
    host.assert_running(target)
    host.assert_clean()


class Hanging(DirectoryVolume):
    """A volume whose server is down: what looks at it stands still until it is let go."""

    def __init__(self, path: str, create: bool, server: Any) -> None:
        super().__init__(path, create=create)
        self._server = server

    def space(self) -> Any:
        self._server.wait(60)
        return super().space()


def test_a_storage_that_hangs_is_told_in_time_and_used_again_when_it_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    up = threading.Event()
    opened: list[str] = []

    def hanging(path: str, create: bool) -> Hanging:
        opened.append(path)
        return Hanging(path, create, up)

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    good = NamespaceStores(
        str(tmp_path / "a"), lambda path, create: DirectoryVolume(path, create=create)
    )
    slow = NamespaceStores(str(tmp_path / "b"), hanging, answer_s=0.2)
    storages = Storages(
        {"default": good, "slow": slow},
        lambda name: {},
    )
    namespace = ids.namespace_name("team")
    storages.make(namespace, "default")
    for _ in range(3):
        done, unread = storages.each(namespace, "", lambda store: store.epochs())
        assert (done, list(unread)) == ({"default": []}, ["slow"])
        assert "does not answer" in unread["slow"]
        storages.check()
    # One look hangs, and nobody begins a second one.
    assert len(opened) == 1
    assert caplog.text.count("storage slow") == 1
    up.set()
    slow._answer_s = 20.0
    wait_for(lambda: not storages.each(namespace, "", lambda store: store.epochs())[1])
    storages.make(namespace, "slow")
