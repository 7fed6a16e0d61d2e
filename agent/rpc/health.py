"""Asking an agent whether it serves: what a probe does.

Promises: the answer within the time given; a certificate that does not match is no answer.
Does not: need an identity.
"""

from __future__ import annotations

import contextlib
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agent import errors
from agent.rpc import status


def check(target: str, ca_pem: bytes, server_name: str, timeout_s: float) -> None:
    """Return if the agent at ``target`` serves.

    Raises:
        errors.Unreachable: it does not, or does not answer.
    """
    credentials = grpc.ssl_channel_credentials(ca_pem)
    options = (("grpc.ssl_target_name_override", server_name), ("grpc.enable_retries", 0))
    channel = grpc.secure_channel(target, credentials, options=options)
    with contextlib.closing(channel):
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as exc:
            raise status.error(exc, f"the agent at {target}") from exc
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise errors.Unreachable(
            f"the agent at {target} does not serve", hint="its log says what it waits for"
        )
