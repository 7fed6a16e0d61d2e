"""From what became of a group of pods to what is printed; the rest of ``documents``.

Promises: as ``poddocuments``.
Does not: read anything, or decide how a document looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.cli import documents
from agent.cli.output import Document
from agent.cli.poddocuments import placement, seconds
from agent.coordinator.checkpoint import Checkpoint
from agent.coordinator.jobsetcourse import Returned
from agent.coordinator.jobsetrestore import Moved


def dump_report(
    namespace: str, of: Mapping[str, str], done: Checkpoint, *, stopped: bool
) -> Document:
    """A committed checkpoint of several pods; ``of`` says what makes them a group: jobset, or
    group with selector or followed.
    """
    image = done.image
    return documents.document(
        "DumpReport",
        documents.image_name(image),
        namespace=namespace,
        **of,
        engine=done.engine,
        stopped=stopped,
        stopSeconds=seconds(done.stop_s),
        durableSeconds=seconds(done.durable_s),
        storage=image.storage,
        processes=sum(each.processes for each in done.stops),
        rawBytes=image.raw_bytes,
        newBytes=image.new_bytes,
        storedBytes=image.stored_bytes,
        connections=done.connections,
        leaving=[
            {"podUid": uid, "local": local, "remote": remote} for uid, local, remote in done.leaving
        ],
        stepSeconds={state.value: seconds(span_s) for state, span_s in done.spans_s.items()},
        **_told(skewSeconds=done.skew_s, slowestSeconds=done.slowest_s),
        members=[
            {
                "name": each.name,
                "pids": [],
                "processes": each.processes,
                "stopSeconds": seconds(each.stop_s),
                "rawBytes": each.raw_bytes,
            }
            for each in done.stops
        ],
        hookProblems=list(done.hook_problems),
    )


def _told(**spans_s: float | None) -> Document:
    return {name: seconds(span_s) for name, span_s in spans_s.items() if span_s is not None}


def restore_report(namespace: str, of: Mapping[str, str], done: Returned) -> Document:
    """A group that runs again; ``of`` is as for a dump, without a selector."""
    return documents.document(
        "RestoreReport",
        documents.image_name(done.image),
        namespace=namespace,
        **of,
        storage=done.image.storage,
        isolated=False,
        created=done.created,
        verifiedSeconds=seconds(done.verified_s),
        runningSeconds=seconds(done.running_s),
        stepSeconds=_steps(done),
        members=[],
        **_came_back(done),
    )


def move_report(namespace: str, jobset: str, done: Moved) -> Document:
    """A JobSet that runs on other nodes."""
    image = done.dump.image
    return documents.document(
        "MoveReport",
        documents.image_name(done.returned.image),
        namespace=namespace,
        jobset=jobset,
        storage=image.storage,
        awaySeconds=seconds(done.away_s),
        stopSeconds=seconds(done.dump.stop_s),
        durableSeconds=seconds(done.dump.durable_s),
        runningSeconds=seconds(done.returned.running_s),
        stepSeconds=_steps(done.returned),
        rawBytes=image.raw_bytes,
        newBytes=image.new_bytes,
        storedBytes=image.stored_bytes,
        **_came_back(done.returned),
    )


def _steps(done: Returned) -> dict[str, float]:
    return {step: seconds(span_s) for step, span_s in done.steps.items()}


def _came_back(done: Returned) -> dict[str, Any]:
    return {
        "pods": [
            {
                "member": each.identity,
                "was": placement(each.was),
                "now": placement(each.now),
                "lost": list(each.lost),
            }
            for each in done.pods
        ],
        "passedOver": [{"name": name, "problem": why} for name, why in done.passed_over],
    }
