"""Operations of the coordinator: what each has come to, which may run next, and how one goes on
that another replica had begun.

Promises: pure; what is recorded is recorded before the thing it announces is done, so that from
the record and from what the store and the cluster say it is always known whether the job runs; a
job that runs is never ended by a takeover.
Does not: run, store or show operations.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from agent import errors
from agent.model.access import Caller
from agent.model.protocol import Decision

TRIES = 3
"""How often an operation is begun in all: what ends a coordinator three times is no accident."""

_KEY_CHARACTERS = 128
_ID_CHARACTERS = 20
# A coordinator may come back to members that it has told already, a second later.
_APART_S = 10.0

Json = Mapping[str, Any]


class Kind(enum.Enum):
    """What is asked for."""

    EPOCH = "epoch"
    RESTORE = "restore"
    MIGRATE = "migrate"


class State(enum.Enum):
    """What became of it."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


OVER = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class Stage(enum.Enum):
    """How far it may have come; recorded before it does."""

    BEGUN = "begun"
    """Nothing was touched."""

    NAMED = "named"
    """An epoch has its name; its pods may stand still."""

    COMMITTED = "committed"
    """The epoch is committed; of a move, its pods are ended."""

    INTENDED = "intended"
    """The JobSet may be suspended, to come back as ``Operation.image``."""

    ATTEMPTED = "attempted"
    """A restore of that image has its name, and may be committed under it."""


CANCELLABLE = frozenset({Stage.BEGUN, Stage.NAMED})
"""Where giving up leaves the job as it was; what is past that goes to its end."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation on the pods of ``jobset``, or of a selector if that is "". ``request`` is what
    was asked, ``image``, ``figures``, ``pods`` and ``error`` what is told of it, as JSON values;
    ``epoch`` and ``storage`` name the epoch to come, ``attempt`` the restore under way. Times are
    seconds since 1970, ``ended_s`` 0 until it has ended; ``ordered_s`` is the one by which members
    know its latest coordinator.
    """

    id: str
    namespace: str
    kind: Kind
    group: str
    jobset: str
    request: Json
    caller: Caller
    created_s: float
    deadline_s: float = 0.0
    state: State = State.QUEUED
    stage: Stage = Stage.BEGUN
    step: str = ""
    revision: int = 1
    ended_s: float = 0.0
    ordered_s: float = 0.0
    takeovers: int = 0
    tries: int = 0
    cancelling: bool = False
    epoch: str = ""
    storage: str = ""
    attempt: str = ""
    image: Json | None = None
    figures: Json | None = None
    pods: tuple[Json, ...] = ()
    error: Json | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER

    @property
    def cancellable(self) -> bool:
        """Whether it can still be given up with the job as it was."""
        return not self.over and self.stage in CANCELLABLE

    def changed(self, **changes: Any) -> Operation:
        """The same, later."""
        return dataclasses.replace(self, **changes, revision=self.revision + 1)

    def document(self) -> dict[str, Any]:
        """All of it as JSON values."""
        found = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        found |= {"kind": self.kind.value, "state": self.state.value, "stage": self.stage.value}
        found["caller"] = dataclasses.asdict(self.caller)
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def read(document: Any) -> Operation:
    """The operation of a document.

    Raises:
        errors.Corrupt: it is none.
    """
    try:
        caller = document["caller"]
        known = {each.name for each in dataclasses.fields(Operation)}
        return Operation(
            **{key: value for key, value in document.items() if key in known}
            | {
                "kind": Kind(document["kind"]),
                "state": State(document["state"]),
                "stage": Stage(document["stage"]),
                "pods": tuple(document["pods"]),
                "caller": Caller(
                    str(caller["user"]),
                    tuple(caller["groups"]),
                    str(caller["uid"]),
                    {key: tuple(values) for key, values in caller["extra"].items()},
                ),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise errors.Corrupt(
            f"this is no operation: {type(exc).__name__} {exc}", hint="it was written by another"
        ) from exc


def ordered(before: Operation, now_s: float) -> float:
    """A time for the next coordinator of an operation that is later than that of the one before,
    whose clock may have been ahead.
    """
    return max(now_s, before.ordered_s + _APART_S)


def identity(caller: Caller, namespace: str, key: str) -> str:
    """What the operation is called that ``caller`` asks for with an idempotency ``key``.

    Raises:
        errors.InvalidInput: the key is too long.
    """
    if len(key) > _KEY_CHARACTERS:
        raise errors.InvalidInput(
            f"an idempotency key has at most {_KEY_CHARACTERS} characters", hint="use a UUID"
        )
    said = json.dumps([caller.user, caller.uid, namespace, key]).encode()
    return hashlib.sha256(said).hexdigest()[:_ID_CHARACTERS]


def same_request(known: Operation, wanted: Operation) -> None:
    """Return if ``wanted`` asks what ``known`` was asked.

    Raises:
        errors.InvalidInput: it asks something else.
    """
    if (known.kind, known.request) != (wanted.kind, wanted.request):
        raise errors.InvalidInput(
            f"the idempotency key was used for operation {known.id}, which was asked something"
            " else",
            hint="take a new key for a new request",
            operation=known.id,
        )


def in_the_way(known: Iterable[Operation], namespace: str, group: str) -> Operation | None:
    """The oldest operation with this group that has not ended."""
    found = [
        each
        for each in known
        if not each.over and (each.namespace, each.group) == (namespace, group)
    ]
    return min(found, key=_age, default=None)


def runnable(known: Iterable[Operation], limit: int) -> list[Operation]:
    """Those that begin now: the oldest first, one of a group at a time, ``limit`` of all, of which
    one namespace has three quarters at most.
    """
    known = list(known)
    running = [each for each in known if each.state is State.RUNNING]
    taken = {(each.namespace, each.group) for each in running}
    shares = collections.Counter(each.namespace for each in running)
    found: list[Operation] = []
    for each in sorted(known, key=_age):
        place = each.namespace, each.group
        if each.state is not State.QUEUED or place in taken or len(running) + len(found) >= limit:
            continue
        if shares[each.namespace] >= max(1, limit * 3 // 4):
            continue
        taken.add(place)
        shares[each.namespace] += 1
        found.append(each)
    return found


def removable(known: Iterable[Operation], now_s: float, kept_s: float, most: int) -> list[str]:
    """The ids of those to forget: that ended ``kept_s`` ago, and what is beyond ``most``, which are
    the oldest of the namespaces that have the most.
    """
    ranked: list[tuple[int, float, Operation]] = []
    seen = collections.Counter[str]()
    for each in sorted((each for each in known if each.over), key=lambda each: -each.ended_s):
        seen[each.namespace] += 1
        ranked.append((seen[each.namespace], -each.ended_s, each))
    ranked.sort(key=lambda each: each[:2])
    return [
        each.id
        for i, (_, _, each) in enumerate(ranked)
        if i >= most or each.ended_s + kept_s <= now_s
    ]


def _age(operation: Operation) -> tuple[float, str]:
    return operation.created_s, operation.id


class Job(enum.Enum):
    """What the cluster shows of a JobSet whose operation lost its coordinator."""

    STANDS = "stands"
    """It stands still for this operation, and nothing but its image lets it go on."""

    RUNS = "runs"
    """It runs, or somebody else has to do with it."""


class Next(enum.Enum):
    """How an operation goes on that another replica had begun."""

    BEGIN = "begin"
    """Anew, from the start."""

    FINISH = "finish"
    """It did what was asked; only that is to be told."""

    BRING_BACK = "bring back"
    """The JobSet, from the image that is recorded."""

    CONCLUDE = "conclude"
    """The restore that is committed."""

    CANCEL = "cancel"
    GIVE_UP = "give up"
    """It failed, and the job runs."""


def goes_on(operation: Operation, decision: Decision | None = None, job: Job | None = None) -> Next:
    """How ``operation`` goes on. ``decision`` is what the store says of the epoch that NAMED
    records, or of the attempt that ATTEMPTED does; ``job`` is looked at where ``looks_at_job`` is
    true.
    """
    match operation.stage, decision:
        case (Stage.BEGUN, _) | (Stage.NAMED, Decision.ABANDONED):
            return _again(operation)
        case Stage.NAMED | Stage.COMMITTED, _ if operation.kind is Kind.EPOCH:
            return Next.FINISH
        case Stage.ATTEMPTED, Decision.COMMITTED:
            return Next.CONCLUDE
    if not operation.jobset:
        # Its pods wait on; nothing was ended for it.
        return _again(operation)
    if job is Job.STANDS:
        return Next.BRING_BACK
    # Not begun anew where it was touched before and runs now: somebody else has let it.
    untouched = operation.stage is Stage.NAMED or (
        operation.kind is Kind.RESTORE and operation.stage is Stage.INTENDED
    )
    return _again(operation) if untouched else Next.GIVE_UP


def looks_at_job(operation: Operation, decision: Decision | None) -> bool:
    """Whether ``goes_on`` has to know what the cluster shows of the job."""
    if not operation.jobset:
        return False
    if operation.kind is Kind.EPOCH or decision is Decision.ABANDONED:
        return operation.stage is Stage.ATTEMPTED
    return operation.stage in (Stage.COMMITTED, Stage.INTENDED) or (
        operation.stage is Stage.NAMED and decision is Decision.COMMITTED
    )


def _again(operation: Operation) -> Next:
    if operation.cancelling:
        return Next.CANCEL
    return Next.BEGIN if operation.tries < TRIES else Next.GIVE_UP
