"""What the coordinator tells without changing anything: plans and images, a page at a time.

Promises: a page goes on after the last thing that was told, whatever came or went since.
Does not: keep anything between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from agent import errors
from agent.cluster.session import Session
from agent.coordination import messages
from agent.coordination.asked import Target
from agent.coordinator import checkpoint, followed, jobsets, selected
from agent.kube import jobsets as kube
from agent.model import ids, jobset
from agent.rpc import convert
from agent.rpc.v1 import coordinator_pb2 as api
from agent.rpc.v1 import node_pb2

_PAGE, _LARGEST_PAGE = 100, 500
_SEPARATOR = "@"
T = TypeVar("T")


def page(
    found: Sequence[T], key: Callable[[T], tuple[str, ...]], size: int, token: str
) -> tuple[list[T], str]:
    """The first ``size`` of ``found`` after the one that ``token`` names, in the order of their
    ``key``, and what names the last if there are more.

    Raises:
        errors.InvalidInput: the size is negative.
    """
    if size < 0:
        raise errors.InvalidInput("a page has no negative size", hint="0 is the default")
    after = tuple(token.split(_SEPARATOR)) if token else ()
    rest = sorted((each for each in found if key(each) > after), key=key)
    size = min(size or _PAGE, _LARGEST_PAGE)
    more = len(rest) > size
    return rest[:size], _SEPARATOR.join(key(rest[size - 1])) if more else ""


def images(session: Session, request: api.ListGroupImagesRequest) -> api.ListGroupImagesResponse:
    """The images of the session's namespace."""
    group = ids.group_name(request.group) if request.group else ""
    found = session.any_agent(
        lambda agent: agent.listing(session.namespace, group, request.storage)
    )
    some, token = page(
        found.images,
        lambda each: (each.group, each.epoch, each.storage),
        request.page_size,
        request.page_token,
    )
    return api.ListGroupImagesResponse(
        images=[messages.image_message(each) for each in some],
        next_page_token=token,
        unread=[
            node_pb2.UnreadStorage(storage=name, problem=problem)
            for name, problem in found.unread.items()
        ],
    )


def image(session: Session, request: node_pb2.GetImageRequest) -> node_pb2.GetImageResponse:
    """One image, as an agent tells it."""
    return session.any_agent(lambda agent: agent.image_message(request))


def plan(session: Session, target: Target) -> api.PlanEpochResponse:
    """What a checkpoint would take of each pod, and everything that stands in its way."""
    try:
        taking = members(session, target)
    except errors.TargetUnsuitable as exc:
        return api.PlanEpochResponse(obstacles=_reasons(exc))
    made = api.PlanEpochResponse()
    for each in taking:
        try:
            found = session.agent_of(each.node).plan(session.namespace, each.pod)
        except errors.CkptError as exc:
            made.obstacles.append(f"{each.name}: {exc.message}")
            continue
        made.members.add(
            identity=each.name, pod=each.pod, node=each.node, plan=convert.to_struct(found)
        )
        made.obstacles.extend(
            f"{each.name}: {blocker.get('subject')}: {blocker.get('reason')}"
            for blocker in found.get("blockers") or ()
        )
    return made


def members(session: Session, target: Target) -> list[checkpoint.Member]:
    """Those who would take part in a checkpoint now.

    Raises:
        errors.Refused: not all of them can, or there are none.
    """
    if target.followed:
        return followed.members(session, target.followed)
    if not target.jobset:
        return selected.members(session, target.group, target.selector)
    api, namespace = session.api, session.namespace
    found = kube.read(api, namespace, target.jobset)
    return jobsets.members_of(jobset.membership(found, kube.pods(api, namespace, target.jobset)))


def _reasons(exc: errors.CkptError) -> list[str]:
    found: Any = exc.facts.get("reasons")
    return [str(each) for each in found] if isinstance(found, list | tuple) else [exc.message]
