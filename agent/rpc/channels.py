"""A caller's channel to an agent or a coordinator, and how each call on it goes.

Promises: the server's certificate is checked against the given authority and name before anything
is sent; an error of the server arrives as the class of ``agent.errors`` that it was; every call has
a deadline, and a server that fell silent is given up within a minute.
Does not: find servers or credentials, retry, or know what is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from agent import errors
from agent.rpc import status

# One look at the store: a listing of thousands of images on slow storage still fits.
_CALL_S = 120.0
_LOOK_S = 0.05
# A node that fell off the network sends nothing, not even an end: it is asked for a sign of life,
# as the agent asks its callers.
_PING_S = 20
_PONG_S = 20
# 500 images with damage texts fit many times; gRPC's own limit of 4 MiB does not hold a plan of
# thousands of processes.
_MESSAGE_BYTES = 64 << 20

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Credentials:
    """How an agent is trusted and how the caller shows who it is: a bearer token, asked for anew
    at each call since it may expire between two of them, or a client certificate with its key
    (both PEM).
    """

    ca_pem: bytes
    server_name: str
    token: Callable[[], str | None] = dataclasses.field(default=lambda: None, repr=False)
    certificate_pem: bytes | None = dataclasses.field(default=None, repr=False)
    key_pem: bytes | None = dataclasses.field(default=None, repr=False)


@contextlib.contextmanager
def opened(target: str, credentials: Credentials) -> Iterator[grpc.Channel]:
    """A channel to ``target`` (``host:port`` or ``unix:/path``)."""
    channel = grpc.secure_channel(
        target,
        grpc.ssl_channel_credentials(
            credentials.ca_pem, credentials.key_pem, credentials.certificate_pem
        ),
        options=(
            ("grpc.ssl_target_name_override", credentials.server_name),
            ("grpc.default_authority", credentials.server_name),
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            # A person waits: the first failure is told, not tried again for minutes.
            ("grpc.enable_retries", 0),
            ("grpc.keepalive_time_ms", _PING_S * 1000),
            ("grpc.keepalive_timeout_ms", _PONG_S * 1000),
            # The answer to a ping has a limit of its own, a minute where nobody says otherwise.
            ("grpc.http2.ping_timeout_ms", _PONG_S * 1000),
            # A dump may be silent for long while it waits for a volume.
            ("grpc.http2.max_pings_without_data", 0),
        ),
    )
    with contextlib.closing(channel):
        yield channel


class Calls:
    """Calls to ``peer``, as messages name it; ``why`` may know more about a connection that cannot
    be made.
    """

    def __init__(
        self, token: Callable[[], str | None], peer: str, why: Callable[[], str] = lambda: ""
    ) -> None:
        self._token = token
        self._why = why
        self.peer = peer

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        token = self._token()
        return (("authorization", f"Bearer {token}"),) if token else ()

    def _once(self, method: Callable[..., T], request: Any, timeout_s: float | None = None) -> T:
        """A peer that has not answered by ``timeout_s`` counts as one that cannot be asked."""
        try:
            return method(request, timeout=timeout_s or _CALL_S, metadata=self._metadata())
        except grpc.RpcError as exc:
            found = self._error(exc)
            if timeout_s and found.facts.get("status") == "DEADLINE_EXCEEDED":
                raise errors.Unreachable(
                    f"{self.peer} has not answered for {timeout_s:g} s",
                    hint="does it hang, or is its node cut off? its pods go on by themselves",
                ) from exc
            raise found from exc
        except ValueError as exc:
            # All that gRPC says of a channel that another thread has closed just before.
            raise errors.Unreachable(
                f"{self.peer} is not asked any more: {exc}", hint="what asked it has ended"
            ) from exc

    def _events(self, call: Any, cancel: threading.Event | None) -> Iterator[Any]:
        """The events of a stream; cancelled when ``cancel`` is set, or when left early."""
        begun = False
        try:
            with self._cancelled_by(call, cancel):
                for event in call:
                    begun = True
                    yield event
        except grpc.RpcError as exc:
            asked = cancel is not None and cancel.is_set()
            raise self._error(exc, begun=begun, asked=asked) from exc
        finally:
            call.cancel()

    @contextlib.contextmanager
    def _cancelled_by(self, call: Any, cancel: threading.Event | None) -> Iterator[None]:
        """Within the context, the call is cancelled when ``cancel`` is set."""
        ended = threading.Event()

        def watch(cancel: threading.Event) -> None:
            while not ended.is_set():
                if cancel.wait(_LOOK_S):
                    call.cancel()
                    return

        watcher = threading.Thread(target=watch, args=(cancel,)) if cancel else None
        if watcher:
            watcher.start()
        try:
            yield
        finally:
            ended.set()
            if watcher:
                watcher.join()

    def _error(
        self, exc: grpc.RpcError, *, begun: bool = False, asked: bool = False
    ) -> errors.CkptError:
        """``facts['begun']``: the agent was at work when the connection broke. ``asked``: the
        caller gave the call up.
        """
        found = status.error(exc, self.peer)
        if asked and isinstance(found, errors.Interrupted) and found.facts.get("status"):
            return errors.Interrupted(f"what {self.peer} was asked for was given up")
        if isinstance(found, errors.Interrupted) and not asked:
            # Said by an agent that is told to end, and by gRPC for one that just ended.
            return errors.Unreachable(
                f"{self.peer} ended", hint="try again when it is ready", begun=begun
            )
        if not isinstance(found, errors.Unreachable) or found.facts.get("status") is None:
            return found
        # From gRPC itself, not from the agent.
        why = self._why()
        if begun:
            return errors.Unreachable(
                f"the connection to {self.peer} broke: {why or found.message}",
                hint=found.hint,
                begun=True,
            )
        if why:
            return errors.Unreachable(f"{self.peer} cannot be reached: {why}", hint=found.hint)
        if "CERTIFICATE_VERIFY_FAILED" in found.message:
            return errors.Unreachable(
                f"the certificate of {self.peer} was not issued by the authority that this cluster"
                " publishes for its agents",
                hint="somebody else answers there, or the authority was just replaced: try again,"
                " then look at the Secret ckpt-agent-tls",
            )
        return found
