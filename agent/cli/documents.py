"""From what the agent did to what is printed: objects become documents.

Promises: every document has ``apiVersion``, ``kind`` and ``name``, holds JSON values only and
follows docs/output-schema.json; bytes and seconds are numbers in those units, times are RFC 3339
in UTC. Fields may be added within ``v1``, never changed or removed.
Does not: read anything, or decide how a document looks.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from agent.cli.output import Document
from agent.model import ids
from agent.model.streams import PAGE_BYTES

if TYPE_CHECKING:  # a verb loads what it needs; gRPC is not loaded for verbs on this host
    from agent.model import checkup, follow, plan
    from agent.model.archives import Written
    from agent.model.streams import FileEntry
    from agent.node.dump import DumpOutcome
    from agent.node.restore import RestoreOutcome
    from agent.rpc.results import Image
    from agent.store.repository import (
        EpochDiff,
        EpochSummary,
        MemberDiff,
        PruneReport,
        VerifyReport,
    )

API_VERSION = "ckpt-agent.dev/v1"


def document(kind: str, name: str, **fields: Any) -> Document:
    """A document of a kind."""
    return {"apiVersion": API_VERSION, "kind": kind, "name": name, **fields}


def moment(seconds: float) -> str:
    """Seconds since 1970 as they are printed."""
    found = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return found.isoformat(timespec="seconds").replace("+00:00", "Z")


def _created(summary: EpochSummary | Image) -> str:
    """When an epoch was made; a damaged manifest does not tell, but the epoch's name does."""
    if summary.damage is None:
        return moment(summary.created_s)
    try:
        named = datetime.datetime.strptime(f"{summary.epoch[:15]}+0000", "%Y%m%d-%H%M%S%z")
    except ValueError:  # digits that are no date
        return moment(0.0)
    return moment(named.timestamp())


def image_name(summary: EpochSummary | Image) -> str:
    """What restore, show, verify and delete take."""
    return f"{summary.group}@{summary.epoch}"


def image(summary: EpochSummary | Image) -> Document:
    """One image as a listing shows it; in a cluster with the storage that it lies in."""
    storage = getattr(summary, "storage", "")
    more = {"storage": storage} if storage else {}
    return document(
        "Image",
        image_name(summary),
        group=summary.group,
        epoch=summary.epoch,
        createdAt=_created(summary),
        members=list(summary.members),
        rawBytes=summary.raw_bytes,
        newBytes=summary.new_bytes,
        storedBytes=summary.stored_bytes,
        pages=summary.pages,
        zeroPages=summary.zero_pages,
        damage=summary.damage,
        **more,
    )


def image_list(
    store: str,
    summaries: Iterable[EpochSummary | Image],
    unread: Mapping[str, str] | None = None,
) -> Document:
    """Images of a store, or of a namespace in a cluster; there ``unread`` are the storages that
    could not be looked at, and why.
    """
    more = {} if unread is None else {"unread": unread_storages(unread)}
    return document("ImageList", store, items=[image(summary) for summary in summaries], **more)


def image_detail(
    summary: EpochSummary,
    previous: EpochSummary | None,
    members: Iterable[tuple[str, Mapping[str, Any], Sequence[FileEntry]]],
) -> Document:
    """One image with what its members' facts tell. Facts come from a volume and from other
    versions: what is not there is left empty.
    """
    before = ids.image_name(previous.group, previous.epoch) if previous else None
    return image(summary) | {
        "previous": before,
        "detail": [_member(name, facts, files) for name, facts, files in members],
    }


def _member(name: str, facts: Mapping[str, Any], files: Sequence[FileEntry]) -> Document:
    processes = _objects(facts.get("processes"))
    kinds = ("anon", "shmem", "swap", "file")
    totals = {
        kind: sum(_number(_mapping(p.get("memory")).get(f"{kind}_bytes")) for p in processes)
        for kind in kinds
    }
    stop = _mapping(facts.get("stop"))
    return {
        "name": name,
        "engine": _word(facts.get("engine") or facts.get("layout")),
        "stop": {
            "path": _word(stop.get("path")),
            "because": _word(stop.get("because")),
            "tracked": {
                kind: _number(processes)
                for kind, processes in _mapping(stop.get("tracked")).items()
            },
            "trackedBecause": _words(stop.get("untracked_because")),
            "heldBackSeconds": _seconds(stop.get("held_back_s")),
            "hurried": stop.get("hurried") is True,
            "unreadBecause": _word(stop.get("unread_because")),
        },
        "processes": [_process_of_facts(process) for process in processes],
        "memory": _memory(totals["anon"], totals["shmem"], totals["swap"], totals["file"]),
        "files": [
            *(_file(entry.kind, entry.path, entry.size_bytes, travels=True) for entry in files),
            *(
                _file(
                    _word(file.get("use")),
                    _word(file.get("path")),
                    _number(file.get("size_bytes")),
                    travels=False,
                )
                for file in _objects(facts.get("files"))
            ),
        ],
        "sockets": [
            {
                "kind": _word(socket.get("kind")),
                "state": _word(socket.get("state")),
                "local": _word(socket.get("local")),
                "peer": _word(socket.get("remote")),
            }
            for socket in _objects(facts.get("sockets"))
        ],
    }


def _process_of_facts(process: Mapping[str, Any]) -> Document:
    memory = _mapping(process.get("memory"))
    threads = process.get("threads")
    return {
        "pid": _number(process.get("pid")),
        "parent": _number(process.get("ppid")),
        "program": _word(process.get("comm")),
        "state": _word(process.get("state")),
        "threads": len(threads) if isinstance(threads, list) else 0,
        "memoryBytes": sum(_number(memory.get(f"{k}_bytes")) for k in ("anon", "shmem", "swap")),
    }


def _memory(anonymous: int, shared: int, swapped: int, in_files: int) -> list[Document]:
    return [
        {"kind": "anonymous", "bytes": anonymous, "captured": True},
        {"kind": "shared", "bytes": shared, "captured": True},
        {"kind": "swapped", "bytes": swapped, "captured": True},
        {"kind": "file", "bytes": in_files, "captured": False},
    ]


def _file(kind: str, path: str, size_bytes: int, *, travels: bool) -> Document:
    return {"kind": kind, "path": path, "bytes": size_bytes, "travels": travels}


def _objects(value: object) -> list[Mapping[str, Any]]:
    return [each for each in value if isinstance(each, Mapping)] if isinstance(value, list) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _seconds(value: object) -> float:
    return value if isinstance(value, float) else 0.0


def _words(value: object) -> list[str]:
    return [_word(each) for each in value] if isinstance(value, list) else []


def _word(value: object) -> str:
    return value if isinstance(value, str) else ""


def dump_report(outcome: DumpOutcome) -> Document:
    """A committed dump."""
    epoch = outcome.epoch
    return document(
        "DumpReport",
        ids.image_name(epoch.group, epoch.epoch),
        stopped=outcome.stopped,
        stopSeconds=round(outcome.stop_s, 6),
        durableSeconds=round(outcome.durable_s, 6),
        processes=sum(len(report.pids) for _, report in outcome.members),
        rawBytes=epoch.raw_bytes,
        newBytes=epoch.new_bytes,
        storedBytes=epoch.stored_bytes,
        members=[
            {
                "name": name,
                "pids": list(report.pids),
                "stopSeconds": round(report.stop_s, 6),
                "rawBytes": report.raw_bytes,
            }
            for name, report in outcome.members
        ],
    )


def restore_report(outcome: RestoreOutcome, *, isolated: bool) -> Document:
    """Trees that run again."""
    epoch = outcome.epoch
    return document(
        "RestoreReport",
        ids.image_name(epoch.group, epoch.epoch),
        isolated=isolated,
        verifiedSeconds=round(outcome.verified_s, 6),
        runningSeconds=round(outcome.running_s, 6),
        completeSeconds=round(outcome.running_s + outcome.late_s, 6),
        lateBytes=outcome.late_bytes,
        members=[
            {"name": name, "pid": tree.pid, "exitStatus": None} for name, tree in outcome.trees
        ],
    )


def image_diff(found: EpochDiff) -> Document:
    """What an image has against an older one of its group."""
    return document(
        "ImageDiff",
        ids.image_name(found.group, found.newer),
        base=ids.image_name(found.group, found.older),
        members=[_member_diff(member) for member in found.members],
    )


def _member_diff(found: MemberDiff) -> Document:
    memory = found.memory
    return {
        "name": found.member,
        "inBase": found.in_older,
        "inImage": found.in_newer,
        "sameBytes": memory.same * PAGE_BYTES,
        "changedBytes": memory.changed * PAGE_BYTES,
        "addedBytes": memory.added * PAGE_BYTES,
        "removedBytes": memory.removed * PAGE_BYTES,
        "files": [
            {"path": path, "change": change}
            for change, paths in (
                ("changed", found.files.changed),
                ("added", found.files.added),
                ("removed", found.files.removed),
            )
            for path in paths
        ],
    }


def verify_report(name: str, reports: Iterable[tuple[str, VerifyReport]]) -> Document:
    """What reading images whole found."""
    items = [
        {
            "name": image_name,
            "good": report.good,
            "readBytes": report.read_bytes,
            "damaged": [
                {"part": damage.part, "problem": damage.problem} for damage in report.damaged
            ],
        }
        for image_name, report in reports
    ]
    return document("VerifyReport", name, good=all(item["good"] for item in items), items=items)


def export_report(written: Written) -> Document:
    """An archive that was written; ``reference`` is what it is called as an image, if it is one."""
    return document(
        "ExportReport",
        written.image,
        member=written.member,
        path=written.path,
        sizeBytes=written.size_bytes,
        leftOut=list(written.left_out),
        reference=written.reference,
    )


def import_report(summary: EpochSummary | Image) -> Document:
    """An archive that became an image; in a cluster with the storage that it lies in."""
    storage = getattr(summary, "storage", "")
    more = {"storage": storage} if storage else {}
    return document(
        "ImportReport",
        image_name(summary),
        members=list(summary.members),
        rawBytes=summary.raw_bytes,
        newBytes=summary.new_bytes,
        storedBytes=summary.stored_bytes,
        **more,
    )


def prune_report(store: str, report: PruneReport, *, dry_run: bool) -> Document:
    """What was removed, or would be."""
    action = "would remove" if dry_run else "removed"
    return document(
        "PruneReport",
        store,
        dryRun=dry_run,
        freedBytes=report.freed_bytes,
        leftovers=report.leftovers,
        blocked=list(report.blocked),
        kept=[ids.image_name(*each) for each in report.kept],
        items=[{"name": ids.image_name(*each), "action": action} for each in report.removed],
    )


def prune_reports(
    namespace: str,
    reports: Mapping[str, PruneReport],
    unread: Mapping[str, str],
    *,
    dry_run: bool,
) -> Document:
    """What was removed of a namespace, or would be, in each storage by its name; ``unread`` are
    those where nothing could be, and why.
    """
    made = document(
        "PruneReport",
        namespace,
        dryRun=dry_run,
        freedBytes=0,
        leftovers=0,
        blocked=[],
        kept=[],
        items=[],
        unread=unread_storages(unread),
    )
    for name, report in reports.items():
        found = prune_report(name, report, dry_run=dry_run)
        for field in ("freedBytes", "leftovers", "kept"):
            made[field] += found[field]
        made["blocked"] += [f"storage {name}: {reason}" for reason in found["blocked"]]
        made["items"] += [item | {"storage": name} for item in found["items"]]
    return made


def unread_storages(unread: Mapping[str, str]) -> list[Document]:
    """The storages that could not be looked at, and why."""
    return [{"storage": name, "problem": problem} for name, problem in unread.items()]


def doctor_report(host: str, checks: Iterable[checkup.Check]) -> Document:
    """A check-up."""
    lines = [
        {
            "name": check.name,
            "status": check.status,
            "found": check.found,
            "consequence": check.consequence,
            "cure": check.cure,
        }
        for check in checks
    ]
    worst = next(
        (status for status in ("missing", "degraded") if any(c["status"] == status for c in lines)),
        "ok",
    )
    return document("DoctorReport", host, status=worst, checks=lines)


def _written(found: plan.Written | None) -> Document:
    if found is None:
        return {}
    return {
        "written": {
            "seconds": round(found.span_s, 3),
            "bytes": found.span_bytes,
            "leftForStopBytes": found.look_bytes,
            "followedBytes": found.followed_bytes,
            "notFollowedBytes": found.apart_bytes,
            "notFollowedBecause": list(found.reasons),
        }
    }


def plan_report(found: plan.Plan, followed: follow.Closure | None = None) -> Document:
    """What a dump would take, and who is in it for whose sake."""
    members: Document = {}
    if followed is not None:
        members["members"] = [vars(each) for each in followed.members]
        members["leaving"] = [vars(each) for each in followed.leaving]
    return document(
        "Plan",
        ",".join(f"pid-{pid}" for pid in found.roots),
        feasible=not found.blockers,
        estimate={
            "rawBytes": found.raw_bytes,
            "stopSeconds": round(found.stop_s, 3),
            **_written(found.written),
            "rates": {
                "captureBytesPerSecond": found.rates.capture_bytes_per_s,
                "fixedSeconds": found.rates.fixed_s,
                "processSeconds": found.rates.process_s,
                "heldBytesPerSecond": found.rates.held_bytes_per_s,
            },
        },
        **members,
        blockers=[vars(finding) for finding in found.blockers],
        warnings=[vars(finding) for finding in found.warnings],
        processes=[
            {
                "pid": process.pid,
                "parent": process.parent,
                "program": process.program,
                "state": process.state,
                "threads": process.threads,
                "memoryBytes": process.captured_bytes,
            }
            for process in found.processes
        ],
        memory=_memory(
            found.anonymous_bytes, found.shared_bytes, found.swapped_bytes, found.file_bytes
        ),
        files=[
            _file(file.kind, file.path, file.size_bytes, travels=file.travels)
            for file in found.files
        ],
        sockets=[
            {"kind": each.kind, "state": each.state, "local": each.local, "peer": each.peer}
            for each in found.sockets
        ],
    )
