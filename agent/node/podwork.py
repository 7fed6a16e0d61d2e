"""Dumps and restores of pods: from a pod's name to members, an epoch, and back.

Promises: what is asked for is checked and found before anything is touched; each operation is let
in, told (log, event on the pod) and counted out; an image says of which pod it is.
Does not: know how the caller is reached.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from agent import errors
from agent.engines.base import CaptureOptions, Engine, Gate, RestoredTree, RestoreOptions
from agent.host import addresses, clock
from agent.kube.events import Reason
from agent.model import cut, ids, jobset, pods
from agent.model.container import Container
from agent.model.hooks import Outcome
from agent.model.pods import Placement, Pod
from agent.model.streams import MemberSource
from agent.node import archives, claims, interrupted
from agent.node import dump as node_dump
from agent.node import restore as node_restore
from agent.node.operations import Operations
from agent.node.podhooks import Around, PodHooks
from agent.node.pods import Pods
from agent.node.storages import Found, Storages
from agent.store.repository import EpochReader, EpochSummary

_log = logging.getLogger(__name__)

# What came before hooks that are owed has ended by then: a dump has so long by default (settings).
_OWED_S = 600.0
_OWED_AGAIN_S = 0.25

# The keys of an epoch's facts that say of which pod it is.
POD_FACTS = ("namespace", "pod_uid", "node", "addresses", "pod_template")


class Engines(Protocol):
    """How containers are captured and restored; the wiring knows the concrete ones."""

    def for_dump(self, wanted: str, pod: Pod, containers: Sequence[Container]) -> Engine:
        """An engine for one dump; ``wanted`` is container, kubelet or "" for whichever can.

        Raises:
            errors.Refused | errors.EnvironmentUnfit: there is none that can.
        """

    def for_restore(self, pod: Pod, containers: Sequence[Container]) -> Engine:
        """An engine for one restore into these placeholders; the same errors."""

    def check_image(self, source: MemberSource) -> None:
        """Look at what an image lacks for any restore.

        Raises:
            errors.RestoreConflict: with every reason.
            errors.DataError: it is damaged.
        """


class Teller(Protocol):
    """Tells people what happened to a pod (agent.kube.events)."""

    def tell(self, pod: Pod, reason: Reason, note: str) -> None:
        """Put an event on the pod; returns at once."""


@dataclasses.dataclass(frozen=True)
class DumpOrder:
    """What a caller wants dumped; see the API's DumpRequest."""

    namespace: ids.Namespace
    pod: str
    pod_uid: str
    containers: tuple[str, ...]
    engine: str
    stop: bool
    options: CaptureOptions
    one_of_many: bool = False
    """People are told of its failure only."""


@dataclasses.dataclass(frozen=True)
class PodDump:
    """A committed dump, the pod it is of with what makes another like it, and the storage that the
    image lies in; ``problems`` are of hooks that fail nothing.
    """

    outcome: node_dump.DumpOutcome
    pod: Pod
    template_json: str
    engine: str
    storage: str
    problems: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class RestoreOrder:
    """What a caller wants restored; see the API's RestoreRequest."""

    namespace: ids.Namespace
    image: str
    storage: str
    pod: str
    pod_uid: str
    again: bool
    options: RestoreOptions


@dataclasses.dataclass(frozen=True)
class PodRestore:
    """A placeholder that runs the image's processes now; seconds from the request; ``problems`` as
    for ``PodDump``.
    """

    outcome: node_restore.RestoreOutcome
    was: Placement
    now: Placement
    storage: str
    waited_s: float
    running_s: float
    problems: tuple[str, ...] = ()


class PodWork:
    """Dumps and restores pods of this node."""

    def __init__(
        self,
        pods: Pods,
        engines: Engines,
        storages: Storages,
        operations: Operations,
        trail: interrupted.Trail,
        teller: Teller,
        hooks: PodHooks,
    ) -> None:
        self._pods = pods
        self._engines = engines
        self._storages = storages
        self._operations = operations
        self._trail = trail
        self._teller = teller
        self._hooks = hooks

    def dump(
        self,
        order: DumpOrder,
        cancel: node_dump.Cancel,
        progress: Callable[[node_dump.Progress], None],
    ) -> PodDump:
        """Dump a pod; raises as ``node.dump.dump``, and what finding the pod, letting the
        operation in and choosing the storage raises.
        """
        pod = self._pods.find(order.namespace, order.pod, order.pod_uid)
        containers = self._pods.running(pod, order.containers)
        with (
            self._operations.begin("dump", f"pod {pod}", _keys(pod, containers), cancel),
            self._told(pod, "dump"),
            self._trail.noted("dump", pod),
        ):
            storage = self._storages.for_pod(pod)
            # A kubelet stops nothing: whoever wants that is to hear why the other engine cannot.
            wanted = order.engine or ("container" if order.stop else "")
            engine = self._engines.for_dump(wanted, pod, containers)
            known = facts(pod, containers)
            within = frozenset((*known["addresses"], cut.LOCALHOST))
            around = self._hooks.around(pod, containers)
            try:
                outcome = node_dump.dump(
                    self._storages.make(order.namespace, storage),
                    engine,
                    ids.group_name(pod.name),
                    [node_dump.Member(ids.member_name(each.name), each.pid) for each in containers],
                    dataclasses.replace(order.options, within=within),
                    stop=order.stop,
                    facts=known,
                    cancel=cancel,
                    progress=progress,
                    around=around,
                )
            except BaseException:
                around.after(Outcome.ABORTED)
                raise
            image = ids.image_name(outcome.epoch.group, outcome.epoch.epoch)
            if not order.stop:
                around.after(Outcome.COMMITTED, image)
            if not order.one_of_many:
                self._teller.tell(
                    pod,
                    "CheckpointCompleted",
                    f"Image {image} of {', '.join(each.name for each in containers)}, stopped for"
                    f" {outcome.stop_s:.3f} s, durable after {outcome.durable_s:.1f} s",
                )
            template = template_json(known)
            return PodDump(outcome, pod, template, engine.name, storage, around.problems)

    @contextmanager
    def taking_part(
        self,
        kind: interrupted.Kind,
        pod: Pod,
        containers: Sequence[Container],
        cancel: node_dump.Cancel,
        image: str,
    ) -> Iterator[None]:
        """Count the pod's part in the epoch ``image`` of several pods as a dump or a restore of it;
        ``cancel`` is asked to give it up. Raises as ``Operations.begin``.
        """
        keys, part_of = _keys(pod, containers), f"{kind} of {pod.namespace}/{image}"
        with (
            self._operations.begin(kind, f"pod {pod}", keys, cancel, part_of),
            self._trail.noted(kind, pod),
        ):
            yield

    def run_owed_hooks(self) -> None:
        """Run the post hooks that a killed predecessor owes; returns at once."""
        self._hooks.follow_up(
            lambda left: self._pods.with_containers(left.namespace, left.pod, left.uid),
            self._alone,
        )

    @contextmanager
    def _alone(self, pod: Pod, containers: Sequence[Container]) -> Iterator[None]:
        """Do nothing else to the pod meanwhile, as soon as what came first has ended. What is owed
        to all pods counts as one operation. Raises as ``Operations.begin``.
        """
        deadline, keys = clock.Deadline.after(_OWED_S), _keys(pod, containers)
        refused: list[errors.CkptError] = []
        with contextlib.ExitStack() as stack:

            def let_in() -> bool:
                try:
                    stack.enter_context(
                        self._operations.begin(
                            "dump", f"pod {pod}", keys, node_dump.Cancel(), "owed post hooks"
                        )
                    )
                except (errors.TargetBusy, errors.Overloaded) as exc:
                    refused[:] = [exc]
                    return False
                return True

            if not clock.wait_until(let_in, deadline, every_s=_OWED_AGAIN_S):
                raise refused[-1]
            yield

    def tell(self, pod: Pod, reason: Reason, note: str) -> None:
        """Put an event on the pod; returns at once."""
        self._teller.tell(pod, reason, note)

    def hooks(
        self, pod: Pod, containers: Sequence[Container], *, leads: bool, image: str
    ) -> Around:
        """The pod's hooks around a checkpoint; raises as ``PodHooks.around``."""
        return self._hooks.around(pod, containers, leads=leads, image=image)

    def tell_restored(
        self,
        pod: Pod,
        containers: Sequence[Container],
        image: str,
        was: Placement,
        *,
        leads: bool,
    ) -> None:
        """Run the post hooks of a pod that runs a group's image now."""
        self._hooks.restored(pod, containers, image, was, leads=leads)

    def engine(self, pod: Pod, containers: Sequence[Container], wanted: str = "") -> Engine:
        """The engine that captures these containers; as ``Engines.for_dump``."""
        return self._engines.for_dump(wanted, pod, containers)

    def engine_for_restore(self, pod: Pod, containers: Sequence[Container]) -> Engine:
        """The engine that restores into these placeholders; raises as ``Engines.for_restore``."""
        return self._engines.for_restore(pod, containers)

    def restore(
        self,
        order: RestoreOrder,
        cancel: node_dump.Cancel,
        progress: Callable[[str], None],
    ) -> PodRestore:
        """Restore an image into its placeholder; raises as ``node.restore.restore``, and what
        waiting for the placeholder, claiming the image and letting the operation in raises. One
        that was done before is not done again: its outcome has no times.
        """
        began_s = clock.monotonic_s()
        deadline = clock.Deadline.after(order.options.deadline_s)
        found = self._storages.find(order.namespace, order.image, order.storage)
        store, image = found.store, found.image
        reader = store.read(found.group, found.epoch)
        check_ours(reader.facts, image)
        members = reader.members
        progress("waiting")
        try:
            pod, containers = self._pods.holding(
                order.namespace, order.pod, order.pod_uid, members, deadline, cancel.check
            )
        except errors.TargetUnsuitable:
            done = self._already(order, found, reader)
            if done is None:
                raise
            return done
        waited_s = clock.monotonic_s() - began_s
        with (
            self._operations.begin("restore", f"pod {pod}", _keys(pod, containers), cancel),
            self._told(pod, "restore"),
            self._trail.noted("restore", pod),
        ):
            with claims.claimed(
                store.volume,
                image,
                pod,
                again=order.again,
                containers=[each.id for each in containers],
            ):
                engine = self._engines.for_restore(pod, containers)
                outcome = node_restore.restore(
                    store,
                    _Cancellable(engine, cancel),
                    image,
                    dataclasses.replace(order.options, deadline_s=deadline.remaining_s),
                    progress=lambda step: self._step(step, cancel, progress),
                )
            # The image's processes run: whatever fails now, the claim stays.
            running_s = clock.monotonic_s() - began_s
            self._teller.tell(
                pod, "RestoreCompleted", f"Image {image}, running after {running_s:.1f} s"
            )
            was, now = _was(outcome.epoch), _now(pod, containers)
            problems = self._hooks.restored(pod, containers, image, was)
            return PodRestore(outcome, was, now, found.storage, waited_s, running_s, problems)

    def _already(self, order: RestoreOrder, found: Found, reader: EpochReader) -> PodRestore | None:
        """The answer to a restore that was done already in the very containers that run now: its
        caller may have missed it when the connection broke, and asks again.
        """
        with contextlib.suppress(errors.Refused):
            pod = self._pods.find(order.namespace, order.pod, order.pod_uid)
            containers = self._pods.running(pod, tuple(reader.members))
            if claims.names(found.store.volume, found.image, [each.id for each in containers]):
                outcome = node_restore.RestoreOutcome(reader.summary, (), 0.0, 0.0)
                was, now = _was(reader.summary), _now(pod, containers)
                return PodRestore(outcome, was, now, found.storage, 0.0, 0.0)
        return None

    def _step(
        self,
        step: node_restore.Progress,
        cancel: node_dump.Cancel,
        progress: Callable[[str], None],
    ) -> None:
        if step.phase != "done":
            cancel.check()
        progress(step.phase)

    def obstacles(self, facts: Mapping[str, Any], sources: Sequence[MemberSource]) -> list[str]:
        """Why an epoch with these facts and members can be restored into no pod; every reason."""
        found = []
        try:
            check_ours(facts, "")
        except errors.RestoreConflict as exc:
            found += _reasons(exc)
        for source in sources:
            try:
                self._engines.check_image(source)
            except (errors.RestoreConflict, errors.DataError) as exc:
                found += _reasons(exc)
        return found

    @contextmanager
    def _told(self, pod: Pod, kind: interrupted.Kind) -> Iterator[None]:
        """Tell the pod's people of a failure inside."""
        reason: Reason = "CheckpointFailed" if kind == "dump" else "RestoreFailed"
        try:
            yield
        except errors.CkptError as exc:
            self._teller.tell(pod, reason, f"{exc.message} ({exc.code})")
            raise
        except Exception:
            self._teller.tell(pod, reason, "the agent met a defect; its log says more")
            raise


def _keys(pod: Pod, containers: Sequence[Container]) -> list[tuple[str, str]]:
    return [(pod.uid, each.name) for each in containers]


def facts(pod: Pod, containers: Sequence[Container]) -> dict[str, Any]:
    """What an epoch tells of its pod (``POD_FACTS``)."""
    started = {each.name: each.args for each in containers}
    template = pods.with_entrypoints(json.loads(pod.template_json), started)
    here = addresses.of(containers[0].pid)
    return dict(zip(POD_FACTS, (pod.namespace, pod.uid, pod.node, here, template), strict=True))


def _was(found: EpochSummary) -> Placement:
    """Where an epoch was taken; what it does not say is empty."""
    words = [found.facts.get(key) for key in ("pod_uid", "node")]
    uid, node = (word if isinstance(word, str) else "" for word in words)
    told = found.facts.get("addresses")
    known = told if isinstance(told, list) else []
    return Placement(str(found.group), uid, node, tuple(str(each) for each in known))


def _now(pod: Pod, containers: Sequence[Container]) -> Placement:
    return Placement(pod.name, pod.uid, pod.node, tuple(addresses.of(containers[0].pid)))


def _reasons(exc: errors.CkptError) -> list[str]:
    found = exc.facts.get("reasons")
    return [str(each) for each in found] if isinstance(found, list | tuple) else [exc.message]


def check_ours(facts: Mapping[str, Any], image: str) -> None:
    """Refuse an image that came from outside: CRIU gives processes what their images say, with the
    agent's own rights, and whoever may import is not trusted with those.
    """
    if facts.get("engine") == archives.IMPORTED:
        raise errors.RestoreConflict(
            f"image {image} was imported: what wrote it is not known, and its processes would get"
            " whatever privileges it says",
            hint="dump the pod in this cluster, or let a container runtime restore the image"
            " (ckpt-agent export --format oci)",
            reasons=["the image was imported"],
        )


def template_json(facts: Mapping[str, Any]) -> str:
    """The pod that an epoch is of, from the epoch's facts; "" if it is of none."""
    template = facts.get("pod_template")
    return json.dumps(template, separators=(",", ":")) if isinstance(template, dict) else ""


def jobset_json(facts: Mapping[str, Any]) -> str:
    """The JobSet that an epoch is of, from the epoch's facts; "" if it is of none."""
    template = facts.get(jobset.TEMPLATE)
    return json.dumps(template, separators=(",", ":")) if isinstance(template, dict) else ""


def placements(facts: Mapping[str, Any]) -> list[tuple[str, Placement]]:
    """Where each pod of an epoch of several was, by what the group calls it; what the epoch does
    not say is empty.
    """
    told = facts.get("pods")
    found = []
    for each in told if isinstance(told, list) else ():
        if isinstance(each, dict) and isinstance(each.get("member"), str):
            metadata = (each.get("pod_template") or {}).get("metadata") or {}
            known = [str(address) for address in each.get("addresses") or ()]
            name, uid, node = metadata.get("name"), each.get("pod_uid"), each.get("node")
            where = Placement(str(name or ""), str(uid or ""), str(node or ""), tuple(known))
            found.append((each["member"], where))
    return found


class _Cancellable:
    """An engine whose restore asks once more before anything runs."""

    def __init__(self, engine: Engine, cancel: node_dump.Cancel) -> None:
        self._engine = engine
        self._cancel = cancel
        self.name = engine.name
        self.promises = engine.promises
        self.capture = engine.capture

    def check_restore(self, source: MemberSource, options: RestoreOptions) -> None:
        """As the engine."""
        self._cancel.check()
        self._engine.check_restore(source, options)

    def restore(self, source: MemberSource, options: RestoreOptions, gate: Gate) -> RestoredTree:
        """As the engine."""
        return self._engine.restore(source, options, _AskingGate(gate, self._cancel))


class _AskingGate:
    def __init__(self, gate: Gate, cancel: node_dump.Cancel) -> None:
        self._gate = gate
        self._cancel = cancel

    def filled(self) -> None:
        self._cancel.check()
        self._gate.filled()

    def restored(self) -> None:
        self._cancel.check()
        self._gate.restored()

    def released(self) -> None:
        self._gate.released()
