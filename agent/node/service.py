"""The node API as methods: requests in, answers and events out.

Promises: every name in a request is checked before it names anything; a namespace's images are
found in that namespace's store only; a caller who leaves makes their operation give up.
Does not: know gRPC, or ask who the caller is; whoever calls these methods has been let in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from agent import errors
from agent.engines.base import CaptureOptions, RestoreOptions
from agent.host import clock
from agent.model import checkup, ids
from agent.model.access import Caller, Right
from agent.model.container import Container
from agent.model.plan import Finding, Plan
from agent.model.pods import Placement, Pod
from agent.model.streams import FileEntry
from agent.node import attempts, claims, podlinks, podwatch, podwork
from agent.node import dump as node_dump
from agent.node import watch as node_watch
from agent.node.operations import Operations
from agent.node.pods import Pods
from agent.node.relay import Relay, Sparingly
from agent.node.storages import Found, Storages
from agent.node.transfers import Transfers
from agent.rpc import convert, status
from agent.rpc.calls import Call
from agent.rpc.v1 import node_pb2 as api
from agent.settings import Settings
from agent.store.repository import EpochSummary, PruneReport, Store
from agent.store.retention import Retention

_PAGE = 500
_ENGINES = {
    api.ENGINE_UNSPECIFIED: "",
    api.ENGINE_CONTAINER: "container",
    api.ENGINE_KUBELET: "kubelet",
}
_ENGINE_NUMBERS = {name: number for number, name in _ENGINES.items() if name}

Document = dict[str, Any]


def engine_name(number: api.Engine) -> str:
    """What an engine of the API is called, "" for none in particular.

    Raises:
        errors.InvalidInput: there is none of that number.
    """
    if number not in _ENGINES:
        raise errors.InvalidInput(f"there is no engine {number}", hint="use one that the API names")
    return _ENGINES[number]


class Documents(Protocol):
    """How results look as JSON; the command line's own, so that both print the same."""

    def image_detail(
        self,
        summary: EpochSummary,
        previous: EpochSummary | None,
        members: Iterable[tuple[str, Mapping[str, Any], Sequence[FileEntry]]],
    ) -> Document:
        """One image with its members' facts."""

    def prune_reports(
        self,
        namespace: str,
        reports: Mapping[str, PruneReport],
        unread: Mapping[str, str],
        *,
        dry_run: bool,
    ) -> Document:
        """What was removed, by storage, and where nothing could be, and why."""

    def plan_report(self, found: Plan) -> Document:
        """What a dump would take."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the service is made of. ``authorize`` raises ``errors.Forbidden`` for a caller without
    the right; ``plan`` looks at containers; ``examine`` is the node's check-up.
    """

    settings: Settings
    node: str
    authorize: Callable[[Caller, Right], None]
    pods: Pods
    work: podwork.PodWork
    operations: Operations
    storages: Storages
    transfers: Transfers
    plan: Callable[[Sequence[Container]], Plan]
    examine: Callable[[], Sequence[checkup.Check]]
    documents: Documents


class NodeService:
    """One method for each of the API's (agent.rpc.server)."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._settings = parts.settings
        self._watches = podwatch.PodWatches(parts.pods, parts.work)

    def dump(self, request: api.DumpRequest, call: Call) -> Iterator[api.DumpEvent]:
        """Checkpoint containers of a pod."""
        engine = engine_name(request.engine)
        order = podwork.DumpOrder(
            namespace=ids.namespace_name(request.namespace),
            pod=request.pod,
            pod_uid=request.pod_uid,
            containers=tuple(request.containers),
            engine=engine,
            stop=request.stop,
            options=self._capture_options(request.deadline_s, call),
        )
        cancel = node_dump.Cancel()
        call.on_gone(cancel.set)

        def work(tell: Callable[[api.DumpEvent], None]) -> None:
            sparingly = Sparingly()

            def progress(step: node_dump.Progress) -> None:
                if sparingly.due(step.phase):
                    told = api.DumpProgress(phase=step.phase, raw_bytes=step.raw_bytes)
                    tell(api.DumpEvent(progress=told))

            # From now on a connection that breaks leaves the caller in doubt of what was done.
            progress(node_dump.Progress("capture", 0))
            tell(api.DumpEvent(outcome=_dumped(self._parts.work.dump(order, cancel, progress))))

        return Relay("dump", work).events()

    def watch(self, request: api.WatchRequest, call: Call) -> Iterator[api.WatchEvent]:
        """Checkpoint containers of a pod again and again."""
        every_s = request.every_s or None
        if every_s is not None and not (
            podwatch.SHORTEST_S <= every_s <= podwatch.LONGEST_S and request.count >= 0
        ):
            raise errors.InvalidInput(
                "the call asks for dumps too often, too seldom, or for less than none",
                hint=f"every_s is {podwatch.SHORTEST_S:g} to {podwatch.LONGEST_S:g}, or 0",
            )
        order = podwork.DumpOrder(
            namespace=ids.namespace_name(request.namespace),
            pod=request.pod,
            pod_uid=request.pod_uid,
            containers=tuple(request.containers),
            engine="container",
            stop=False,
            options=self._capture_options(request.deadline_s, call),
            one_of_many=True,
        )
        right = Right("create", "images", order.namespace)
        stop = node_watch.Stop("the watch was ended, the pod goes on")
        call.on_gone(stop.set)

        def work(tell: Callable[[api.WatchEvent], None]) -> None:
            found = self._watches.watch(
                order,
                stop,
                every_s=every_s,
                most=request.count or None,
                allowed=lambda: self._parts.authorize(call.caller, right),
                done=lambda done: tell(api.WatchEvent(epoch=_dumped(done))),
                failed=lambda exc: tell(api.WatchEvent(failed=status.message(exc))),
                late=lambda took_s, pause_s: tell(
                    api.WatchEvent(late=api.WatchLate(took_s=took_s, pause_s=pause_s))
                ),
            )
            last = None if found.last_failed is None else status.message(found.last_failed)
            outcome = api.WatchOutcome(
                epochs=found.epochs,
                failures=found.failures,
                last_failed=last,
                ended=found.ended,
            )
            tell(api.WatchEvent(outcome=outcome))

        return Relay("watch", work).events()

    def _capture_options(self, asked_s: float, call: Call) -> CaptureOptions:
        return CaptureOptions(
            deadline_s=call.allowed_s(asked_s, self._settings.dump_deadline_s),
            ghost_limit_bytes=self._settings.ghost_limit_bytes,
            precopy=self._settings.precopy,
            precopy_cpu_percent=self._settings.precopy_cpu_percent,
            precopy_bytes_per_s=self._settings.precopy_rate_bytes,
            log_level=self._settings.criu_log_level,
        )

    def restore(self, request: api.RestoreRequest, call: Call) -> Iterator[api.RestoreEvent]:
        """Bring an image back into its placeholder."""
        order = podwork.RestoreOrder(
            namespace=ids.namespace_name(request.namespace),
            image=request.image,
            storage=request.storage,
            pod=request.pod,
            pod_uid=request.pod_uid,
            again=request.again,
            options=RestoreOptions(
                deadline_s=call.allowed_s(request.deadline_s, self._settings.restore_deadline_s),
                log_level=self._settings.criu_log_level,
            ),
        )
        cancel = node_dump.Cancel("the restore was given up, the placeholder waits on")
        call.on_gone(cancel.set)

        def work(tell: Callable[[api.RestoreEvent], None]) -> None:
            done = self._parts.work.restore(
                order,
                cancel,
                lambda phase: tell(api.RestoreEvent(progress=api.RestoreProgress(phase=phase))),
            )
            outcome = api.RestoreOutcome(
                image=image_message(done.outcome.epoch, done.storage),
                waited_s=done.waited_s,
                verified_s=done.outcome.verified_s,
                running_s=done.running_s,
                was=_placement(done.was),
                now=_placement(done.now),
                hook_problems=done.problems,
            )
            tell(api.RestoreEvent(outcome=outcome))

        return Relay("restore", work).events()

    def plan_dump(self, request: api.PlanDumpRequest, call: Call) -> api.PlanDumpResponse:
        """Predict a dump."""
        pod = self._parts.pods.find(request.namespace, request.pod)
        containers = self._parts.pods.running(pod, tuple(request.containers))
        found = self._parts.plan(containers)
        blockers = (*found.blockers, *self._unplaced(pod))
        plan = self._parts.documents.plan_report(dataclasses.replace(found, blockers=blockers))
        return api.PlanDumpResponse(
            plan=convert.to_struct(plan),
            connections=[
                api.Connection(local=local, remote=remote)
                for local, remote in podlinks.of(containers)
            ],
        )

    def _unplaced(self, pod: Pod) -> Iterator[Finding]:
        """What keeps a dump of ``pod`` from its storage."""
        try:
            self._parts.storages.for_pod(pod)
        except errors.CkptError as exc:
            yield Finding("storage", f"pod {pod}", exc.message, exc.hint)

    def list_images(self, request: api.ListImagesRequest, call: Call) -> api.ListImagesResponse:
        """The images of a namespace."""
        namespace = ids.namespace_name(request.namespace)
        group = ids.group_name(request.group) if request.group else None
        by_storage, unread = self._parts.storages.each(
            namespace, request.storage, lambda store: store.epochs(group)
        )
        found = sorted(
            ((each, name) for name, epochs in by_storage.items() for each in epochs), key=_order
        )
        if request.page_token:
            after = tuple(request.page_token.split("@"))
            found = [each for each in found if _order(each) > after]
        size = request.page_size if request.page_size > 0 else _PAGE
        page, rest = found[:size], found[size:]
        return api.ListImagesResponse(
            images=[image_message(*each) for each in page],
            next_page_token="@".join(_order(page[-1])) if rest else "",
            unread=[
                api.UnreadStorage(storage=name, problem=problem) for name, problem in unread.items()
            ],
        )

    def get_image(self, request: api.GetImageRequest, call: Call) -> api.GetImageResponse:
        """One image in detail."""
        found = self._find(request)
        store = found.store
        earlier = [each for each in store.epochs(found.group) if each.epoch < found.epoch]
        reader = store.read(found.group, found.epoch)
        sources = [(name, reader.member(name)) for name in reader.members]
        detail = self._parts.documents.image_detail(
            reader.summary,
            earlier[-1] if earlier else None,
            [(name, source.facts(), list(source.files())) for name, source in sources],
        )
        facts = reader.summary.facts
        detail["storage"] = found.storage
        return api.GetImageResponse(
            image=image_message(reader.summary, found.storage),
            detail=convert.to_struct(detail),
            pod_template_json=podwork.template_json(facts),
            pod_uid=_word(facts, "pod_uid"),
            node=_word(facts, "node"),
            restored_into=claims.holder(store.volume, found.image)
            or ", ".join(attempts.holders(store.volume, found.group, found.epoch)),
            obstacles=self._parts.work.obstacles(facts, [source for _, source in sources]),
            pods=[
                api.PodOfImage(member=member, was=_placement(was))
                for member, was in podwork.placements(facts)
            ],
            jobset_json=podwork.jobset_json(facts),
        )

    def verify_image(
        self, request: api.VerifyImageRequest, call: Call
    ) -> Iterator[api.VerifyEvent]:
        """Read an image whole."""
        found = self._find(request)
        cancel = node_dump.Cancel("the image was not read to its end")
        call.on_gone(cancel.set)

        def work(tell: Callable[[api.VerifyEvent], None]) -> None:
            sparingly = Sparingly()

            def progress(done_bytes: int, total_bytes: int) -> None:
                cancel.check()
                if sparingly.due("verify"):
                    tell(api.VerifyEvent(done_bytes=done_bytes, total_bytes=total_bytes))

            what = f"image {request.namespace}/{found.image}"
            with self._parts.operations.begin("verify", what, [what], cancel):
                report = found.store.verify(found.group, found.epoch, progress)
            damaged = [api.Damage(part=one.part, problem=one.problem) for one in report.damaged]
            outcome = api.VerifyOutcome(
                good=report.good, read_bytes=report.read_bytes, damaged=damaged
            )
            tell(api.VerifyEvent(outcome=outcome))

        return Relay("verify", work).events()

    def delete_image(self, request: api.DeleteImageRequest, call: Call) -> api.PruneResponse:
        """Remove one image."""
        found = self._find(request)
        if request.image != found.image:
            raise errors.InvalidInput(
                f"{request.image!r} is not the full name of an image",
                hint=f"for instance {found.image}",
            )
        report = _forgotten(found.store, found.store.delete(found.group, found.epoch))
        return self._removed(request.namespace, {found.storage: report}, {}, dry_run=False)

    def prune_images(self, request: api.PruneImagesRequest, call: Call) -> api.PruneResponse:
        """Remove images by rule."""
        namespace = ids.namespace_name(request.namespace)
        if request.keep_last <= 0 and not request.keep_within_s > 0:
            raise errors.InvalidInput(
                "the request does not say what to keep", hint="set keep_last, keep_within_s or both"
            )
        keep = Retention(
            keep_last=request.keep_last if request.keep_last > 0 else None,
            keep_within_s=request.keep_within_s if request.keep_within_s > 0 else None,
        )
        group = ids.group_name(request.group) if request.group else None

        def prune(store: Store) -> PruneReport:
            report = store.prune(keep, group=group, now_s=clock.wall_s(), dry_run=request.dry_run)
            return report if request.dry_run else _forgotten(store, report)

        reports, unread = self._parts.storages.each(namespace, request.storage, prune)
        if not reports and not unread:
            raise errors.NotFound(
                f"namespace {namespace} has no images", hint="the first dump makes its store"
            )
        return self._removed(namespace, reports, unread, dry_run=request.dry_run)

    def export_image(
        self, request: api.ExportImageRequest, call: Call
    ) -> Iterator[api.ExportImageEvent]:
        """One container of an image as a checkpoint archive."""
        return self._parts.transfers.export(self._find(request), request.member, call)

    def import_image(
        self,
        request: api.ImportImageRequest,
        more: Iterator[api.ImportImageRequest],
        call: Call,
    ) -> api.ImportImageResponse:
        """Store a checkpoint archive as an image."""
        summary, storage = self._parts.transfers.take_in(request, more, self._parts.storages, call)
        return api.ImportImageResponse(image=image_message(summary, storage))

    def examine(self, request: api.ExamineRequest, call: Call) -> api.ExamineResponse:
        """The node's check-up."""
        return api.ExamineResponse(
            node=self._parts.node,
            checks=[
                api.Check(
                    name=each.name,
                    status=each.status,
                    found=each.found,
                    consequence=each.consequence,
                    cure=each.cure,
                )
                for each in self._parts.examine()
            ],
        )

    def _find(
        self,
        request: api.GetImageRequest
        | api.VerifyImageRequest
        | api.DeleteImageRequest
        | api.ExportImageRequest,
    ) -> Found:
        namespace = ids.namespace_name(request.namespace)
        return self._parts.storages.find(namespace, request.image, request.storage)

    def _removed(
        self,
        namespace: str,
        reports: Mapping[str, PruneReport],
        unread: Mapping[str, str],
        *,
        dry_run: bool,
    ) -> api.PruneResponse:
        document = self._parts.documents.prune_reports(namespace, reports, unread, dry_run=dry_run)
        return api.PruneResponse(report=convert.to_struct(document))


def _forgotten(store: Store, report: PruneReport) -> PruneReport:
    for group, epoch in report.removed:
        claims.forget(store.volume, group, epoch)
    attempts.forget(store.volume, report.removed, report.kept, now_s=clock.wall_s())
    return report


def _order(listed: tuple[EpochSummary, str]) -> tuple[str, ...]:
    summary, storage = listed
    return summary.group, summary.epoch, storage


def _word(facts: Mapping[str, Any], key: str) -> str:
    value = facts.get(key)
    return value if isinstance(value, str) else ""


def image_message(summary: EpochSummary, storage: str) -> api.Image:
    """An image as the API shows it."""
    return api.Image(
        name=ids.image_name(summary.group, summary.epoch),
        group=summary.group,
        epoch=summary.epoch,
        created_at=convert.to_timestamp(summary.created_s),
        members=summary.members,
        raw_bytes=summary.raw_bytes,
        new_bytes=summary.new_bytes,
        stored_bytes=summary.stored_bytes,
        pages=summary.pages,
        zero_pages=summary.zero_pages,
        damage=summary.damage or "",
        storage=storage,
    )


def _placement(found: Placement) -> api.Placement:
    return api.Placement(
        pod=found.pod, pod_uid=found.pod_uid, node=found.node, addresses=found.addresses
    )


def _dumped(done: podwork.PodDump) -> api.DumpOutcome:
    outcome = done.outcome
    return api.DumpOutcome(
        image=image_message(outcome.epoch, done.storage),
        stop_s=outcome.stop_s,
        durable_s=outcome.durable_s,
        engine=_ENGINE_NUMBERS.get(done.engine, api.ENGINE_UNSPECIFIED),
        stopped=outcome.stopped,
        members=[
            api.MemberOutcome(
                name=name,
                stop_s=report.stop_s,
                freeze_s=report.freeze_s,
                raw_bytes=report.raw_bytes,
                processes=len(report.pids),
            )
            for name, report in outcome.members
        ],
        pod_template_json=done.template_json,
        hook_problems=done.problems,
    )
