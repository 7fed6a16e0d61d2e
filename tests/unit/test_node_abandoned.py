"""Images of a namespace that is gone are told, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import errors
from agent.model import ids
from agent.node import abandoned
from agent.node.stores import NamespaceStores
from agent.volumes.directory import DirectoryVolume
from tests import images


@pytest.fixture
def stores(tmp_path: Path) -> NamespaceStores:
    return NamespaceStores(str(tmp_path), lambda path, create: DirectoryVolume(path, create=create))


def dump(stores: NamespaceStores, name: str) -> None:
    store = stores.open(ids.namespace_name(name), create=True)
    with store.begin(ids.group_name("job"), now_s=1.8e9) as writer:
        images.write(writer, images.simple())
        writer.commit({})


def test_only_what_holds_images_and_has_no_namespace_is_told(
    stores: NamespaceStores, tmp_path: Path
) -> None:
    dump(stores, "here")
    dump(stores, "gone")
    stores.open(ids.namespace_name("emptied"), create=True)
    for other in ("backups", "lost+found", ".snapshot"):
        (tmp_path / other).mkdir()
    found = abandoned.examine({"default": stores}, lambda name: name == "here")
    assert found.status == "degraded"
    assert found.found == "images of namespaces that do not exist: gone"
    assert "-n gone" in found.cure
    assert found.consequence
    assert abandoned.examine({"default": stores}, lambda name: name != "emptied").status == "ok"


def test_what_cannot_be_asked_is_told(stores: NamespaceStores) -> None:
    dump(stores, "here")

    def refuse(name: str) -> bool:
        raise errors.Forbidden(f"may not look at {name}", hint="grant it")

    found = abandoned.examine({"default": stores}, refuse)
    assert (found.status, found.cure) == ("degraded", "grant it")
    away = NamespaceStores("/nonexistent", lambda path, create: DirectoryVolume(path))
    assert abandoned.examine({"default": away}, refuse).status == "degraded"
