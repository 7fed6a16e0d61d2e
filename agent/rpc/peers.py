"""Who is at the other end of a call, by what TLS and the headers show.

Promises: a certificate counts only where the handshake has verified it; tokens are handed on, never
kept, logged or put into an error.
Does not: decide whether a token is good.
"""

from __future__ import annotations

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from agent import errors
from agent.model.access import Caller

_SCHEME = "bearer "


def address(context: grpc.ServicerContext) -> str:
    """Where the call comes from, without its port."""
    return context.peer().rpartition(":")[0]


def certificate(context: grpc.ServicerContext) -> Caller | None:
    """Who the client's certificate names, as the API server reads it: the common name is the
    user, each organization a group. None if the port takes no client certificates.

    Raises:
        errors.Unauthenticated: it names nobody.
    """
    # Only a port that demands and verifies certificates has one here (certificates.py).
    shown = context.auth_context().get("x509_pem_cert")
    if not shown:
        return None
    subject = x509.load_pem_x509_certificate(bytes(shown[0])).subject
    names = [str(each.value) for each in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    groups = subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(names) != 1 or not names[0]:
        raise errors.Unauthenticated(
            "the client's certificate has no common name, which would be its user",
            hint="use a client certificate of the cluster, or a token",
        )
    # The group that the API server adds to everybody who is known.
    return Caller(names[0], (*(str(each.value) for each in groups), "system:authenticated"))


def token(context: grpc.ServicerContext) -> str:
    """The bearer token of a call.

    Raises:
        errors.Unauthenticated: there is none.
    """
    for key, value in context.invocation_metadata():
        if key == "authorization" and isinstance(value, str):
            if value[: len(_SCHEME)].lower() == _SCHEME and value[len(_SCHEME) :].strip():
                return value[len(_SCHEME) :].strip()
            break
    raise errors.Unauthenticated(
        "the call carries no bearer token",
        hint="log in with a token of the cluster (kubectl create token NAME makes one), or use a"
        " client certificate",
    )
