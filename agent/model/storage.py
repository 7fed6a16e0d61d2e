"""Storages: named places for images, of which an agent may have several (a fast one and a large
one, say), and the choices among them.

The agent's configuration names its storages and where each is mounted. A pod's annotation, or its
namespace's, picks one by name: whoever makes pods chooses among what the cluster's owner offers,
and can name no path. Each namespace has a store of its own in each storage.

Promises: pure; what is chosen is one of the configured storages; no image is taken for another one
because a storage is away.
Does not: look whether a storage is there, or who may use it.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from agent import errors
from agent.model import ids, optin

DEFAULT = "default"
"""The storage of pods that say nothing. Its place is the setting ``store``."""

# A DNS label (RFC 1123), as names of volumes are.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

Origin = Literal["pod", "namespace", "agent"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A storage by name, and whose word it was."""

    name: str
    origin: Origin


def read(text: str) -> dict[str, str]:
    """Read ``NAME=PATH,NAME=PATH`` into absolute paths by name.

    Raises:
        errors.InvalidInput: a name or path does not make sense, or a name is given twice.
    """
    found: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not (_LABEL.fullmatch(name) and equals and posixpath.isabs(path)):
            raise errors.InvalidInput(
                f"{entry!r} is not a storage", hint="write NAME=/absolute/path, with commas between"
            )
        if name in found:
            raise errors.InvalidInput(
                f"the storage {name!r} is given twice", hint="give each storage a name of its own"
            )
        found[name] = posixpath.normpath(path)
    return found


def configured(default: str, more: Mapping[str, str]) -> dict[str, str]:
    """All storages of an agent, the default one first: at the path ``default`` unless ``more``
    says another one.

    Raises:
        errors.InvalidInput: one would lie inside another: a namespace called like a directory on
            the way would see the wrong one's images.
    """
    found = {DEFAULT: posixpath.normpath(default)} | dict(more)
    ordered = sorted(found.items(), key=lambda item: (item[1], item[0]))
    for position, (name, path) in enumerate(ordered):
        for other, inner in ordered[position + 1 :]:
            if posixpath.commonpath((path, inner)) == path:
                raise errors.InvalidInput(
                    f"the storage {other!r} ({inner}) lies inside the storage {name!r} ({path})",
                    hint="mount the storages beside each other",
                )
    return found


def asks_itself(pod: Mapping[str, str]) -> bool:
    """Whether a pod's own annotations choose, so that its namespace's do not matter."""
    return optin.STORAGE in pod


def choose(names: Collection[str], pod: Mapping[str, str], namespace: Mapping[str, str]) -> Choice:
    """Return the storage that the annotations of ``pod``, else those of its ``namespace``, name;
    else the default one.

    Raises:
        errors.InvalidInput: there is no storage of that name; the hint lists those that there are.
    """
    said: tuple[tuple[Origin, Mapping[str, str]], ...] = (("pod", pod), ("namespace", namespace))
    for origin, words in said:
        name = words.get(optin.STORAGE)
        if name is not None:
            if name not in names:
                raise errors.InvalidInput(
                    f"the {origin} asks for the storage {name!r}, which this agent does not have",
                    hint=f"it has {', '.join(names)}; correct the annotation {optin.STORAGE} of the"
                    f" {origin}",
                    storage=name,
                )
            return Choice(name, origin)
    return Choice(DEFAULT, "agent")


def agreed(pods: Mapping[str, Mapping[str, str]]) -> str:
    """The storage for one image of several pods, whose annotations are by name: what all of them
    ask for; "" if none asks for anything.

    Raises:
        errors.InvalidInput: they do not say the same, or one names nothing.
    """
    asked = {name: words.get(optin.STORAGE) for name, words in pods.items()}
    wanted = set(asked.values())
    if len(wanted) > 1 or "" in wanted:
        raise errors.InvalidInput(
            "the pods do not ask for the same storage, and their image can only lie in one",
            hint=f"give all of them the same annotation {optin.STORAGE}, or none",
            reasons=[f"{name}: {each or 'nothing'}" for name, each in sorted(asked.items())],
        )
    return (wanted.pop() or "") if wanted else ""


def check_known(names: Collection[str], name: str) -> None:
    """Return if a caller may ask for the storage ``name``.

    Raises:
        errors.InvalidInput: there is none of that name.
    """
    if name not in names:
        raise errors.InvalidInput(
            f"there is no storage {name!r}", hint=f"there are {', '.join(names)}", storage=name
        )


def find(
    image: str, matching: Mapping[str, Sequence[ids.EpochId]], unread: Mapping[str, str]
) -> tuple[str, ids.EpochId]:
    """Return the storage and epoch that ``image`` means: ``group`` its newest epoch,
    ``group@epoch`` that one, or an unambiguous beginning. ``matching`` are the epochs that fit, by
    storage; ``unread`` are the storages that could not be read, and why.

    Raises:
        errors.NotFound: nothing fits, or several do.
        errors.VolumeGone: what is meant may lie in a storage that could not be read.
    """
    _, at, start = image.partition("@")
    fitting = sorted((epoch, name) for name, epochs in matching.items() for epoch in epochs)
    # A full name means one image, wherever the others are.
    sure = bool(fitting) and fitting[0][0] == start
    if unread and not sure:
        away = "; ".join(f"{name}: {problem}" for name, problem in unread.items())
        raise errors.VolumeGone(
            f"image {image} may lie in a storage that cannot be read now: {away}",
            hint="name the image whole (GROUP@EPOCH), or a storage that can be read (--storage)",
            unread=list(unread),
        )
    if not fitting:
        raise errors.NotFound(f"there is no image {image}", hint="list shows what there is")
    epoch, name = fitting[-1]
    twice = [other for same, other in fitting if same == epoch]
    if len(twice) > 1:
        raise errors.NotFound(
            f"{image} lies in the storages {', '.join(twice)}", hint="name one of them (--storage)"
        )
    if at and len(fitting) > 1:
        raise errors.NotFound(
            f"{image} may be any of {len(fitting)} epochs",
            hint=f"for instance {image.partition('@')[0]}@{epoch}",
        )
    return name, epoch
