"""Which store a pod's images go to, where an agent has several (a fast one and a large one, say).

The agent's configuration names its stores and where each is mounted; a pod's annotation, or its
namespace's, picks one by name. So whoever makes pods chooses among what the cluster's owner offers,
and can name no path. Within each store a namespace has a directory of its own, whose content no
other namespace shares.

Promises: pure; what is chosen is one of the configured stores.
Does not: look whether a store is there, or who may use it.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from collections.abc import Mapping

from agent import errors
from agent.model import optin

DEFAULT = "default"
"""The name of the store that ``settings.store`` configures."""

# A DNS label (RFC 1123), as names of volumes and of namespaces are.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A store by name, the directory that it is mounted at, and who chose it: ``pod``,
    ``namespace`` or ``default``.
    """

    name: str
    path: str
    chosen_by: str

    def directory(self, namespace: str) -> str:
        """Where the images of ``namespace`` lie in it.

        Raises:
            errors.InvalidInput: this is no name of a namespace.
        """
        if not _LABEL.fullmatch(namespace):
            raise errors.InvalidInput(
                f"{namespace!r} is not the name of a namespace", hint="use a DNS label"
            )
        return posixpath.join(self.path, namespace)


def read_stores(text: str, default: str) -> dict[str, str]:
    """Read ``NAME=PATH,NAME=PATH`` into stores by name; ``default`` is the path of the one that is
    always there.

    Raises:
        errors.InvalidInput: a name or path does not make sense, is given twice, or a store would
            lie inside another one.
    """
    found = {DEFAULT: posixpath.normpath(default)}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, path = (part.strip() for part in entry.partition("="))
        if not (_LABEL.fullmatch(name) and equals and posixpath.isabs(path)):
            raise errors.InvalidInput(
                f"{entry!r} is not a store", hint="write NAME=/absolute/path, with commas between"
            )
        if name in found:
            raise errors.InvalidInput(
                f"the store {name!r} is given twice", hint="give each store a name of its own"
            )
        found[name] = posixpath.normpath(path)
    _check_apart(found)
    return found


def _check_apart(stores: Mapping[str, str]) -> None:
    """A namespace called like a directory of the inner store would see the wrong one's images."""
    ordered = sorted(stores.items(), key=lambda item: item[1])
    for name, path in ordered:
        for other, inner in ordered:
            if name != other and posixpath.commonpath((path, inner)) == path:
                raise errors.InvalidInput(
                    f"the store {other!r} lies inside the store {name!r}",
                    hint="mount the stores beside each other",
                )


def choose(
    stores: Mapping[str, str], pod: Mapping[str, str], namespace: Mapping[str, str]
) -> Choice:
    """Return the store that the annotations of ``pod``, else those of its ``namespace``, name;
    else the default one.

    Raises:
        errors.InvalidInput: the agent has no store of that name; the message lists those it has.
    """
    for origin, said in (("pod", pod), ("namespace", namespace)):
        name = said.get(optin.STORE)
        if name is None:
            continue
        if name not in stores:
            raise errors.InvalidInput(
                f"the {origin} asks for the store {name!r}, which this agent does not have",
                hint=f"it has {', '.join(sorted(stores))}; correct the annotation {optin.STORE}",
                store=name,
            )
        return Choice(name, stores[name], origin)
    return Choice(DEFAULT, stores[DEFAULT], "default")
