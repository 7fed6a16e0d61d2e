"""What the steps of a restore do to one pod: its members of a group's image are brought back with
an engine, in the pod's placeholders.

Promises: nothing of the image runs before the attempt is committed; ``let_go`` of an attempt that
is not leaves placeholders that wait, and of one that is, lets what stands run; the pod's members
run all, or none does.
Does not: decide; ``participant`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from agent import errors
from agent.engines.base import Engine, RestoredTree, RestoreOptions
from agent.host import clock, sockets
from agent.model import cut, ids
from agent.model.container import Container
from agent.model.pods import Placement, Pod
from agent.model.protocol import Decision, Step
from agent.model.streams import MemberSource
from agent.node import dump as node_dump
from agent.node import podwork
from agent.node import restore as node_restore
from agent.node.attempts import Attempt
from agent.node.pods import Pods
from agent.node.steppedgate import Stage, SteppedGate
from agent.node.storages import Found

# What stands when the order's time is over may be committed by then, and the word of that comes
# late: so long the engine must still be able to run it. What is committed has as long for each step
# from when it is told to run, however little of the order's time is left.
_DECIDED_S = 120.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Order:
    """Which placeholder is to become ``member`` of the image; see the API's TakePartRequest."""

    namespace: ids.Namespace
    pod: str
    pod_uid: str
    member: str
    leads: bool
    again: bool
    options: RestoreOptions


class JointRestore:
    """The actions of a pod that takes part in the restore of the image ``found``."""

    def __init__(
        self,
        found: Found,
        attempt: Attempt,
        order: Order,
        pods: Pods,
        work: podwork.PodWork,
        cancel: node_dump.Cancel,
    ) -> None:
        """``cancel`` asks the session to give up when the operation is asked to."""
        self._found, self._attempt, self._order = found, attempt, order
        self._pods, self._work, self._cancel = pods, work, cancel
        self._deadline = clock.Deadline.after(order.options.deadline_s)
        self._began_s = clock.monotonic_s()
        self._lock = threading.Lock()
        self._over = False
        self._owned = contextlib.ExitStack()
        self._pod: Pod | None = None
        self._containers: Sequence[Container] = ()
        self._was = Placement("", "", "", ())
        self._halves: frozenset[str] = frozenset()
        self._telling: threading.Thread | None = None
        self._engine: Engine | None = None
        self._sources: Sequence[MemberSource] = ()
        self._gate = SteppedGate(0)
        self._trees: list[Future[RestoredTree]] = []

    def do(self, step: Step) -> bytes:
        """See ``session.Actions``."""
        try:
            if step is Step.PREPARE:
                self._prepare()
            elif step is Step.FILL:
                self._fill()
            elif step is Step.STAND:
                self._gate.reach(Stage.RESTORED, self._deadline)
                return "\n".join(self._lost()).encode()
            elif step is Step.RELEASE:
                self._check_committed()
                self._go_on(Stage.RELEASED)
            elif step is Step.RUN:
                self._check_committed()
                self._run()
        except errors.CkptError as exc:
            self._tell_failed(exc)
            raise
        return b""

    def let_go(self, *, committed: bool) -> bool:
        """See ``session.Actions``."""
        with self._lock:
            self._over = True
        if committed and self._trees:
            try:
                self._go_on(Stage.RELEASED)
                self._go_on(Stage.RUNNING)
            except errors.CkptError as exc:
                _log.error(
                    "image %s is committed to pod %s, and cannot run: %s",
                    self._found.image,
                    self._pod,
                    exc.message,
                )
        self._gate.give_up()
        # The engine has undone what failed; why was told by the step.
        failed = [each for each in self._trees if each.exception()]
        if self._trees and not failed:
            self._tell_restored()
            return True
        for each in self._trees:
            if each not in failed:
                each.result().kill()
        return False

    def settle(self) -> Decision:
        """See ``session.Actions``."""
        return self._attempt.abandon()

    def close(self, decision: Decision) -> None:
        """See ``session.Actions``."""
        del decision
        with contextlib.ExitStack() as owned:
            with self._lock:
                owned.enter_context(self._owned.pop_all())
            if self._telling is not None:
                # Nobody waits for hooks, but nothing else is done to the pod meanwhile.
                rest = self._telling, owned.pop_all()
                threading.Thread(target=_close_after, args=rest, name="post hooks").start()
            _log.info("the restore of image %s in pod %s is over", self._found.image, self._pod)

    def _prepare(self) -> None:
        """Wait for the placeholder, look at what stands in the way, and read the image whole."""
        order, found = self._order, self._found
        reader = found.store.read(found.group, found.epoch)
        podwork.check_ours(reader.facts, found.image)
        members = [name for name in reader.members if name.rpartition(".")[0] == order.member]
        if not members:
            raise errors.NotFound(
                f"image {found.image} has no member {order.member}",
                hint=f"it has {', '.join(reader.members)}",
            )
        if self._attempt.decision() is not None:
            raise errors.Conflict("this attempt to restore is over", hint="begin another one")
        self._attempt.begin(again=order.again)
        names = [name.rpartition(".")[2] for name in members]
        pod, containers = self._pods.holding(
            order.namespace, order.pod, order.pod_uid, names, self._deadline, self._check
        )
        self._pod, self._containers = pod, containers
        self._halves = _texts(reader.facts.get("leaving"))
        was = dict(podwork.placements(reader.facts))
        self._was = was.get(order.member, self._was)
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                self._work.taking_part("restore", pod, containers, self._cancel, found.image)
            )
            stack.enter_context(found.store.hold(reader))
            engine = self._work.engine_for_restore(pod, containers)
            sources = [(name, reader.member(name, parties=len(members))) for name in members]
            node_restore.check_all(engine, sources, order.options, self._began_s)
            for _, source in sources:
                self._check()
                source.check()
            with self._lock:
                self._check()
                self._engine = engine
                self._sources = [source for _, source in sources]
                self._gate = SteppedGate(len(sources))
                self._owned = stack.pop_all()

    def _fill(self) -> None:
        with self._lock:
            self._check()
            if self._engine is None:
                raise errors.RestoreFailed("nothing was prepared")
            pool = ThreadPoolExecutor(len(self._sources), thread_name_prefix="member")
            self._owned.callback(pool.shutdown)
            self._trees = [
                pool.submit(self._restore, self._engine, source) for source in self._sources
            ]
        self._gate.reach(Stage.FILLED, self._deadline)

    def _restore(self, engine: Engine, source: MemberSource) -> RestoredTree:
        allowed_s = self._deadline.remaining_s + _DECIDED_S
        options = dataclasses.replace(
            self._order.options,
            deadline_s=allowed_s,
            halves=self._halves,
            parties=len(self._sources),
        )
        try:
            tree = engine.restore(source, options, self._gate)
        except BaseException as exc:
            self._gate.fail(exc)
            raise
        self._gate.running()
        return tree

    def _check_committed(self) -> None:
        if self._attempt.decision() is not Decision.COMMITTED:
            raise errors.RestoreFailed(
                f"the restore of image {self._found.image} is not committed: nothing runs",
                hint="this is a defect of the coordinator: report it",
            )

    def _go_on(self, stage: Stage) -> None:
        """Let what is committed come to ``stage``: others run, so that it is not undone because
        the order's time is over.
        """
        self._gate.reach(stage, clock.Deadline.after(_DECIDED_S))

    def _run(self) -> None:
        self._go_on(Stage.RUNNING)
        if self._pod is not None:
            running_s = clock.monotonic_s() - self._began_s
            note = f"Image {self._found.image}, running after {running_s:.1f} s"
            self._work.tell(self._pod, "RestoreCompleted", note)
        self._tell_restored()

    def _tell_restored(self) -> None:
        """Let the processes know that they run again, and where; returns at once."""
        pod, image = self._pod, self._found.image
        if pod is None or self._telling is not None:
            return
        self._telling = threading.Thread(
            target=self._work.tell_restored,
            args=(pod, self._containers, image, self._was),
            kwargs={"leads": self._order.leads},
            name="post hooks",
        )
        self._telling.start()

    def _lost(self) -> Iterator[str]:
        """The peers of connections that are reset."""
        moved = self._order.options.moved
        for source in self._sources:
            known = source.facts()
            established = {
                (sockets.unmapped(each["local"]), sockets.unmapped(each["remote"]))
                for each in known.get("sockets", ())
                if each["state"] == "established"
            }
            ends: Sequence[dict[str, Any]] = known.get("tcp_ends", ())
            for each in ends:
                local, remote = str(each["local"]), str(each["remote"])
                here = cut.address(local, int(each["local_port"]))
                there = cut.address(remote, int(each["remote_port"]))
                if remote not in moved and not ipaddress.ip_address(remote).is_loopback:
                    lost = moved.get(local, local) != local
                else:
                    both = {(here, there), (there, here)} & established
                    lost = f"{here} -> {there}" in self._halves and both == {(here, there)}
                if lost:
                    yield there

    def _check(self) -> None:
        if self._over:
            raise errors.RestoreFailed("the restore was given up", hint="the placeholder waits on")

    def _tell_failed(self, exc: errors.CkptError) -> None:
        if self._pod is not None and not self._over:
            self._work.tell(self._pod, "RestoreFailed", f"{exc.message} ({exc.code})")


def _texts(told: object) -> frozenset[str]:
    return frozenset(str(each) for each in told) if isinstance(told, list) else frozenset()


def _close_after(telling: threading.Thread, owned: contextlib.ExitStack) -> None:
    with owned:
        telling.join()
