"""The names of blobs: which are valid, and how a prefix of one is told from nonsense.

Promises: a name that passes is a relative path without ``.``, ``..``, empty or hidden components,
so that no volume that joins it to a root can be led out of it.
Does not: look at any volume.
"""

from __future__ import annotations

import re

from agent import errors

# The longest name of a pod, which is less than POSIX's NAME_MAX (255), and S3's limit of a key.
_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,252}")
_MAX_NAME = 1024


def is_component(text: str) -> bool:
    """Tell whether ``text`` may stand between two slashes of a name."""
    return _COMPONENT.fullmatch(text) is not None


def components(name: str) -> list[str]:
    """Return the components of a blob's name.

    Raises:
        errors.InvalidInput: it is not a valid name.
    """
    parts = name.split("/")
    if len(name) > _MAX_NAME or not all(map(is_component, parts)):
        raise errors.InvalidInput(
            f"blob name {name[:80]!r} is not valid",
            hint="components of letters, digits, '.', '_', '@', '-', joined by '/'",
        )
    return parts


def split_prefix(prefix: str) -> tuple[list[str], str]:
    """Return the whole folders of a listing's prefix, and the rest that names begin with.

    Raises:
        errors.InvalidInput: no valid name begins like this.
    """
    *folders, rest = prefix.split("/")
    if len(prefix) > _MAX_NAME or not all(map(is_component, folders)):
        raise errors.InvalidInput(f"prefix {prefix[:80]!r} is not valid")
    if rest and not is_component(rest):
        raise errors.InvalidInput(f"prefix {prefix[:80]!r} is not valid")
    return folders, rest
