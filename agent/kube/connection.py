"""Who calls, and which cluster is meant: the door to an API server for a person or a program.

Promises: what a kubeconfig says is honoured as kubectl does (KUBECONFIG, contexts, exec plugins,
client certificates, proxies), and without one the pod's own ServiceAccount is used; every call has
a deadline; objects are JSON values as the API server sent them, so that fields unknown here are
kept; every failure is one of ``agent.errors`` that names the thing and the way out.
Does not: log or show tokens and keys, retry, or cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import urllib3

from agent import errors

Json = dict[str, Any]

# An API server answers in milliseconds; one that takes longer to connect to is not there.
_CONNECT_S = 10.0
_READ_S = 60.0
# Where kubectl looks for a kubeconfig.
_KUBECONFIG = "~/.kube/config"
# A pod is a few KiB; a part is what has come, up to this.
_PART_BYTES = 64 << 10
_HTTP_REFUSED = 400
_HTTP_UNAUTHORIZED = 401
_HTTP_FORBIDDEN = 403
_HTTP_NOT_FOUND = 404
_HTTP_CONFLICT = 409
_HTTP_TOO_MANY = 429
_HTTP_SERVER = 500


@dataclasses.dataclass(frozen=True)
class Identity:
    """How the caller shows who it is: a bearer token, or files of a client certificate and key."""

    token: str | None = dataclasses.field(default=None, repr=False)
    certificate_file: str | None = None
    key_file: str | None = None


class Account(Protocol):
    """A caller of one API server: how it is reached and who calls. A kubeconfig's, or a pod's
    own.
    """

    url: str

    def authorization(self) -> str | None:
        """The ``authorization`` header of a request, or None."""

    def certificate(self) -> tuple[str, str] | None:
        """Files of a client certificate and its key, if there are any."""

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Json | None,
        timeout: tuple[float, float],
    ) -> urllib3.BaseHTTPResponse:
        """Send a request and return its answer, which is not read yet; ``timeout`` is for the
        connection and for each read. Tried again once: a server that does not listen is told at
        once, one that just restarts is met.

        Raises:
            urllib3.exceptions.HTTPError | OSError: it was not reached.
        """

    def configuration(self) -> Any:
        """The same as the package kubernetes has it, for what only that can do."""

    def close(self) -> None:
        """Let go of the connections."""


class Connection:
    """One API server as one caller. ``name`` is how messages call it, ``namespace`` what the
    context says, else ``default``.
    """

    def __init__(
        self,
        account: Account,
        *,
        name: str,
        namespace: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._account = account
        self.name = name
        self.namespace = namespace
        self._check = check

    def guarded(self, check: Callable[[], None]) -> Connection:
        """The same, whose requests that may change something are sent only if ``check``, which is
        called right before, does not raise. Closed with this one.
        """
        return Connection(self._account, name=self.name, namespace=self.namespace, check=check)

    @property
    def url(self) -> str:
        """The API server's address."""
        return self._account.url

    def configuration(self) -> Any:
        """As ``Account.configuration``."""
        return self._account.configuration()

    def close(self) -> None:
        """Let go of the connections."""
        self._account.close()

    def identity(self) -> Identity:
        """Who the API server takes the caller for; refreshed if it was about to expire.

        Raises:
            errors.Unauthenticated: the kubeconfig names no usable identity.
        """
        text = self.authorization()
        if text and text.startswith("Bearer "):
            return Identity(token=text.removeprefix("Bearer "))
        files = self._account.certificate()
        if files is not None:
            return Identity(certificate_file=files[0], key_file=files[1])
        raise errors.Unauthenticated(
            f"the identity of {self.name} is neither a token nor a client certificate",
            hint="use a kubeconfig user with a token, an exec plugin or a client certificate, such"
            " as `kubectl create token` makes",
        )

    def authorization(self) -> str | None:
        """The ``authorization`` header of a request, or None."""
        return self._account.authorization()

    def call(
        self,
        method: str,
        path: str,
        what: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        read_s: float = _READ_S,
    ) -> Json:
        """Send one request and return the object that came back. ``what`` names the thing for
        messages, such as ``pod ns/name``. The body of a PATCH is a merge patch (RFC 7386).

        Raises:
            errors.NotFound | errors.Unauthenticated | errors.Forbidden | errors.Conflict |
            errors.InvalidInput | errors.Unreachable: as the API server answered.
        """
        url = self.url + path + (f"?{urllib.parse.urlencode(query)}" if query else "")
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "application/json", "Content-Type": kind}
        bearer = self.authorization()
        if bearer:
            headers["authorization"] = bearer
        if method != "GET":
            self._check()
        with self.reached():
            timeout = (min(_CONNECT_S, read_s), read_s)
            answer = self._account.send(method, url, headers, body, timeout)
            content = answer.data
        found = parsed(content)
        if answer.status >= _HTTP_REFUSED:
            raise refusal(answer.status, found, what, self.name)
        return found

    @contextlib.contextmanager
    def events(
        self, path: str, what: str, *, query: Mapping[str, str], silent_s: float
    ) -> Iterator[Events]:
        """A watch: the objects of an answer that does not end, one a line. ``silent_s`` is how
        long the server may say nothing. Raises as ``call``, also while iterating.
        """
        url = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        headers = {"Accept": "application/json"}
        bearer = self.authorization()
        if bearer:
            headers["authorization"] = bearer
        with self.reached():
            answer = self._account.send("GET", url, headers, None, (_CONNECT_S, silent_s))
        try:
            if answer.status >= _HTTP_REFUSED:
                with self.reached():
                    content = answer.data
                raise refusal(answer.status, parsed(content), what, self.name)
            yield Events(self, answer)
        finally:
            # Not kept for another request: the server may still be sending.
            answer.close()

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Around a request: failures to reach the API server are told as such."""
        try:
            yield
        except (urllib3.exceptions.HTTPError, OSError) as exc:
            raise self._unreachable(exc) from exc

    def _unreachable(self, exc: Exception) -> errors.Unreachable:
        reason = str(getattr(exc, "reason", None) or exc)
        if "CERTIFICATE_VERIFY_FAILED" in reason or "certificate verify failed" in reason:
            return errors.Unreachable(
                f"the certificate of the API server of {self.name} ({self.url}) was not issued by"
                " the authority that the kubeconfig names",
                hint="correct certificate-authority of this cluster in the kubeconfig, or choose"
                " another context",
                server=self.url,
            )
        return errors.Unreachable(
            f"the API server of {self.name} ({self.url}) does not answer: {_short(reason)}",
            hint="is the cluster up, and is it the right context (kubectl config get-contexts)?",
            server=self.url,
        )


class Events:
    """The objects of a watch, as they come."""

    def __init__(self, connection: Connection, response: Any) -> None:
        self._connection = connection
        self._response = response

    def __iter__(self) -> Iterator[Json]:
        rest = b""
        with self._connection.reached():
            for part in self._response.stream(_PART_BYTES, decode_content=True):
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line:
                        yield parsed(line)

    def end(self) -> None:
        """Make the iteration end, from another thread; a no-op if it has."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._response.shutdown()


def parsed(content: bytes | None) -> Json:
    """The object of an answer; what is no JSON object becomes its message."""
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {"message": (content or b"")[:200].decode("utf-8", "replace")}
    return found if isinstance(found, dict) else {}


def _short(reason: str) -> str:
    """The last cause in a chain that names the whole request first."""
    return reason.rsplit("Caused by ", 1)[-1].strip("()")[:300]


def refusal(status: int, found: Json, what: str, cluster: str) -> errors.CkptError:
    """What an HTTP status above 400 with its ``Status`` object means for ``what``."""
    said = str(found.get("message") or f"HTTP status {status}")
    if status == _HTTP_UNAUTHORIZED:
        return errors.Unauthenticated(
            f"{cluster} does not know the caller: the token has expired or was never valid",
            hint="log in again, renew the token, or choose another context",
        )
    if status == _HTTP_FORBIDDEN:
        return errors.Forbidden(
            f"{what}: {said}",
            hint="ask for a role that allows it; docs/cli.md lists the rights that each verb needs",
        )
    if status == _HTTP_NOT_FOUND:
        return errors.NotFound(
            f"there is no {what} in {cluster}", hint="check the name, -n and --context"
        )
    if status == _HTTP_CONFLICT:
        return errors.Conflict(f"{what}: {said}", hint="look at it again: somebody changed it")
    if status == _HTTP_TOO_MANY or status >= _HTTP_SERVER:
        return errors.Unreachable(
            f"{what}: the API server of {cluster} could not answer: {said}", hint="try again"
        )
    return errors.InvalidInput(f"{what}: {said}", hint="the API server refused the request")


def connect(kubeconfig: str | None = None, context: str | None = None) -> Connection:
    """Connect as the kubeconfig's ``context`` (default: its current one) says. Without a
    kubeconfig, the ServiceAccount of the pod that this runs in is used.

    Raises:
        errors.NotFound: no kubeconfig, or no such context.
        errors.InvalidInput: the kubeconfig, or the ServiceAccount, does not make sense.
        errors.Unauthenticated: its credential plugin gave nothing.
    """
    # Only here: what reads a kubeconfig takes 15 MiB, and a service in a pod has none.
    place = kubeconfig or os.environ.get("KUBECONFIG") or _KUBECONFIG
    exists = any(os.path.exists(os.path.expanduser(each)) for each in place.split(os.pathsep))
    if exists:
        from agent.kube import kubeconfig as files

        account, name, namespace = files.read(place, context)
        return Connection(account, name=f"context {name}", namespace=namespace)
    from agent.kube import serviceaccount

    if kubeconfig is None and context is None and serviceaccount.is_here():
        own, namespace = serviceaccount.read()
        return Connection(own, name="this cluster", namespace=namespace)
    raise errors.NotFound(
        f"there is no kubeconfig {place}",
        hint="name one with --kubeconfig or KUBECONFIG",
        path=place,
    )
