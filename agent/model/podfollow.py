"""Which pods of a namespace must be cut together, from who is connected with whom.

A connection is known by the addresses and ports of both ends, as the socket of each end sees them.
Where a Service's address stands between, the end that called sees that, and only the other end,
which sees the caller's own, tells whose pod it leads to.

Promises: pure; asks for the connections of no more pods than it needs; whom it leads to that is not
known to be a pod of the namespace which may be cut is named, with the reason.
Does not: know whether a pod can be captured; whoever takes the members does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

from agent import errors
from agent.model import cut

# As many as are followed on a host (``model.follow``): whatever is connected with more than that is
# likely to be connected with everything.
MOST = 64
# Pods that are asked whether a connection leads to them: a call each.
MOST_ASKED = 256

_PREFIX = "followed."

Connection = tuple[str, str]
"""Both ends, ADDRESS:PORT, the pod's own first."""


def group(pod: str) -> str:
    """What the images of the pods are called that are connected with ``pod``."""
    return f"{_PREFIX}{pod}"


def is_group(name: str) -> bool:
    """Whether ``name`` is what ``group`` says of some pod."""
    return name.startswith(_PREFIX) and name != _PREFIX


@dataclasses.dataclass(frozen=True)
class Party:
    """A running pod. ``addresses`` are its own: none if it shares its node's. ``together`` names
    what it is cut with in any case (a JobSet), ``refused`` says why it is never followed.
    """

    name: str
    addresses: tuple[str, ...]
    together: str = ""
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class Closure:
    """``members`` by name, each with why it is one ("" for the one that was named). ``leaving`` are
    connections that lead to nobody who is one, for people. ``ask`` are pods whose connections have
    to be known before the rest is right; ``unasked`` tells people of those that nobody could ask.
    """

    members: Mapping[str, str]
    leaving: tuple[str, ...]
    ask: tuple[str, ...]
    unasked: tuple[str, ...] = ()


def close(
    named: str, parties: Sequence[Party], known: Mapping[str, Collection[Connection]]
) -> Closure:
    """Follow the connections of the pod ``named``, as far as those of its members are ``known``.

    Raises:
        errors.NotFound: it is not among ``parties``.
        errors.TargetUnsuitable: there are too many members.
    """
    by_name = {each.name: each for each in parties}
    if named not in by_name:
        raise errors.NotFound(f"no pod {named} runs here", hint="check its name and namespace")
    walk = _Walk(by_name, known)
    walk.add(named, "")
    return walk.closed()


class _Walk:
    def __init__(
        self, parties: Mapping[str, Party], known: Mapping[str, Collection[Connection]]
    ) -> None:
        self._parties = parties
        self._by_address = {
            address: each for each in parties.values() for address in each.addresses
        }
        self._known = {name: frozenset(ends) for name, ends in known.items()}
        # Whose sockets see a caller, and their own ends: nobody else in the cluster has its address
        # and port.
        self._callers: dict[str, list[tuple[str, str]]] = {}
        for name in parties:
            for local, remote in sorted(self._known.get(name, ())):
                self._callers.setdefault(remote, []).append((name, local))
        self._members: dict[str, str] = {}
        self._leaving: dict[str, None] = {}
        self._unmatched = False

    def add(self, name: str, because: str) -> None:
        if name in self._members:
            return
        self._members[name] = because
        if len(self._members) > MOST:
            raise errors.TargetUnsuitable(
                f"more than {MOST} pods are connected with each other",
                hint="give them a label, and name that: group/NAME -l LABELS",
            )
        whole = self._parties[name].together
        for each in self._parties.values():
            if whole and each.together == whole:
                self.add(each.name, f"of {whole}, as {name}")

    def closed(self) -> Closure:
        waiting = list(self._members)
        done: set[str] = set()
        while waiting:
            name = waiting.pop(0)
            done.add(name)
            for local, remote in sorted(self._known.get(name, ())):
                self._follow(self._parties[name], local, remote)
            waiting += [each for each in self._members if each not in done and each not in waiting]
        ask = [each for each in self._members if each not in self._known]
        if not ask and self._unmatched:
            others = [
                each.name
                for each in self._parties.values()
                if not each.refused and each.name not in self._known
            ]
            ask = others[: max(0, MOST_ASKED - len(self._known))]
        return Closure(self._members, tuple(self._leaving), tuple(ask))

    def _follow(self, here: Party, local: str, remote: str) -> None:
        host = remote.rpartition(":")[0].strip("[]")
        if cut.is_loopback(host) or host in here.addresses:
            return
        direct, known = self._by_address.get(host), self._known[here.name]
        # Of who called ``here`` itself, the socket is the other end of another connection.
        by_socket = [
            name for name, end in self._callers.get(local, ()) if (local, end) not in known
        ]
        found = direct or (self._parties[by_socket[0]] if by_socket else None)
        if found is None:
            self._unmatched = True
            self._leaving[f"{here.name}: {local} -> {remote}: no pod here is known to hear it"] = (
                None
            )
        elif found.refused:
            self._leaving[f"{here.name}: {local} -> {remote}: pod {found.name} {found.refused}"] = (
                None
            )
        else:
            through = "" if direct else " through a Service"
            self.add(found.name, f"connected with {here.name}{through} ({local} -> {remote})")
