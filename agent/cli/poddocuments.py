"""From what a cluster did to what is printed; the rest of ``documents``.

Promises: as ``documents``; where a document is also printed for a host, fields are only added.
Does not: read anything, or decide how a document looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from agent.cli import documents
from agent.cli.output import Document
from agent.cluster.move import Moved, Restored
from agent.model.pods import Placement
from agent.rpc import results


def seconds(span_s: float) -> float:
    """A span as it is printed."""
    return round(span_s, 6)


def dump_report(namespace: str, pod: str, outcome: results.DumpOutcome) -> Document:
    """A committed dump of a pod."""
    image = outcome.image
    return documents.document(
        "DumpReport",
        documents.image_name(image),
        namespace=namespace,
        pod=pod,
        engine=outcome.engine,
        stopped=outcome.stopped,
        stopSeconds=seconds(outcome.stop_s),
        durableSeconds=seconds(outcome.durable_s),
        storage=image.storage,
        processes=sum(member.processes for member in outcome.members),
        rawBytes=image.raw_bytes,
        newBytes=image.new_bytes,
        storedBytes=image.stored_bytes,
        members=[
            {
                "name": member.name,
                # Numbers of processes mean something on their node only.
                "pids": [],
                "processes": member.processes,
                "stopSeconds": seconds(member.stop_s),
                "rawBytes": member.raw_bytes,
            }
            for member in outcome.members
        ],
        hookProblems=list(outcome.hook_problems),
    )


def restore_report(namespace: str, restored: Restored) -> Document:
    """A pod that runs again."""
    outcome = restored.outcome
    return documents.document(
        "RestoreReport",
        documents.image_name(outcome.image),
        namespace=namespace,
        pod=restored.pod,
        podUid=restored.uid,
        node=restored.node,
        storage=outcome.image.storage,
        isolated=False,
        waitedSeconds=seconds(outcome.waited_s),
        verifiedSeconds=seconds(outcome.verified_s),
        runningSeconds=seconds(outcome.running_s),
        was=placement(outcome.was),
        now=placement(outcome.now),
        members=[],
        hookProblems=list(outcome.hook_problems),
    )


def placement(found: Placement) -> dict[str, Any]:
    """Where a pod is, or was."""
    return {
        "pod": found.pod,
        "podUid": found.pod_uid,
        "node": found.node,
        "addresses": list(found.addresses),
    }


def move_report(namespace: str, pod: str, moved: Moved) -> Document:
    """A pod that runs on another node."""
    return documents.document(
        "MoveReport",
        documents.image_name(moved.dump.image),
        namespace=namespace,
        pod=pod,
        podUid=moved.uid,
        source=moved.source,
        target=moved.target,
        storage=moved.dump.image.storage,
        awaySeconds=seconds(moved.away_s),
        stopSeconds=seconds(moved.dump.stop_s),
        durableSeconds=seconds(moved.dump.durable_s),
        runningSeconds=seconds(moved.restore.running_s),
        was=placement(moved.restore.was),
        now=placement(moved.restore.now),
        stepSeconds={name: seconds(span_s) for name, span_s in moved.steps.items()},
        rawBytes=moved.dump.image.raw_bytes,
        newBytes=moved.dump.image.new_bytes,
        storedBytes=moved.dump.image.stored_bytes,
        hookProblems=[*moved.dump.hook_problems, *moved.restore.hook_problems],
    )


def verify_report(
    name: str,
    reports: Iterable[tuple[results.Image, results.VerifyOutcome]],
    unread: Mapping[str, str],
) -> Document:
    """What reading images whole found; ``unread`` are the storages that could not be looked at, and
    why.
    """
    items = [
        {
            "name": documents.image_name(image),
            "storage": image.storage,
            "good": found.good,
            "readBytes": found.read_bytes,
            "damaged": [{"part": part, "problem": problem} for part, problem in found.damaged],
        }
        for image, found in reports
    ]
    return documents.document(
        "VerifyReport",
        name,
        good=all(item["good"] for item in items),
        items=items,
        unread=documents.unread_storages(unread),
    )


def as_sent(found: Mapping[str, Any], namespace: str) -> Document:
    """A document that an agent made; the store's path on its node means nothing here."""
    made = dict(found)
    if made.get("kind") == "PruneReport":
        made["name"] = namespace
    return made
