"""The epochs API as methods: pods of this node take part in epochs that somebody else coordinates.

Promises: a pod takes part in one epoch at a time, and in none while it is dumped or restored
otherwise; an epoch is committed only if the connections of its members fit together; a session that
ended answers on for ``KEPT_S``, so that an answer that was lost can be had again.
Does not: know gRPC, or ask who the caller is; whoever calls these methods has been let in. Only
what an image says of a JobSet takes a right of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from agent import errors
from agent.engines.base import CaptureOptions, Engine, RestoreOptions
from agent.host import clock
from agent.kube.events import Reason
from agent.model import cut, ids, jobset, protocol
from agent.model.access import Caller, Right
from agent.model.pods import Pod
from agent.model.protocol import Answer, Decision, Said, Told
from agent.node import dump as node_dump
from agent.node import podwork, service
from agent.node.attempts import Attempt
from agent.node.contribution import Contribution
from agent.node.gathering import Gathering
from agent.node.joint import JointDump
from agent.node.jointrestore import JointRestore, Order
from agent.node.session import Session
from agent.node.storages import Found
from agent.rpc import convert, status
from agent.rpc.calls import Call
from agent.rpc.v1 import epochs_pb2 as api
from agent.rpc.v1.node_pb2 import MemberOutcome
from agent.store.repository import Part, Store

_log = logging.getLogger(__name__)

# A coordinator that was cut off comes back within this, or never asks again.
KEPT_S = 600.0
# Whoever waits longer is no better off than one who asks again.
_LONGEST_WAIT_S = 10.0
# No capture takes a day, and clocks take no infinity.
_LONGEST_S = 86400.0

_COURSES = {
    api.COURSE_LEAVE_RUNNING: protocol.LEAVE_RUNNING,
    api.COURSE_LEAVE_RUNNING_HELD: protocol.LEAVE_RUNNING_HELD,
    api.COURSE_EVACUATE: protocol.EVACUATE,
    api.COURSE_RESTORE: protocol.RESTORE,
}
_STEPS = {
    number: protocol.Step[name.removeprefix("STEP_")] for name, number in api.Step.items() if number
}
_WISHES = {
    api.DECISION_COMMITTED: Decision.COMMITTED,
    api.DECISION_ABANDONED: Decision.ABANDONED,
}
_DECISIONS = {decision: number for number, decision in _WISHES.items()}

# Namespace, pod's uid, course, image, and of a restore the attempt.
Key = tuple[str, str, str, str, str]


@dataclasses.dataclass
class _Taking:
    """A session, and since when it has been over."""

    session: Session
    over_s: float | None = None


class EpochService:
    """One method for each of the API's (agent.rpc.server)."""

    def __init__(self, parts: service.Parts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._lock = threading.Lock()
        self._beginning = threading.Lock()
        self._taking: dict[Key, _Taking] = {}
        self._gathering = Gathering()
        # Pods whose memory is not copied ahead the next time, since that failed the last time.
        self._plain: set[str] = set()

    def new_epoch(self, request: api.NewEpochRequest, call: Call) -> api.NewEpochResponse:
        """Name an epoch to come."""
        del call
        namespace = ids.namespace_name(request.namespace)
        storage = self._parts.storages.for_namespace(namespace, request.storage)
        store = self._parts.storages.make(namespace, storage)
        epoch = store.new_epoch(ids.group_name(request.group), now_s=clock.wall_s())
        return api.NewEpochResponse(epoch=epoch, storage=storage)

    def take_part(self, request: api.TakePartRequest, call: Call) -> api.TakePartResponse:
        """Hear a coordinator."""
        heard_s = clock.monotonic_s()
        response = self._heard(request, call)
        response.times.heard_s, response.times.answered_s = heard_s, clock.monotonic_s()
        return response

    def _heard(self, request: api.TakePartRequest, call: Call) -> api.TakePartResponse:
        del call
        step = _STEPS.get(request.step)
        course = _COURSES.get(request.course)
        if step is None or course is None or not request.pod_uid:
            raise errors.InvalidInput(
                "the call lacks its step, its course or the pod's uid", hint="see epochs.proto"
            )
        session = self._session(request, course, step)
        if session is None:
            # Nothing of the epoch is here: what is to be given up already is.
            problem = "" if step is protocol.Step.ABORT else "this agent knows nothing of the epoch"
            return _response(Said(Answer(step, problem)), course)
        wait_s = min(max(0.0, request.wait_s), _LONGEST_WAIT_S)
        said = session.tell(Told(step, request.token), wait_s)
        return api.TakePartResponse() if said is None else _response(said, course)

    def decide_epoch(
        self, request: api.DecideEpochRequest, more: Iterator[api.DecideEpochRequest], call: Call
    ) -> api.DecideEpochResponse:
        """Commit or abandon."""
        wish = _WISHES.get(request.wish)
        if wish is None:
            raise errors.InvalidInput("the call does not say what it wishes")
        namespace = ids.namespace_name(request.namespace)
        group, epoch = ids.group_name(request.group), ids.epoch_id(request.epoch)
        storage = self._parts.storages.for_namespace(namespace, request.storage)
        store = self._parts.storages.make(namespace, storage)
        if wish is Decision.ABANDONED:
            return api.DecideEpochResponse(decision=_DECISIONS[store.abandon(group, epoch)])
        told = self._told(namespace, request, call.caller)
        with self._gathering.gathered(request, more, call) as given:
            return _commit(store, storage, group, epoch, given, told)

    def _told(
        self, namespace: str, request: api.DecideEpochRequest, caller: Caller
    ) -> dict[str, Any]:
        """What the caller tells of the group. A JobSet in it is created one day, with the rights of
        whoever restores: it is left out unless the caller might create it as well.
        """
        told = convert.from_struct(request.facts)
        if jobset.TEMPLATE in told:
            try:
                right = Right("create", "jobsets", namespace, group=jobset.API_GROUP)
                self._parts.authorize(caller, right)
            except (errors.Forbidden, errors.Unreachable) as exc:
                # The epoch stands, and comes back as long as the JobSet is there.
                _log.warning("image %s@%s: no JobSet: %s", request.group, request.epoch, exc)
                del told[jobset.TEMPLATE]
        return told

    def decide_restore(
        self, request: api.DecideRestoreRequest, call: Call
    ) -> api.DecideRestoreResponse:
        """Commit or abandon."""
        del call
        wish = _WISHES.get(request.wish)
        if wish is None:
            raise errors.InvalidInput("the call does not say what it wishes")
        _, attempt = self._attempt(request)
        if wish is Decision.ABANDONED:
            return api.DecideRestoreResponse(decision=_DECISIONS[attempt.abandon()])
        found = attempt.commit(list(request.pod_uids), again=request.attempt.again)
        return api.DecideRestoreResponse(decision=_DECISIONS[found])

    def _attempt(
        self, request: api.TakePartRequest | api.DecideRestoreRequest
    ) -> tuple[Found, Attempt]:
        """The image and the attempt that a request is about."""
        group, epoch = ids.group_name(request.group), ids.epoch_id(request.epoch)
        found = self._parts.storages.find(
            ids.namespace_name(request.namespace), ids.image_name(group, epoch), request.storage
        )
        volume = found.store.volume
        return found, Attempt(volume, found.group, found.epoch, request.attempt.id)

    def _session(
        self,
        request: api.TakePartRequest,
        course: protocol.Course,
        step: protocol.Step,
    ) -> Session | None:
        # What a caller's right was looked up by: who may only dump has no say in a restore, nor
        # whoever may restore one image in that of another.
        back = course is protocol.RESTORE
        image = ids.image_name(ids.group_name(request.group), ids.epoch_id(request.epoch))
        attempt = request.attempt.id if back else ""
        # Whoever takes over for another coordinator need not know which way to be cut was taken.
        kind = protocol.LEAVE_RUNNING if course is protocol.LEAVE_RUNNING_HELD else course
        key = request.namespace, request.pod_uid, kind.name, image, attempt
        if (known := self._known(key)) or step is not protocol.Step.PREPARE:
            return known
        with self._beginning:
            if known := self._known(key):
                return known
            begin = self._begin_restore if back else self._begin
            session = begin(request, course, key)
            with self._lock:
                self._taking[key] = _Taking(session)
            session.start()
            return session

    def _known(self, key: Key) -> Session | None:
        with self._lock:
            self._forget_old()
            taking = self._taking.get(key)
            return taking.session if taking else None

    def _begin(self, request: api.TakePartRequest, course: protocol.Course, key: Key) -> Session:
        parts = self._parts
        namespace = ids.namespace_name(request.namespace)
        group, epoch = ids.group_name(request.group), ids.epoch_id(request.epoch)
        pod = parts.pods.find(namespace, request.pod, request.pod_uid)
        containers = parts.pods.running(pod, tuple(request.containers))
        members = [
            node_dump.Member(ids.member_name(f"{request.member}.{each.name}"), each.pid)
            for each in containers
        ]
        store = parts.storages.make(namespace, request.storage)
        about = {**podwork.facts(pod, containers), "member": request.member}
        leaving = _Leaving()
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                parts.work.taking_part(
                    "dump", pod, containers, leaving, ids.image_name(group, epoch)
                )
            )
            engine = parts.work.engine(pod, containers, service.engine_name(request.engine))
            hold_first = not engine.promises.cuts and engine.promises.holds_first
            _check_takes_part(engine, pod, course)
            about["engine"] = engine.name
            actions = JointDump(
                store,
                engine,
                group,
                epoch,
                course,
                members,
                CaptureOptions(
                    deadline_s=self._allowed_s(request.deadline_s, self._settings.dump_deadline_s),
                    ghost_limit_bytes=self._settings.ghost_limit_bytes,
                    kill=course is protocol.EVACUATE,
                    precopy=self._precopy(pod.uid),
                    precopy_cpu_percent=self._settings.precopy_cpu_percent,
                    precopy_bytes_per_s=self._settings.precopy_rate_bytes,
                    log_level=self._settings.criu_log_level,
                    within=_within(request),
                    hold_first=hold_first,
                ),
                short_stop_failed=functools.partial(self._plain.add, pod.uid),
                place=pod.uid,
                about=about,
                hooks=parts.work.hooks(
                    pod, containers, leads=request.leads, image=ids.image_name(group, epoch)
                ),
                ended=functools.partial(self._tell_end, pod),
                # Last: from here on the session gives back what the operation holds.
                owned=stack.pop_all(),
            )
        session = Session(f"{group}@{epoch}", course, actions, ended=lambda: self._ended(key))
        leaving.session = session
        return session

    def _tell_end(self, pod: Pod, decision: Decision, note: str) -> None:
        committed = decision is Decision.COMMITTED
        reason: Reason = "CheckpointCompleted" if committed else "CheckpointFailed"
        self._parts.work.tell(pod, reason, note)

    def _precopy(self, pod_uid: str) -> bool:
        if pod_uid in self._plain:
            self._plain.discard(pod_uid)
            return False
        return self._settings.precopy

    def _begin_restore(
        self, request: api.TakePartRequest, course: protocol.Course, key: Key
    ) -> Session:
        found, attempt = self._attempt(request)
        asked = request.attempt
        try:
            moved = {
                str(ipaddress.ip_address(old)): str(ipaddress.ip_address(new))
                for old, new in asked.addresses.items()
            }
        except ValueError as exc:
            raise errors.InvalidInput(f"no map of addresses: {exc}") from exc
        order = Order(
            namespace=ids.namespace_name(request.namespace),
            pod=request.pod,
            pod_uid=request.pod_uid,
            member=request.member,
            leads=request.leads,
            again=asked.again,
            options=RestoreOptions(
                deadline_s=self._allowed_s(request.deadline_s, self._settings.restore_deadline_s),
                log_level=self._settings.criu_log_level,
                moved=moved,
            ),
        )
        leaving = _Leaving()
        actions = JointRestore(found, attempt, order, self._parts.pods, self._parts.work, leaving)
        session = Session(found.image, course, actions, ended=lambda: self._ended(key))
        leaving.session = session
        return session

    def _allowed_s(self, asked_s: float, default_s: float) -> float:
        """How long the engine may take; the call that begins it ends long before."""
        return min(asked_s, _LONGEST_S) if asked_s > 0 else default_s

    def _ended(self, key: Key) -> None:
        with self._lock:
            self._taking[key].over_s = clock.monotonic_s()

    def _forget_old(self) -> None:
        now_s = clock.monotonic_s()
        for key, each in list(self._taking.items()):
            if each.over_s is not None and now_s - each.over_s > KEPT_S:
                del self._taking[key]


class _Leaving(node_dump.Cancel):
    """Asks a session to take part no longer, where an operation is asked to give up."""

    session: Session | None = None

    def set(self) -> None:
        super().set()
        if self.session is not None:
            self.session.leave()


def _commit(
    store: Store,
    storage: str,
    group: ids.GroupName,
    epoch: ids.EpochId,
    given: Sequence[Contribution],
    told: Mapping[str, Any],
) -> api.DecideEpochResponse:
    verdict = cut.check(end for each in given for end in each.ends)
    if not verdict.consistent:
        raise errors.CutTorn(
            f"the members of {group} were not cut at one instant: {verdict.torn[0]}",
            hint="nothing was kept, the job goes on; try again",
            reasons=[str(each) for each in verdict.torn],
        )
    _check_held(group, verdict, given)
    try:
        summary = store.commit_joint(
            group,
            epoch,
            [Part.decode(each.part) for each in given],
            _facts(told, verdict, given),
            now_s=clock.wall_s(),
        )
    except errors.Conflict:
        if store.decision(group, epoch) is Decision.ABANDONED:
            return api.DecideEpochResponse(decision=api.DECISION_ABANDONED)
        raise
    return api.DecideEpochResponse(
        decision=api.DECISION_COMMITTED,
        image=service.image_message(summary, storage),
        connections=verdict.pairs,
        engine=_engines(given),
        leaving=[
            api.Leaving(
                pod_uid=each.place,
                local=cut.address(each.local, each.local_port),
                remote=cut.address(each.remote, each.remote_port),
            )
            for each in verdict.leaving
        ],
        members=[
            MemberOutcome(
                name=stop.member,
                stop_s=stop.stop_s,
                freeze_s=stop.freeze_s,
                raw_bytes=stop.raw_bytes,
                processes=stop.processes,
            )
            for each in given
            for stop in each.stops
        ],
        hook_problems=[
            f"{each.pod.get('member', '')}: {problem}"
            for each in given
            for problem in each.hook_problems
        ],
    )


def _check_held(group: ids.GroupName, verdict: cut.Verdict, given: Sequence[Contribution]) -> None:
    """Refuse connections between members that ran on while others were read, and heard each other
    through an address that nobody knew to be theirs.
    """
    ran_on = [each for each in given if each.pod.get("engine", "container") != "container"]
    lost = cut.unheld(
        verdict.leaving,
        {end.place for each in ran_on for end in each.ends},
        {address for each in ran_on for address in each.pod.get("addresses", ())},
    )
    if lost:
        raise errors.CutTorn(
            f"members of {group} were not apart: {lost[0]} leads through a Service's address",
            hint="nothing was kept, the job goes on; use the container engine, or let the pods"
            " call each other by their own addresses (a headless Service)",
            reasons=lost,
        )


def _facts(
    told: Mapping[str, Any], verdict: cut.Verdict, given: Sequence[Contribution]
) -> dict[str, Any]:
    return {
        **told,
        "engine": _engines(given),
        "pods": [each.pod for each in given],
        "connections": verdict.pairs,
        "leaving": [each.name for each in verdict.leaving],
        "stops": [dataclasses.asdict(stop) for each in given for stop in each.stops],
    }


def _engines(given: Sequence[Contribution]) -> str:
    return ", ".join(sorted({each.pod.get("engine", "container") for each in given}))


def _check_takes_part(engine: Engine, pod: Pod, course: protocol.Course) -> None:
    """Refuse a pod that its engine can only capture by itself, not end at the cut, or not stop for
    as long as others are read where nobody waits for the holds of all.
    """
    promises = engine.promises
    if not promises.cuts and course is protocol.EVACUATE:
        raise errors.TargetUnsuitable(
            f"pod {pod} is captured by the engine {engine.name}, which cannot end the processes at"
            " the instant of the cut: what they did after it would be done twice",
            hint="dump without --stop, or opt the pod in (docs/opting-in.md) and move it by the"
            " engine container",
        )
    if not promises.cuts and not promises.holds_first:
        raise errors.TargetUnsuitable(
            f"pod {pod} can only be captured by the engine {engine.name}, which cannot hold it at"
            " the instant of a cut",
            hint="opt the pod in (docs/opting-in.md)",
        )
    if not promises.cuts and protocol.Step.HOLD not in course:
        raise errors.HoldNeeded(
            f"pod {pod} is captured by the engine {engine.name} and may run while others are read",
            hint="ask for an epoch with the course leave-running-held",
        )


def _within(request: api.TakePartRequest) -> frozenset[str]:
    """As the engine's options have it."""
    if not request.within:
        return frozenset()
    try:
        told = {str(ipaddress.ip_address(each)) for each in request.within}
    except ValueError as exc:
        raise errors.InvalidInput(f"within: {exc}") from exc
    return frozenset((*told, cut.LOCALHOST))


def _response(said: Said, course: protocol.Course) -> api.TakePartResponse:
    made = api.TakePartResponse(answered=True, problem=said.answer.problem)
    if course is protocol.RESTORE:
        made.lost.extend(said.part.decode().splitlines())
    else:
        made.contribution = said.part
    if said.error is not None:
        made.error.CopyFrom(status.message(said.error))
    if said.times is not None:
        made.times.began_s, made.times.done_s = said.times.began_s, said.times.done_s
    return made
