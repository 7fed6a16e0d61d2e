"""Who a token stands for and what they may do: the API server's word, remembered for seconds.

Promises: nothing is allowed but what the API server allowed at most ``ALLOWED_S`` ago; a refusal
is never remembered longer than ``REFUSED_S``; if it cannot be asked, nothing is allowed. Tokens
are kept as digests only.
Does not: know roles.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from agent import errors
from agent.host import clock
from agent.kube.connection import Connection, Json
from agent.model.access import API_GROUP, Caller, Right

# What the issue of rights says: one taken away is gone after ten seconds at the latest, and a new
# one is there soon after.
ALLOWED_S = 10.0
REFUSED_S = 3.0
_ENTRIES = 1024
_CALL_S = 5.0
# A token for this audience is good for us alone: who asks for one limits what we could do with it.
AUDIENCE = API_GROUP

_REVIEW_TOKEN = "/apis/authentication.k8s.io/v1/tokenreviews"  # noqa: S105 - a path
_REVIEW_ACCESS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
_AUTHORITIES = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"

T = TypeVar("T")


class Access:
    """Asks the API server that ``api`` is connected to."""

    def __init__(self, api: Connection) -> None:
        self._api = api
        self._callers = _Remembered[Caller | None]()
        self._allowed = _Remembered[str | None]()

    def authenticate(self, token: str) -> Caller:
        """Who the token stands for.

        Raises:
            errors.Unauthenticated: nobody.
            errors.Unreachable: the API server cannot be asked now.
        """
        # A digest, so that neither a dump of this process nor a defect can show the token.
        key = hashlib.sha256(token.encode()).digest()
        caller = self._callers.get(key, lambda: self._review(token), bool)
        if caller is None:
            raise errors.Unauthenticated(
                "the API server does not know the token: it has expired, was never valid, or is"
                " for another audience",
                hint="log in again, or make a token with kubectl create token",
            )
        return caller

    def authorize(self, caller: Caller, right: Right) -> None:
        """Return if the caller has the right.

        Raises:
            errors.Forbidden: not.
            errors.Unreachable: the API server cannot be asked now.
        """
        extra = tuple(sorted(caller.extra.items()))
        key = (caller.user, caller.groups, caller.uid, extra, right)
        reason = self._allowed.get(
            key, lambda: self._refusal(caller, right), lambda reason: reason is None
        )
        if reason is not None:
            raise errors.Forbidden(
                f"{caller.user} may not {right}" + (f": {reason}" if reason else ""),
                hint=f"a role must allow the verb {right.verb!r} on {right.resource!r} of the API"
                f" group {right.group!r}",
            )

    def client_authorities(self) -> bytes:
        """The authorities whose client certificates the API server itself takes, PEM.

        Raises:
            errors.CkptError: they are not published here, or cannot be read.
        """
        what = "the ConfigMap extension-apiserver-authentication"
        found = self._api.call("GET", _AUTHORITIES, what, read_s=_CALL_S)
        return str((found.get("data") or {}).get("client-ca-file", "")).encode()

    def _review(self, token: str) -> Caller | None:
        # Asked with our audience first; a token made for the API server itself is refused then,
        # and is good without.
        for audiences in ([AUDIENCE], []):
            spec: Json = {"token": token} | ({"audiences": audiences} if audiences else {})
            status = self._ask(_REVIEW_TOKEN, "TokenReview", spec)
            if status.get("authenticated") is True and (
                not audiences or AUDIENCE in (status.get("audiences") or ())
            ):
                return _caller(status.get("user") or {})
        return None

    def _refusal(self, caller: Caller, right: Right) -> str | None:
        """None if allowed, else why not, which may be ""."""
        spec: Json = {
            "user": caller.user,
            "groups": list(caller.groups),
            "uid": caller.uid,
            "extra": {key: list(values) for key, values in caller.extra.items()},
            "resourceAttributes": right.attributes(),
        }
        status = self._ask(_REVIEW_ACCESS, "SubjectAccessReview", spec)
        if status.get("allowed") is True and status.get("denied") is not True:
            return None
        return str(status.get("reason") or "")

    def _ask(self, path: str, kind: str, spec: Json) -> Json:
        group = path.split("/")[2]
        body = {"apiVersion": f"{group}/v1", "kind": kind, "spec": spec}
        try:
            found = self._api.call("POST", path, f"a {kind}", body=body, read_s=_CALL_S)
        except (errors.Forbidden, errors.Unauthenticated, errors.InvalidInput) as exc:
            # It is the agent's right to ask that is missing, not the caller's.
            raise errors.Unreachable(
                f"the agent may not ask the API server who calls: {exc.message}",
                hint="bind the agent's ServiceAccount to the ClusterRole system:auth-delegator",
            ) from exc
        return found.get("status") or {}


def _caller(user: Json) -> Caller | None:
    name = user.get("username")
    if not isinstance(name, str) or not name:
        return None
    return Caller(
        user=name,
        groups=tuple(str(each) for each in user.get("groups") or ()),
        uid=str(user.get("uid") or ""),
        extra={
            str(key): tuple(str(each) for each in values or ())
            for key, values in (user.get("extra") or {}).items()
        },
    )


class _Remembered(Generic[T]):
    """Answers of the last seconds, the oldest forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[Hashable, tuple[float, T]] = {}

    def get(self, key: Hashable, ask: Callable[[], T], good: Callable[[T], bool]) -> T:
        """The answer for ``key``: remembered, or asked for now. Errors are not remembered."""
        with self._lock:
            kept = self._entries.get(key)
        if kept is not None and clock.monotonic_s() < kept[0]:
            return kept[1]
        # Time counts from before the question, when the answer may have been decided.
        asked_s = clock.monotonic_s()
        answer = ask()
        until_s = asked_s + (ALLOWED_S if good(answer) else REFUSED_S)
        with self._lock:
            self._entries.pop(key, None)
            self._entries[key] = until_s, answer
            while len(self._entries) > _ENTRIES:
                del self._entries[next(iter(self._entries))]
        return answer
