"""The names of things: groups, members, epochs, images.

Promises: a value of these types is safe as one path component of a volume name.
Does not: look anything up.
"""

from __future__ import annotations

import re
from typing import NewType

from agent import errors

GroupName = NewType("GroupName", str)
MemberName = NewType("MemberName", str)
EpochId = NewType("EpochId", str)
Namespace = NewType("Namespace", str)

# One path component on every file system and object store. A group is a pod in a cluster, and a
# pod's name has up to 253 characters (RFC 1123 subdomain), a container's 63 (label).
_NAME = re.compile(r"[a-z0-9A-Z]([a-zA-Z0-9._-]*[a-zA-Z0-9])?")
GROUP_CHARACTERS = 253
_MEMBER_CHARACTERS = 63
# UTC second of creation, so that names sort by age, and 24 random bits against equal seconds.
_EPOCH = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")

# A DNS label, as Kubernetes has it.
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


def _checked(kind: str, text: str, most: int) -> str:
    if len(text) > most or not _NAME.fullmatch(text):
        raise errors.InvalidInput(
            f"{kind} name {text!r} is not valid",
            hint=f"use 1-{most} letters, digits, '.', '_' or '-', beginning and ending with a"
            " letter or digit",
        )
    return text


def group_name(text: str) -> GroupName:
    """Return ``text`` as a group name.

    Raises:
        errors.InvalidInput: it is not 1-253 characters of ``[a-zA-Z0-9._-]``.
    """
    return GroupName(_checked("group", text, GROUP_CHARACTERS))


def member_name(text: str) -> MemberName:
    """Return ``text`` as a member name; the same rules as for a group, but 1-63 characters."""
    return MemberName(_checked("member", text, _MEMBER_CHARACTERS))


def namespace_name(text: str) -> Namespace:
    """Return ``text`` as the name of a Kubernetes namespace.

    Raises:
        errors.InvalidInput: it is not 1-63 characters of ``[a-z0-9-]``.
    """
    if not _LABEL.fullmatch(text):
        raise errors.InvalidInput(
            f"namespace {text!r} is not valid",
            hint="use 1-63 of a-z, 0-9 and '-', beginning and ending with a letter or digit",
        )
    return Namespace(text)


def epoch_id(text: str) -> EpochId:
    """Return ``text`` as an epoch id, ``YYYYMMDD-HHMMSS-xxxxxx``."""
    if not _EPOCH.fullmatch(text):
        raise errors.InvalidInput(
            f"epoch {text!r} is not valid", hint="an epoch looks like 20260131-235959-0a1b2c"
        )
    return EpochId(text)


def image_name(group: GroupName, epoch: EpochId) -> str:
    """The name that ``dump`` prints and ``restore`` takes."""
    return f"{group}@{epoch}"
