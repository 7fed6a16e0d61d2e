"""How an image becomes files that CRIU reads.

Promises: when ``lay_out`` returns, every byte that a restore needs has been read, and so verified
by the source. Memory of this process stays bounded; zero pages take no disk.
Does not: start anything.
"""

from __future__ import annotations

import os
from typing import Any

from agent import errors
from agent.engines.criu import images
from agent.model.streams import AddressSpace, MemberSource


def lay_out(source: MemberSource, known: dict[str, Any], folder: str) -> None:
    """Write all images of ``source`` into ``folder``.

    Raises:
        errors.Corrupt | errors.Missing: the image is damaged.
        errors.RestoreFailed: no room in ``folder``.
    """
    for name, content in source.metadata():
        _write_metadata(folder, name, content)
    stored = set(source.spaces())
    for pages_id, space in enumerate(spaces(source, known), start=1):
        images.write_pagemap(folder, space, pages_id, source.runs(space) if space in stored else [])
        if space in stored:
            images.write_pages(folder, space, pages_id, source)
        else:
            with open(os.path.join(folder, f"pages-{pages_id}.img"), "wb"):
                pass


def spaces(source: MemberSource, known: dict[str, Any]) -> list[AddressSpace]:
    """All address spaces, those without a single page included: CRIU wants a page map of each."""
    found = source.spaces()
    for kind, number in known.get("spaces", []):
        space = AddressSpace(kind, int(number))
        if space not in found:
            found.append(space)
    return found


def _write_metadata(folder: str, name: str, content: bytes) -> None:
    if os.path.basename(name) != name or name in ("", ".", ".."):
        raise errors.Corrupt(f"the image has a file named {name!r}", part=name)
    try:
        fd = os.open(
            os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        with open(fd, "wb") as out:
            out.write(content)
    except OSError as exc:
        raise errors.RestoreFailed(
            f"cannot write {name} to {folder}: {exc.strerror}",
            hint="free space there, or choose another work directory",
            path=folder,
        ) from exc
