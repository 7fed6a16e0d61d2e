"""A caller that is a pod: the ServiceAccount that the kubelet gives it, and the API server of its
own cluster.

Promises: the token is the one that the kubelet keeps fresh; little is loaded, since this is for
services that run on every node.
Does not: use a proxy: the cluster's own address needs none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import urllib3

from agent import errors

DIRECTORY = "/var/run/secrets/kubernetes.io/serviceaccount"

# Calls at once that keep their connection: reviews of a few callers beside a watch.
_CONNECTIONS = 8


class ServiceAccount:
    """An ``Account`` from the files in ``directory``."""

    def __init__(self, url: str, directory: str) -> None:
        self.url = url
        self._directory = directory
        self._pool = urllib3.PoolManager(
            maxsize=_CONNECTIONS,
            cert_reqs="CERT_REQUIRED",
            ca_certs=os.path.join(directory, "ca.crt"),
            retries=1,
        )

    def authorization(self) -> str | None:
        """The token as it is now: the kubelet replaces it before it expires."""
        return f"Bearer {_content(self._directory, 'token')}"

    def certificate(self) -> tuple[str, str] | None:
        """It has none."""
        return None

    def send(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Mapping[str, Any] | None,
        timeout: tuple[float, float],
    ) -> urllib3.BaseHTTPResponse:
        """As ``Account.send``."""
        return self._pool.request(
            method,
            url,
            body=None if body is None else json.dumps(body).encode(),
            headers=headers,
            timeout=urllib3.Timeout(connect=timeout[0], read=timeout[1]),
            preload_content=False,
        )

    def configuration(self) -> Any:
        """As ``Account.configuration``."""
        from kubernetes import client, config

        made = client.Configuration()
        config.load_incluster_config(made)
        return made

    def close(self) -> None:
        """Let go of the connections."""
        self._pool.clear()


def is_here() -> bool:
    """Whether this runs in a pod with a ServiceAccount's token."""
    return os.path.exists(os.path.join(DIRECTORY, "token"))


def read(
    directory: str = DIRECTORY, environ: Mapping[str, str] = os.environ
) -> tuple[ServiceAccount, str]:
    """The account of the pod that this runs in, and its namespace.

    Raises:
        errors.InvalidInput: the kubelet gave it none, or not all of it.
    """
    host = environ.get("KUBERNETES_SERVICE_HOST", "")
    port = environ.get("KUBERNETES_SERVICE_PORT", "")
    if not host or not port:
        raise _unusable("the pod's environment does not say where the API server is")
    for name in ("token", "ca.crt"):
        _content(directory, name)
    namespace = _content(directory, "namespace")
    url = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
    return ServiceAccount(url, directory), namespace


def _content(directory: str, name: str) -> str:
    try:
        with open(os.path.join(directory, name), encoding="utf-8") as stream:
            content = stream.read().strip()
    except OSError as exc:
        raise _unusable(f"{name}: {exc.strerror}") from exc
    if not content:
        raise _unusable(f"{name} is empty")
    return content


def _unusable(reason: str) -> errors.InvalidInput:
    return errors.InvalidInput(
        f"this pod's ServiceAccount cannot be used: {reason}",
        hint="set automountServiceAccountToken, or name a kubeconfig",
    )
