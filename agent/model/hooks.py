"""Hooks: what a pod's owner wants done around a checkpoint, written in the annotation ``HOOKS``.

``pre`` hooks run while the job still runs, before it is stopped; ``post`` hooks when it runs again.
A phase is a list whose entries run one after the other; an entry that is itself a list runs at
once. A hook is a command, a request over HTTP, a call over gRPC, or an action of the agent's.

Promises: pure; what does not make sense is named with the place where it stands and the way out; a
hook that is asked for is understood whole or refused, never in part.
Does not: run anything.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent import errors
from agent.model import optin
from agent.model.pods import Placement

TEARDOWN_RDMA = "teardown-rdma"
RELEASE_GPU = "release-gpu"
"""The names of the pre hooks that let go of RDMA devices and of GPUs; without one a dump of a pod
that uses them is refused."""

DEADLINE_S = 10.0
LONGEST_S = 300.0
"""A hook's deadline if it says none; what the hooks of a phase may take together: half of what a
dump has by default."""

_MOST_HOOKS = 32
# A DNS label (RFC 1123), as names of containers are.
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# The path of a request (RFC 3986), and no blank or line end that would end it in the middle.
_REQUEST_PATH = re.compile(r"/[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*")


class Phase(enum.Enum):
    """Before the job is stopped, or after."""

    PRE = "pre"
    POST = "post"


class Scope(enum.Enum):
    """Whether each pod of a group runs the hook, or one of them for all."""

    MEMBER = "member"
    GROUP = "group"


class When(enum.Enum):
    """When a post hook runs: as soon as the processes do, or when it is known what became of the
    epoch.
    """

    RUNNING = "running"
    DECIDED = "decided"


class Outcome(enum.Enum):
    """What a post hook is told."""

    CAPTURED = "captured"
    """The processes run again; whether the image will be good is not known yet."""

    COMMITTED = "committed"
    ABORTED = "aborted"
    RESTORED = "restored"
    UNKNOWN = "unknown"
    """The agent was killed in between, and its successor says so: the processes run."""


class Action(enum.Enum):
    """What the agent does itself."""

    SYNC = "sync"
    DROP_CACHES = "drop-caches"


@dataclasses.dataclass(frozen=True)
class Exec:
    """A command in the container."""

    argv: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Http:
    """A POST to a port of the pod's own loopback."""

    port: int
    path: str


@dataclasses.dataclass(frozen=True)
class Unix:
    """A POST over a Unix socket, whose path is one of the container."""

    socket: str
    path: str


@dataclasses.dataclass(frozen=True)
class Grpc:
    """A call of ``Hooks.Call`` (hooks.proto) at a port of the pod's own loopback, or over the Unix
    socket ``socket`` of the container if that is not "".
    """

    port: int = 0
    socket: str = ""


@dataclasses.dataclass(frozen=True)
class Builtin:
    """An action on ``path`` of the container; "" means all that travels with an image."""

    action: Action
    path: str = ""


Means = Exec | Http | Unix | Grpc | Builtin


@dataclasses.dataclass(frozen=True)
class Hook:
    """One hook. ``container`` is "" for the first one that takes part; ``aborts`` says whether its
    failure gives the epoch up.
    """

    name: str
    means: Means
    container: str = ""
    scope: Scope = Scope.MEMBER
    deadline_s: float = DEADLINE_S
    aborts: bool = False
    when: When = When.RUNNING


Steps = tuple[tuple[Hook, ...], ...]
"""One after the other; within each, at once."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a pod's owner wants; both may be empty."""

    pre: Steps = ()
    post: Steps = ()

    @property
    def names(self) -> frozenset[str]:
        """The names of the pre hooks."""
        return frozenset(hook.name for hook in itertools.chain.from_iterable(self.pre))


@dataclasses.dataclass(frozen=True)
class Told:
    """What a hook is told. ``outcome`` is None before the stop; ``image`` is "" where it has no
    name yet; ``was`` is where the processes were when the image was taken, for restored ones.
    """

    hook: str
    phase: Phase
    namespace: str
    now: Placement
    outcome: Outcome | None = None
    image: str = ""
    was: Placement | None = None

    def document(self) -> dict[str, Any]:
        """For the body of a request."""
        return {
            "hook": self.hook,
            "phase": self.phase.value,
            "outcome": self.outcome.value if self.outcome else "",
            "image": self.image,
            "namespace": self.namespace,
            "now": _placement(self.now),
            "was": _placement(self.was) if self.was else None,
        }

    def environment(self) -> dict[str, str]:
        """For a command."""
        found = {
            "CKPT_AGENT_HOOK": self.hook,
            "CKPT_AGENT_PHASE": self.phase.value,
            "CKPT_AGENT_OUTCOME": self.outcome.value if self.outcome else "",
            "CKPT_AGENT_IMAGE": self.image,
            "CKPT_AGENT_NAMESPACE": self.namespace,
            **_variables("CKPT_AGENT_", self.now),
        }
        return found | (_variables("CKPT_AGENT_WAS_", self.was) if self.was else {})


def _placement(found: Placement) -> dict[str, Any]:
    return {
        "pod": found.pod,
        "podUid": found.pod_uid,
        "node": found.node,
        "addresses": list(found.addresses),
    }


def _variables(prefix: str, found: Placement) -> dict[str, str]:
    return {
        f"{prefix}POD": found.pod,
        f"{prefix}POD_UID": found.pod_uid,
        f"{prefix}NODE": found.node,
        f"{prefix}ADDRESSES": ",".join(found.addresses),
    }


def read(annotations: Mapping[str, str], containers: Sequence[str]) -> Hooks:
    """The hooks of a pod with these annotations and containers.

    Raises:
        errors.InvalidInput: what the annotation says does not make sense.
    """
    text = annotations.get(optin.HOOKS)
    if text is None:
        return Hooks()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _bad("it is not JSON", 'write {"pre": [...], "post": [...]}') from exc
    if not isinstance(value, dict):
        raise _bad("it is not a JSON object", 'write {"pre": [...], "post": [...]}')
    _only(value, ("pre", "post"), "the object")
    found = {phase: _phase(phase, value.get(phase.value, []), containers) for phase in Phase}
    return Hooks(found[Phase.PRE], found[Phase.POST])


def _phase(phase: Phase, value: object, containers: Sequence[str]) -> Steps:
    if not isinstance(value, list):
        raise _bad(f"{phase.value} is not a list", "write a list of hooks")
    steps = []
    for index, entry in enumerate(value):
        at_once = entry if isinstance(entry, list) else [entry]
        where = f"{phase.value}[{index}]"
        if not at_once:
            raise _bad(f"{where} is an empty list", "leave it out")
        steps.append(tuple(_hook(phase, each, where, containers) for each in at_once))
    hooks = list(itertools.chain.from_iterable(steps))
    if len(hooks) > _MOST_HOOKS:
        raise _bad(
            f"{phase.value} has {len(hooks)} hooks", f"at most {_MOST_HOOKS}: join some in a script"
        )
    for name in (hook.name for hook in hooks):
        if sum(hook.name == name for hook in hooks) > 1:
            raise _bad(f"two hooks of {phase.value} are called {name!r}", "give each its own name")
    longest_s = sum(max(hook.deadline_s for hook in step) for step in steps)
    if longest_s > LONGEST_S:
        raise _bad(
            f"the hooks of {phase.value} may take {longest_s:g} s together",
            f"keep the sum of deadlineSeconds to {LONGEST_S:g}",
        )
    return tuple(steps)


_COMMON = ("name", "container", "scope", "deadlineSeconds")
_OF_PHASE = {Phase.PRE: "onFailure", Phase.POST: "when"}


def _hook(phase: Phase, value: object, where: str, containers: Sequence[str]) -> Hook:
    if not isinstance(value, dict):
        raise _bad(f"{where} is not a JSON object", "write a hook, or a list of hooks")
    name = value.get("name")
    if not isinstance(name, str) or not _LABEL.fullmatch(name):
        raise _bad(f"{where} has no name", '"name": small letters, digits and -')
    where = f"hook {name!r} of {phase.value}"
    kinds = [kind for kind in _KINDS if kind in value]
    if len(kinds) != 1:
        said = f"both {kinds[0]} and {kinds[1]}" if kinds else "nothing that it does"
        raise _bad(f"{where} says {said}", f"write one of {', '.join(_KINDS)}")
    kind = kinds[0]
    extra = ("path",) if kind == "action" else ()
    _only(value, (*_COMMON, _OF_PHASE[phase], kind, *extra), where)
    container = value.get("container", "")
    means = _KINDS[kind](value, where)
    of_the_pod = isinstance(means, Http) or (isinstance(means, Grpc) and not means.socket)
    if container != "" and (of_the_pod or container not in containers):
        way_out = "leave it out: the pod has one network" if of_the_pod else _listed(containers)
        raise _bad(f"the container of {where} cannot be {container!r}", way_out)
    return Hook(
        name=name,
        means=means,
        container=container,
        scope=Scope(_choice(value, "scope", Scope, Scope.MEMBER, where)),
        deadline_s=_deadline_s(value, where),
        aborts=phase is Phase.PRE
        and _choice(value, "onFailure", _Policy, _Policy.ABORT, where) == "abort",
        when=When(_choice(value, "when", When, When.RUNNING, where)),
    )


class _Policy(enum.Enum):
    ABORT = "abort"
    IGNORE = "ignore"


def _exec(value: Mapping[str, Any], where: str) -> Means:
    argv = value["exec"]
    if not isinstance(argv, list) or not argv or not all(_is_word(word) for word in argv):
        raise _bad(f"the command of {where} is no list of words", '"exec": ["/app/quiesce", "-v"]')
    if not argv[0] or "=" in argv[0] or argv[0].startswith("-"):
        # The program stands behind variables that it is given: env takes such a word for one.
        raise _bad(f"{where} cannot run a program called {argv[0]!r}", "give its path")
    return Exec(tuple(argv))


def _is_word(value: object) -> bool:
    """Whether a command or the kernel can be given it."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()  # JSON can say half a character (a lone surrogate)
    except UnicodeEncodeError:
        return False
    return True


def _http(value: Mapping[str, Any], where: str) -> Means:
    said = value["http"]
    port = said.get("port") if isinstance(said, dict) else None
    if not _is_port(port):
        raise _bad(f"http of {where} has no port", '"http": {"port": 8080, "path": "/quiesce"}')
    _only(said, ("port", "path"), f"http of {where}")
    return Http(int(said["port"]), _request_path(said, where))


def _unix(value: Mapping[str, Any], where: str) -> Means:
    said = value["unix"]
    place = said.get("socket") if isinstance(said, dict) else None
    if not _is_path(place):
        raise _bad(
            f"unix of {where} has no socket",
            '"unix": {"socket": "/run/quiesce.sock", "path": "/quiesce"}',
        )
    _only(said, ("socket", "path"), f"unix of {where}")
    return Unix(str(place), _request_path(said, where))


def _grpc(value: Mapping[str, Any], where: str) -> Means:
    said = value["grpc"]
    given = said if isinstance(said, dict) else {}
    port, place = given.get("port"), given.get("socket")
    if ("port" in given) == ("socket" in given) or not (_is_port(port) or _is_path(place)):
        raise _bad(
            f"grpc of {where} has neither a port nor a socket, or both",
            '"grpc": {"port": 50051}, or {"socket": "/run/hooks.sock"}',
        )
    _only(given, ("port", "socket"), f"grpc of {where}")
    return Grpc(port or 0, place or "")


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 16


def _request_path(said: Mapping[str, Any], where: str) -> str:
    path = said.get("path", "/")
    if not isinstance(path, str) or not _REQUEST_PATH.fullmatch(path):
        raise _bad(f"the path of {where} is not that of a request", 'write it like "/quiesce"')
    return path


def _builtin(value: Mapping[str, Any], where: str) -> Means:
    known = [action.value for action in Action]
    if value["action"] not in known:
        raise _bad(f"{where} is no action that there is", f"there are {', '.join(known)}")
    action, path = Action(value["action"]), value.get("path", "")
    if path != "" and not _is_path(path):
        raise _bad(f"the path of {where} is not absolute", "give a file or directory, from /")
    if action is Action.DROP_CACHES and not path:
        raise _bad(f"{where} does not say whose caches", 'add "path": a file or directory')
    return Builtin(action, path)


def _is_path(value: object) -> bool:
    return _is_word(value) and posixpath.isabs(str(value))


_KINDS = {"exec": _exec, "http": _http, "unix": _unix, "grpc": _grpc, "action": _builtin}


def _deadline_s(value: Mapping[str, Any], where: str) -> float:
    found = value.get("deadlineSeconds", DEADLINE_S)
    number = isinstance(found, int | float) and not isinstance(found, bool)
    # Compared only: an integer may be too large for anything else, and no comparison holds of NaN.
    if not number or not 0 < found <= LONGEST_S:
        raise _bad(
            f"deadlineSeconds of {where} is no time", f"a number above 0, at most {LONGEST_S:g}"
        )
    return float(found)


def _choice(
    value: Mapping[str, Any], key: str, kind: type[enum.Enum], default: enum.Enum, where: str
) -> str:
    found = value.get(key, default.value)
    known = [each.value for each in kind]
    if found not in known:
        raise _bad(f"{key} of {where} cannot be {found!r}", f"write one of {', '.join(known)}")
    return str(found)


def _only(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown: Iterator[str] = (key for key in value if key not in known)
    if (key := next(unknown, None)) is not None:
        raise _bad(f"{where} has {key!r}, which means nothing there", _listed(known))


def _listed(known: Sequence[str]) -> str:
    return f"there are {', '.join(known)}"


def _bad(what: str, way_out: str) -> errors.InvalidInput:
    return errors.InvalidInput(f"the annotation {optin.HOOKS}: {what}", hint=way_out)
