"""Applies a JSON patch (RFC 6902) strictly: what the API server does with the webhook's answer."""

from __future__ import annotations

import copy
from typing import Any


def apply(document: Any, patch: list[dict[str, Any]]) -> Any:
    """Return a patched copy; fails where the RFC says that a patch fails."""
    root = {"": copy.deepcopy(document)}
    for operation in patch:
        parent, key = _find(root, operation["path"])
        match operation["op"]:
            case "add":
                _add(parent, key, copy.deepcopy(operation["value"]))
            case "remove":
                _take(parent, key)
            case "move":
                source, source_key = _find(root, operation["from"])
                value = _take(source, source_key)
                parent, key = _find(root, operation["path"])
                _add(parent, key, value)
            case other:
                raise ValueError(f"unknown operation {other!r}")
    return root[""]


def _find(root: Any, path: str) -> tuple[Any, str]:
    if not path.startswith("/"):
        raise ValueError(f"{path!r} is no pointer below the document")
    *way, last = [word.replace("~1", "/").replace("~0", "~") for word in path.split("/")]
    here = root
    for word in way:
        here = here[_index(here, word)] if isinstance(here, list) else here[word]
    return here, last


def _index(here: list[Any], word: str) -> int:
    if not word.isdigit() or int(word) >= len(here):
        raise IndexError(f"no entry {word} in a list of {len(here)}")
    return int(word)


def _add(parent: Any, key: str, value: Any) -> None:
    if isinstance(parent, list):
        at = len(parent) if key == "-" else int(key)
        if at > len(parent):
            raise IndexError(f"cannot add at {at} of {len(parent)}")
        parent.insert(at, value)
    elif isinstance(parent, dict):
        parent[key] = value
    else:
        raise TypeError("nothing can be added to a value")


def _take(parent: Any, key: str) -> Any:
    return parent.pop(_index(parent, key)) if isinstance(parent, list) else parent.pop(key)
