"""AdmissionReview v1, as bytes in and bytes out: what the API server asks and what it is told.

Promises: a review that is one is always allowed; what goes wrong inside becomes a warning to the
person and an ordinary pod, since a job must not fail to start for being opted in; a pod whose
JobSet cannot be looked at is held as any other, and does not wait; a dry run is answered as a real
one, since answering does nothing.
Does not: keep anything.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from typing import Any

from agent import errors
from agent.admission import hooked, mutate
from agent.admission.podfields import mapping
from agent.model import jobset, optin
from agent.model.intent import Intent

logger = logging.getLogger(__name__)

API_VERSION = "admission.k8s.io/v1"
_KIND = "AdmissionReview"

Intents = Callable[[str, str], Intent | None]
"""What the JobSet of a namespace shall come back as; None if it just runs, or there is none. Raises
``errors.CkptError`` if that cannot be known."""


def respond(body: bytes, *, image: str, intents: Intents) -> bytes:
    """Answer the review in ``body``.

    Raises:
        errors.InvalidInput: it is no AdmissionReview v1 with a request.
    """
    request = _request(body)
    response: dict[str, Any] = {"uid": request["uid"], "allowed": True}
    try:
        mutation = _mutation(request, image, intents)
    except errors.InvalidInput as exc:
        mutation = mutate.Mutation([], (_ordinary(exc.message),))
    except Exception:  # a defect here must not keep a pod from starting; the log tells
        logger.exception("a pod could not be looked at")
        mutation = mutate.Mutation([], (_ordinary("an internal error of the webhook"),))
    if mutation.patch:
        patch = json.dumps(mutation.patch).encode()
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(patch).decode()}
    if mutation.warnings:
        response["warnings"] = list(mutation.warnings)
    return json.dumps({"apiVersion": API_VERSION, "kind": _KIND, "response": response}).encode()


def _ordinary(reason: str) -> str:
    return f"ckpt-agent: the pod starts as usual, nothing of it is held: {reason}"


def _request(body: bytes) -> dict[str, Any]:
    try:
        review = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise errors.InvalidInput("the body is not JSON", hint="send an AdmissionReview") from exc
    request = review.get("request") if isinstance(review, dict) else None
    if (
        not isinstance(request, dict)
        or review.get("apiVersion") != API_VERSION
        or review.get("kind") != _KIND
        or not isinstance(request.get("uid"), str)
        or not request["uid"]
    ):
        raise errors.InvalidInput(
            f"the body is not an {_KIND} of {API_VERSION} with a request and its uid",
            hint="send what an API server sends",
        )
    return request


def _mutation(request: dict[str, Any], image: str, intents: Intents) -> mutate.Mutation:
    resource = request.get("resource")
    pods = isinstance(resource, dict) and (resource.get("group"), resource.get("resource")) == (
        "",
        "pods",
    )
    pod = request.get("object")
    if (
        not pods
        or request.get("subResource")
        or request.get("operation") != "CREATE"
        or not isinstance(pod, dict)
    ):
        return mutate.Mutation([])
    intent, warnings = _intent(request, pod, intents)
    mutation = mutate.mutate(pod, image=image, intent=intent)
    mutation = mutate.Mutation(mutation.patch, (*warnings, *mutation.warnings))
    mutation = mutate.Mutation(mutation.patch, (*mutation.warnings, *hooked.warnings(pod)))
    logger.info(
        "pod in %s: %s%s",
        request.get("namespace"),
        "changed" if mutation.patch else "unchanged",
        f", {len(mutation.warnings)} warnings" if mutation.warnings else "",
    )
    return mutation


def _intent(
    request: dict[str, Any], pod: dict[str, Any], intents: Intents
) -> tuple[Intent | None, tuple[str, ...]]:
    """What the pod shall wait for, and warnings."""
    labels = mapping(mapping(pod, "metadata"), "labels")
    name = labels.get(jobset.NAME_LABEL)
    if labels.get(optin.LABEL) != optin.ENABLED or not name:
        return None, ()
    try:
        found = intents(str(request.get("namespace")), str(name))
        return (found if found and found.means(pod) else None), ()
    except errors.CkptError as exc:
        logger.warning("JobSet %s/%s: %s", request.get("namespace"), name, exc)
        reason = f"ckpt-agent: the pod does not wait for an image, if it should: {exc.message}"
        return None, (reason[: mutate.WARNING_CHARACTERS],)
