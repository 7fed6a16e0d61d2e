"""A coordinator's side of the epochs API: its calls as plain values.

Promises: as ``client``; a word is said once for each call.
Does not: say anything again; whoever coordinates does.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from agent import errors
from agent.model.protocol import Answer, Course, Decision, Said, Step, Times, Told
from agent.rpc import convert, results, status
from agent.rpc.v1 import epochs_pb2, epochs_pb2_grpc

# Half of what an agent takes in one message; names and facts come beside it.
_MESSAGE_BYTES = 128 << 10

Once = Callable[..., Any]
"""One call of a method with a request, with identity and deadline, whose errors are ours; by a
``timeout_s`` it has to be answered (``client.Agent``).
"""


@dataclasses.dataclass(frozen=True)
class Epoch:
    """An epoch of a group, and in which storage it is."""

    namespace: str
    group: str
    name: str
    storage: str


@dataclasses.dataclass(frozen=True)
class Pod:
    """A pod that takes part as ``member``; the one that ``leads`` runs the hooks of the group. A
    connection from one of the addresses ``within`` that it has not accepted fails the cut.
    ``engine`` captures it, "" for the agent's choice.
    """

    member: str
    name: str
    uid: str
    containers: tuple[str, ...] = ()
    leads: bool = False
    within: tuple[str, ...] = ()
    engine: str = ""


@dataclasses.dataclass(frozen=True)
class MemberStop:
    """A container of the group: how long its pod stood still, and what was read of it."""

    name: str
    stop_s: float
    raw_bytes: int
    processes: int


@dataclasses.dataclass(frozen=True)
class Decided:
    """What an epoch is. ``image`` is there for whoever committed it; ``leaving`` are connections
    that lead out of the group, by pod uid; ``engine`` is what captured the pods, by name.
    """

    decision: Decision
    image: results.Image | None
    connections: int
    leaving: tuple[tuple[str, str, str], ...]
    members: tuple[MemberStop, ...]
    hook_problems: tuple[str, ...] = ()
    engine: str = ""


@dataclasses.dataclass(frozen=True)
class Attempt:
    """An attempt to restore an epoch: its ``name`` (16 hexadecimal digits), the addresses of the
    group's pods when it was cut, each with the new one, and whether it may have been restored
    before.
    """

    name: str
    addresses: Mapping[str, str]
    again: bool = False

    def message(self) -> epochs_pb2.Attempt:
        """As the API has it."""
        return epochs_pb2.Attempt(id=self.name, addresses=self.addresses, again=self.again)


class Epochs:
    """The calls of one agent."""

    def __init__(self, channel: Any, once: Once) -> None:
        self._stub = epochs_pb2_grpc.EpochsStub(channel)
        self._once = once

    def new(self, namespace: str, group: str, storage: str = "") -> Epoch:
        """Name an epoch to come."""
        request = epochs_pb2.NewEpochRequest(namespace=namespace, group=group, storage=storage)
        answer = self._once(self._stub.NewEpoch, request)
        return Epoch(namespace, group, answer.epoch, answer.storage)

    def take_part(
        self,
        epoch: Epoch,
        course: Course,
        pod: Pod,
        told: Told,
        wait_s: float,
        deadline_s: float,
        attempt: Attempt | None = None,
        silent_s: float | None = None,
    ) -> Said | None:
        """Say a word to the agent of a pod; its answer, None if there is none yet. A restore is an
        ``attempt``; what it gives for STAND are the peers of connections that are reset, a line
        each. An agent that is silent for ``silent_s`` beyond ``wait_s`` cannot be reached.
        """
        request = epochs_pb2.TakePartRequest(
            namespace=epoch.namespace,
            group=epoch.group,
            epoch=epoch.name,
            storage=epoch.storage,
            course="COURSE_" + course.name.upper().replace("-", "_"),
            pod=pod.name,
            pod_uid=pod.uid,
            containers=pod.containers,
            member=pod.member,
            leads=pod.leads,
            token=told.token,
            step=f"STEP_{told.step.name}",
            wait_s=wait_s,
            deadline_s=deadline_s,
            attempt=attempt.message() if attempt else None,
            within=pod.within if told.step is Step.PREPARE else (),
            engine=f"ENGINE_{pod.engine.upper() or 'UNSPECIFIED'}",
        )
        timeout_s = None if silent_s is None else wait_s + silent_s
        answer = self._once(self._stub.TakePart, request, timeout_s=timeout_s)
        if not answer.answered:
            return None
        error = status.rebuilt(answer.error) if answer.HasField("error") else None
        part = "\n".join(answer.lost).encode() or answer.contribution
        return Said(Answer(told.step, answer.problem), error, part, _times(answer))

    def decide(
        self,
        epoch: Epoch,
        wish: Decision,
        contributions: Sequence[bytes] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> Decided:
        """Commit or abandon; what it then is."""
        request = epochs_pb2.DecideEpochRequest(
            namespace=epoch.namespace,
            group=epoch.group,
            epoch=epoch.name,
            storage=epoch.storage,
            wish=f"DECISION_{wish.name}",
            facts=convert.to_struct(facts or {}),
        )
        messages = itertools.chain([request], _messages(contributions))
        answer = self._once(self._stub.DecideEpoch, messages)
        decision = _decision(answer)
        leaving = tuple((each.pod_uid, each.local, each.remote) for each in answer.leaving)
        members = tuple(
            MemberStop(each.name, each.stop_s, each.raw_bytes, each.processes)
            for each in answer.members
        )
        image = results.image(answer.image) if answer.HasField("image") else None
        problems = tuple(answer.hook_problems)
        return Decided(
            decision, image, answer.connections, leaving, members, problems, answer.engine
        )

    def decide_restore(
        self, epoch: Epoch, attempt: Attempt, wish: Decision, pod_uids: Sequence[str] = ()
    ) -> Decision:
        """Commit the restore of the epoch into these pods, or abandon it; what it then is."""
        request = epochs_pb2.DecideRestoreRequest(
            namespace=epoch.namespace,
            group=epoch.group,
            epoch=epoch.name,
            storage=epoch.storage,
            attempt=epochs_pb2.Attempt(id=attempt.name, again=attempt.again),
            wish=f"DECISION_{wish.name}",
            pod_uids=pod_uids,
        )
        return _decision(self._once(self._stub.DecideRestore, request))


def _times(answer: epochs_pb2.TakePartResponse) -> Times | None:
    if not answer.HasField("times"):
        return None
    told = answer.times
    return Times(told.heard_s, told.answered_s, told.began_s, told.done_s)


def _messages(contributions: Iterable[bytes]) -> Iterator[epochs_pb2.DecideEpochRequest]:
    """Contributions in messages that an agent takes, whatever their number and lengths."""
    message = epochs_pb2.DecideEpochRequest()
    room_bytes = _MESSAGE_BYTES
    for each in contributions:
        rest = memoryview(each)
        while len(rest) > room_bytes:
            message.contributions.append(bytes(rest[:room_bytes]))
            message.unfinished = True
            yield message
            rest, room_bytes = rest[room_bytes:], _MESSAGE_BYTES
            message = epochs_pb2.DecideEpochRequest()
        message.contributions.append(bytes(rest))
        room_bytes -= len(rest)
    if message.contributions:
        yield message


def _decision(
    answer: epochs_pb2.DecideEpochResponse | epochs_pb2.DecideRestoreResponse,
) -> Decision:
    if answer.decision == epochs_pb2.DECISION_UNSPECIFIED:
        raise errors.AgentDefect("the agent did not say what the epoch is")
    return Decision[epochs_pb2.Decision.Name(answer.decision).removeprefix("DECISION_")]
