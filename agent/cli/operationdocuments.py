"""From what the coordinator tells to what is printed; the rest of ``documents``.

Promises: as ``poddocuments``.
Does not: read anything, or decide how a document looks.
"""

from __future__ import annotations

from collections.abc import Sequence

from agent import errors
from agent.cli import documents, failures
from agent.cli.output import Document
from agent.cli.poddocuments import placement, seconds
from agent.rpc.coordinatorclient import EpochPlan, Figures, Operation, Target


def operation(found: Operation) -> Document:
    """An operation."""
    return documents.document(
        "Operation",
        found.id,
        namespace=found.namespace,
        operation=found.kind.value,
        group=found.group,
        caller=found.caller,
        state=found.state.value,
        step=found.step,
        revision=found.revision,
        createdAt=documents.moment(found.created_s),
        endedAt=None if found.ended_s is None else documents.moment(found.ended_s),
        takeovers=found.takeovers,
        cancelling=found.cancelling,
        error=failures.error(found.error) if found.error else None,
        image=documents.image(found.image) if found.image else None,
        figures=_figures(found.figures) if found.figures else None,
        pods=[
            {
                "member": each.identity,
                "was": placement(each.was),
                "now": placement(each.now),
                "lost": list(each.lost),
            }
            for each in found.pods
        ],
    )


def operation_list(namespace: str, found: Sequence[Operation]) -> Document:
    """The operations of a namespace."""
    items = [operation(each) for each in found]
    return documents.document("OperationList", namespace, items=items)


def dump_report(found: Operation, target: Target, *, stopped: bool) -> Document:
    """A checkpoint that an operation committed.

    Raises:
        errors.AgentDefect: it does not say of what.
    """
    image, figures = found.image, found.figures
    if image is None or figures is None:
        raise errors.AgentDefect(
            f"the coordinator did not say what operation {found.id} committed",
            hint="ckpt-agent list shows it; the coordinator's log says more",
        )
    of = {"group": target.group, "selector": target.labels}
    if target.followed:
        of = {"group": found.group, "followed": target.followed}
    return documents.document(
        "DumpReport",
        documents.image_name(image),
        namespace=found.namespace,
        **({"jobset": target.jobset} if target.jobset else of),
        operation=found.id,
        engine="container",
        stopped=stopped,
        storage=image.storage,
        processes=sum(each.processes for each in figures.members),
        rawBytes=image.raw_bytes,
        newBytes=image.new_bytes,
        storedBytes=image.stored_bytes,
        **_figures(figures),
    )


def plan(namespace: str, target: Target, found: EpochPlan) -> Document:
    """What a checkpoint of a group would take."""
    return documents.document(
        "EpochPlan",
        str(target),
        namespace=namespace,
        feasible=not found.obstacles
        and all(each.document.get("feasible", True) for each in found.members),
        obstacles=list(found.obstacles),
        members=[
            {"name": each.identity, "pod": each.pod, "node": each.node, "plan": each.document}
            for each in found.members
        ],
    )


def _figures(found: Figures) -> Document:
    return {
        "stopSeconds": seconds(found.stop_s),
        "durableSeconds": seconds(found.durable_s),
        "connections": found.connections,
        "leaving": [_leaving(each) for each in found.leaving],
        "members": [
            {
                "name": each.name,
                "pids": [],
                "processes": each.processes,
                "stopSeconds": seconds(each.stop_s),
                "rawBytes": each.raw_bytes,
            }
            for each in found.members
        ],
    }


def _leaving(text: str) -> Document:
    """As the coordinator tells it: "POD LOCAL REMOTE"."""
    pod, local, remote = [*text.split(" ", 2), "", ""][:3]
    return {"podUid": "", "pod": pod, "local": local, "remote": remote}
