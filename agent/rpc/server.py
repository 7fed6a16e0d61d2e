"""The gRPC server of agents and coordinators: who calls is known and may, before a service hears.

Promises: TLS only; each call is identified, counted, allowed, bounded in time and answered with
our errors; what goes wrong unforeseen is told as such without its details, which are logged. Each
call is logged with who and what, never with tokens.
Does not: know what the service does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from agent import errors
from agent.host import clock
from agent.model.access import Caller, Right
from agent.rpc import limits, openly, peers, rights, status
from agent.rpc.calls import Call
from agent.rpc.certificates import Certificates
from agent.rpc.v1 import coordinator_pb2, epochs_pb2, node_pb2

_log = logging.getLogger(__name__)

_SERVICES = {
    **node_pb2.DESCRIPTOR.services_by_name,
    **epochs_pb2.DESCRIPTOR.services_by_name,
    **coordinator_pb2.DESCRIPTOR.services_by_name,
}
# Each call holds one as long as it lasts; they are made as they are needed. A coordinator waits for
# each pod of a node in a call of its own (limits), and others are still to be heard.
_THREADS = 320
# What a coordinator says, which is much and costs little: it has as many calls at once as epochs.
_WORDS = {"TakePart", "DecideEpoch"}
# Calls that wait for one; more are refused at once.
_WAITING = 40
# Requests are names and a few numbers, or pieces of an archive.
_REQUEST_BYTES = 256 << 10
# A caller that vanished without a word is noticed after this long, and its dump given up.
_PING_S = 20
_PONG_S = 20
# A caller sends the first message right after its call.
_FIRST_S = 20.0
# The longest name of an object in Kubernetes; a request may hold anything.
_NOTED_CHARS = 253


class Guard(Protocol):
    """Whoever knows users and their rights; for the agent it is the API server."""

    def authenticate(self, token: str) -> Caller:
        """Who the token stands for.

        Raises:
            errors.Unauthenticated: nobody.
            errors.Unreachable: it cannot be told now.
        """

    def authorize(self, caller: Caller, right: Right) -> None:
        """Return if the caller has the right.

        Raises:
            errors.Forbidden: not.
            errors.Unreachable: it cannot be told now.
        """


@dataclasses.dataclass(frozen=True)
class Ports:
    """Where to listen; port 0 takes any that is free. ``token`` takes callers with a bearer
    token, ``certificate`` those with a client certificate.
    """

    host: str = "[::]"
    token: int = 7443
    certificate: int = 7444


class Server:
    """Serves ``services``, by the API's names of them: each has for each method one of the same
    name in lower case with underscores, which takes the request and a ``Call`` and returns the
    answer or yields events. Where the caller sends several messages, it takes the first, an
    iterator of the others and a ``Call``.
    """

    def __init__(
        self,
        services: Mapping[str, object],
        guard: Guard,
        node: str,
        certificates: Certificates,
        ports: Ports,
        *,
        threads: int = _THREADS,
        each_caller: limits.Limits | None = None,
    ) -> None:
        """Bind the ports. ``threads`` is how many calls are served at once, ``each_caller`` what
        one of them may ask for; None: as much as it likes, for callers who are all trusted alike.

        Raises:
            errors.EnvironmentUnfit: a port is taken, or the certificate cannot be used.
        """
        limiter = limits.Limiter(each_caller)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="call")
        self._server = grpc.server(
            self._pool,
            handlers=[
                _handlers(_SERVICES[name], service, _Door(guard, node, limiter))
                for name, service in services.items()
            ],
            # Whoever watches whether it serves holds no thread.
            maximum_concurrent_rpcs=threads + _WAITING + openly.MOST,
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", _REQUEST_BYTES),
                ("grpc.keepalive_time_ms", _PING_S * 1000),
                ("grpc.keepalive_timeout_ms", _PONG_S * 1000),
                ("grpc.http2.ping_timeout_ms", _PONG_S * 1000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5000),
            ],
        )
        # The description of the API is public, as its source is.
        names = [_SERVICES[name].full_name for name in services]
        self._health = openly.add(self._server, names)
        self.token_port = self._listen(ports.host, ports.token, certificates, clients=False)
        self.certificate_port = self._listen(
            ports.host, ports.certificate, certificates, clients=True
        )

    def _listen(self, host: str, port: int, certificates: Certificates, *, clients: bool) -> int:
        credentials = certificates.port(clients=clients)
        try:
            return int(self._server.add_secure_port(f"{host}:{port}", credentials))
        except RuntimeError as exc:
            raise errors.EnvironmentUnfit(
                f"cannot listen on {host}:{port}",
                hint="is another agent running here?",
                port=port,
            ) from exc

    def start(self) -> None:
        """Take calls; health says that it does not serve until told otherwise."""
        self._server.start()

    def set_serving(self, *, serving: bool) -> None:
        """What the health service answers, for the server as a whole and for the API."""
        self._health.set_serving(serving=serving)

    def stop(self, grace_s: float) -> None:
        """Take no more calls, give the ones there are ``grace_s``, and end."""
        self._health.close()
        self._server.stop(grace_s).wait(grace_s + 1.0)
        self._pool.shutdown(wait=False, cancel_futures=True)


def _handlers(described: ServiceDescriptor, service: object, door: _Door) -> grpc.GenericRpcHandler:
    methods = {}
    for method in described.methods:
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower()
        methods[method.name] = _handler(method, getattr(service, name), door)
    return grpc.method_handlers_generic_handler(described.full_name, methods)


def _handler(
    method: MethodDescriptor, serve: Callable[..., Any], door: _Door
) -> grpc.RpcMethodHandler[Any, Any]:
    def unary(request: Any, context: grpc.ServicerContext) -> Any:
        with _Answer(method, context) as answer:
            call = door.admit(answer, request, context)
            with door.answering(call.caller):
                return serve(request, call)

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with _Answer(method, context) as answer:
            call = door.admit(answer, request, context)
            with door.lasting(call.caller):
                yield from serve(request, call)

    def upload(requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with _Answer(method, context) as answer:
            # Nobody unknown may let us wait for what comes.
            caller = door.identify(answer, context)
            word = method.name in _WORDS
            with door.answering(caller) if word else door.lasting(caller):
                messages = _received(requests)
                with door.silent(caller):
                    first = _first(messages, context)
                return serve(first, messages, door.allow(answer, caller, first, context))

    read = message_factory.GetMessageClass(method.input_type).FromString
    write: Callable[[Any], bytes] = message_factory.GetMessageClass(
        method.output_type
    ).SerializeToString
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(upload, read, write)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(stream, read, write)
    return grpc.unary_unary_rpc_method_handler(unary, read, write)


def _received(requests: Iterator[Any]) -> Iterator[Any]:
    """The messages of a call, as long as it lasts."""
    try:
        yield from requests
    except grpc.RpcError as exc:
        raise errors.Interrupted(
            "the call ended before all of its messages had come", hint="call again"
        ) from exc


def _first(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
    """The first of them, which says what the call is about and soon comes."""
    timer = threading.Timer(_FIRST_S, context.cancel)
    timer.daemon = True
    timer.start()
    try:
        for message in messages:
            return message
    finally:
        timer.cancel()
    raise errors.InvalidInput("the call has no message", hint="say what it is about")


class _Door:
    """Lets a call in, or raises why not."""

    def __init__(self, guard: Guard, node: str, limiter: limits.Limiter) -> None:
        self._guard = guard
        self._node = node
        self._limiter = limiter

    def admit(self, answer: _Answer, request: Any, context: grpc.ServicerContext) -> Call:
        answer.request = request
        return self.allow(answer, self.identify(answer, context), request, context)

    def identify(self, answer: _Answer, context: grpc.ServicerContext) -> Caller:
        with self._limiter.identifying(peers.address(context)):
            caller = peers.certificate(context)
            if caller is None:
                caller = self._guard.authenticate(peers.token(context))
        answer.user = caller.user
        self._limiter.count(caller.user, word=answer.method in _WORDS)
        return caller

    def answering(self, caller: Caller) -> contextlib.AbstractContextManager[None]:
        return self._limiter.answering(caller.user)

    def lasting(self, caller: Caller) -> contextlib.AbstractContextManager[None]:
        return self._limiter.lasting(caller.user)

    def silent(self, caller: Caller) -> contextlib.AbstractContextManager[None]:
        return self._limiter.silent(caller.user)

    def allow(
        self, answer: _Answer, caller: Caller, request: Any, context: grpc.ServicerContext
    ) -> Call:
        answer.request = request
        right = rights.needed(answer.service, answer.method, request, self._node)
        with self._limiter.reviewing(caller.user):
            self._guard.authorize(caller, right)
        return Call(caller, context)


class _Answer:
    """One call from its arrival to its end: what leaves it as an exception ends the call with the
    status that stands for it.
    """

    def __init__(self, method: MethodDescriptor, context: grpc.ServicerContext) -> None:
        self.service, self.method = method.containing_service.name, method.name
        self.user = ""
        self.request: Any = None
        self._context = context
        self._began_s = clock.monotonic_s()

    def __enter__(self) -> _Answer:
        return self

    def __exit__(self, kind: object, exc: BaseException | None, trace: object) -> None:
        if exc is None:
            self._note("ok")
            return
        if isinstance(exc, GeneratorExit):
            self._note("caller left")
            return
        told: errors.CkptError
        if isinstance(exc, errors.CkptError):
            told = exc
        elif isinstance(exc, Exception):
            _log.error("defect in %s", self.method, exc_info=exc)
            told = errors.AgentDefect(
                f"the agent met a {type(exc).__name__} that nobody meant to happen",
                hint="this is a defect: its log says where; report it",
            )
        else:
            return
        self._note(told.code, told)
        self._context.set_trailing_metadata(status.metadata(told))
        self._context.abort(status.code(told), status.details(told))

    def _note(self, result: str, exc: errors.CkptError | None = None) -> None:
        facts = {
            "method": self.method,
            "result": result,
            "user": self.user,
            "peer": self._context.peer(),
            "seconds": round(clock.monotonic_s() - self._began_s, 3),
        }
        about = getattr(self.request, "asking", self.request)
        for field, said in (("namespace", about), ("pod", self.request), ("image", self.request)):
            if value := getattr(said, field, ""):
                facts[field] = str(value)[:_NOTED_CHARS]
        if exc is not None:
            facts["error"] = exc.message
        level = logging.INFO if result == "ok" else logging.WARNING
        _log.log(level, "call", extra={"facts": facts})
