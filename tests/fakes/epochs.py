"""The epochs API of a fake agent: the participant and the session that ship, over real gRPC;
processes that are words.

``Group`` is what all agents of a cluster share: the store's decisions, and what became of each pod.
"""

# ruff: noqa: N802  a servicer's methods are called as the API calls them

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import grpc

from agent import errors
from agent.model import protocol
from agent.model.protocol import RESTORE, Answer, Course, Decision, Said, Step, Told
from agent.node.participant import Timer
from agent.node.session import SILENCE_S, Session
from agent.rpc import convert, status
from agent.rpc.v1 import epochs_pb2, epochs_pb2_grpc, node_pb2
from tests.fakes.nodeagent import Cluster

# Shorter, and a coordinator that is only kept waiting by a busy machine would be taken for gone.
TIMERS_S = {Timer.SILENCE: SILENCE_S, Timer.STOPPED: 60.0}

_COURSES = {
    epochs_pb2.COURSE_LEAVE_RUNNING: protocol.LEAVE_RUNNING,
    epochs_pb2.COURSE_EVACUATE: protocol.EVACUATE,
    epochs_pb2.COURSE_RESTORE: RESTORE,
}
_WHAT_HAPPENS = {
    Step.FREEZE: "stopped",
    Step.RESUME: "running",
    Step.END: "ended",
    Step.RUN: "running",
}


@dataclasses.dataclass
class Group:
    """``processes`` are by the pods' uids, ``before`` is called with each step and its pod."""

    cluster: Cluster
    decisions: dict[str, Decision] = dataclasses.field(default_factory=dict)
    attempts: dict[str, Decision] = dataclasses.field(default_factory=dict)
    processes: dict[str, str] = dataclasses.field(default_factory=dict)
    named: int = 0
    # The epochs and attempts that pods were told to prepare.
    tellings: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    facts: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    before: Callable[[Step, str], None] = lambda step, pod: None
    # Called when a decision is asked for: before it is made, and when it is.
    deciding: Callable[[str], None] = lambda name: None
    decided: Callable[[str], None] = lambda name: None
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    sessions: dict[tuple[str, ...], Session] = dataclasses.field(default_factory=dict)
    placements: dict[str, node_pb2.Placement] = dataclasses.field(default_factory=dict)

    def decide(
        self, table: dict[str, Decision], name: str, wish: Decision
    ) -> tuple[Decision, bool]:
        """What it is, and whether that is new."""
        with self.lock:
            new = name not in table
            return table.setdefault(name, wish), new

    def hear_nothing(self) -> None:
        """What time does to members whose coordinator is gone."""
        with self.lock:
            left = list(self.sessions.values())
        for each in left:
            each.leave()


class _Actions:
    def __init__(self, group: Group, request: Any) -> None:
        self._group, self._request = group, request

    def do(self, step: Step) -> bytes:
        self._group.before(step, self._request.pod)
        if step in _WHAT_HAPPENS:
            self._group.processes[self._request.pod_uid] = _WHAT_HAPPENS[step]
        if step is Step.END:
            self._group.cluster.waiting.add(self._request.pod)
        return b"part" if step is Step.PERSIST else b""

    def let_go(self, *, committed: bool) -> bool:
        runs = committed or self._request.course != epochs_pb2.COURSE_RESTORE
        self._group.processes[self._request.pod_uid] = "running" if runs else "absent"
        return runs

    def settle(self) -> Decision:
        request, group = self._request, self._group
        if request.course == epochs_pb2.COURSE_RESTORE:
            return group.decide(group.attempts, request.attempt.id, Decision.ABANDONED)[0]
        return group.decide(group.decisions, request.epoch, Decision.ABANDONED)[0]

    def close(self, decision: Decision) -> None:
        """Nothing was stored."""


class Servicer(epochs_pb2_grpc.EpochsServicer):
    """One agent's."""

    def __init__(self, group: Group, tokens: set[str], node: str) -> None:
        self._group, self._tokens, self._node = group, tokens, node

    def _begin(self, context: grpc.ServicerContext) -> None:
        given = dict(context.invocation_metadata()).get("authorization", "")
        if str(given).removeprefix("Bearer ") not in self._tokens:
            _abort(context, errors.Unauthenticated("the token is not known", hint="log in"))

    def NewEpoch(self, request: Any, context: Any) -> epochs_pb2.NewEpochResponse:
        self._begin(context)
        with self._group.lock:
            self._group.named += 1
            number = self._group.named
        epoch = f"20260131-2300{number:02d}-0a1b2c"
        return epochs_pb2.NewEpochResponse(epoch=epoch, storage=request.storage or "default")

    def TakePart(self, request: Any, context: Any) -> epochs_pb2.TakePartResponse:
        self._begin(context)
        step = Step[epochs_pb2.Step.Name(request.step).removeprefix("STEP_")]
        session = self._session(request, step, _COURSES[request.course])
        if session is None:
            problem = "" if step is Step.ABORT else "this agent knows nothing of the epoch"
            return _said(Said(Answer(step, problem)))
        said = session.tell(Told(step, request.token), min(request.wait_s, 5.0))
        return epochs_pb2.TakePartResponse() if said is None else _said(said)

    def _session(self, request: Any, step: Step, course: Course) -> Session | None:
        key = request.pod_uid, request.epoch, request.attempt.id
        with self._group.lock:
            found = self._group.sessions.get(key)
            if found is None and step is Step.PREPARE:
                self._group.tellings.append((request.epoch, request.attempt.id))
                actions = _Actions(self._group, request)
                found = Session(request.member, course, actions, timers_s=TIMERS_S)
                self._group.sessions[key] = found
                if course is not RESTORE:
                    self._group.processes[request.pod_uid] = "running"
                    self._group.placements[request.member] = node_pb2.Placement(
                        pod=request.pod, pod_uid=request.pod_uid, node=self._node
                    )
                found.start()
            return found

    def DecideEpoch(self, requests: Any, context: Any) -> epochs_pb2.DecideEpochResponse:
        self._begin(context)
        request, *_ = list(requests)
        group, wish = self._group, _wish(request)
        if wish is Decision.COMMITTED:
            group.deciding(request.epoch)
        decision, new = group.decide(group.decisions, request.epoch, wish)
        answer = epochs_pb2.DecideEpochResponse(decision=f"DECISION_{decision.name}")
        if decision is Decision.COMMITTED:
            if new:
                group.facts.append(convert.from_struct(request.facts))
                self._add_image(request)
            found = [each for each in group.cluster.images if each.epoch == request.epoch]
            answer.image.CopyFrom(found[-1])
        if wish is Decision.COMMITTED:
            group.decided(request.epoch)
        return answer

    def _add_image(self, request: Any) -> None:
        group = self._group
        name = f"{request.group}@{request.epoch}"
        image = node_pb2.Image(
            name=name,
            group=request.group,
            epoch=request.epoch,
            members=[f"{each}.trainer" for each in sorted(group.placements)],
            storage=request.storage,
        )
        image.created_at.FromSeconds(1_790_000_000)
        group.cluster.images.append(image)
        group.cluster.details[name] = {
            "pods": [
                node_pb2.PodOfImage(member=each, was=was)
                for each, was in sorted(group.placements.items())
            ]
        }

    def DecideRestore(self, request: Any, context: Any) -> epochs_pb2.DecideRestoreResponse:
        self._begin(context)
        group, wish = self._group, _wish(request)
        if wish is Decision.COMMITTED:
            group.deciding(request.attempt.id)
        decision, _ = group.decide(group.attempts, request.attempt.id, wish)
        if wish is Decision.COMMITTED:
            group.decided(request.attempt.id)
        return epochs_pb2.DecideRestoreResponse(decision=f"DECISION_{decision.name}")


def _wish(request: Any) -> Decision:
    return Decision[epochs_pb2.Decision.Name(request.wish).removeprefix("DECISION_")]


def _said(said: Said) -> epochs_pb2.TakePartResponse:
    answer = epochs_pb2.TakePartResponse(
        answered=True, problem=said.answer.problem, contribution=said.part
    )
    if said.error is not None:
        answer.error.CopyFrom(status.message(said.error))
    return answer


def _abort(context: grpc.ServicerContext, exc: errors.CkptError) -> None:
    context.set_trailing_metadata(status.metadata(exc))
    context.abort(status.code(exc), status.details(exc))


def add(group: Group, tokens: set[str], node: str) -> Callable[[grpc.Server], None]:
    """What adds the service to an agent."""

    def more(server: grpc.Server) -> None:
        epochs_pb2_grpc.add_EpochsServicer_to_server(Servicer(group, tokens, node), server)

    return more
