"""A caller as a kubeconfig describes it, in all the ways that kubectl knows.

Promises: contexts, credential plugins, client certificates and proxies are honoured.
Does not: write anything back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import urllib3
from kubernetes import client, config
from kubernetes.config import kube_config

from agent import errors


class KubeconfigAccount:
    """An ``Account`` that the package kubernetes has read."""

    def __init__(self, configuration: Any) -> None:
        configuration.retries = 1
        self._configuration = configuration
        self._api = client.ApiClient(configuration)
        self.url = str(configuration.host)

    def authorization(self) -> str | None:
        """A token, refreshed if it was about to expire."""
        text = self._configuration.get_api_key_with_prefix("BearerToken", alias="authorization")
        return None if text is None else str(text)

    def certificate(self) -> tuple[str, str] | None:
        """The files, which may be the package's own copies."""
        found = self._configuration
        if found.cert_file and found.key_file:
            return str(found.cert_file), str(found.key_file)
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
        try:
            answer = self._api.call_api(method, url, dict(headers), body, _request_timeout=timeout)
        except client.ApiException as exc:
            raise urllib3.exceptions.HTTPError(str(exc.reason or exc)) from exc
        found: urllib3.BaseHTTPResponse = answer.response
        return found

    def configuration(self) -> Any:
        """The package's own."""
        return self._configuration

    def close(self) -> None:
        """Let go of the connections."""
        self._api.close()


def read(place: str, context: str | None) -> tuple[KubeconfigAccount, str, str]:
    """The account of ``context`` in the kubeconfig ``place`` (default: its current one), the
    context's name and its namespace.

    Raises:
        errors.NotFound: no such context.
        errors.InvalidInput: the kubeconfig does not make sense.
        errors.Unauthenticated: its credential plugin gave nothing.
    """
    made = client.Configuration()
    try:
        contexts, current = config.list_kube_config_contexts(place)
        known = {str(each["name"]): each for each in contexts}
        if context is not None and context not in known:
            raise errors.NotFound(
                f"there is no context {context!r} in {place}",
                hint=f"it has {', '.join(sorted(known)) or 'none'}",
                context=context,
            )
        chosen = known[context] if context is not None else current
        config.load_kube_config(place, context, made, persist_config=False)
    except errors.CkptError:
        raise
    except (config.ConfigException, OSError, ValueError, TypeError, KeyError) as exc:
        raise errors.InvalidInput(
            f"the kubeconfig {place} cannot be used: {exc}",
            hint="kubectl config view shows what kubectl makes of it",
            path=place,
        ) from exc
    _check_plugin(place, chosen, made)
    namespace = chosen["context"].get("namespace") or "default"
    return KubeconfigAccount(made), str(chosen["name"]), str(namespace)


def _check_plugin(place: str, chosen: Any, made: Any) -> None:
    """The package only logs that a credential plugin failed; then it would call as nobody."""
    if made.api_key or made.cert_file:
        return
    merged = kube_config.KubeConfigMerger(place).config
    user = merged["users"].get_with_name(chosen["context"]["user"], safe=True)
    if user is not None and "exec" in user["user"]:
        command = user["user"]["exec"].safe_get("command")
        raise errors.Unauthenticated(
            f"the credential plugin {command} of context {chosen['name']} gave no identity",
            hint="run it by hand to see why, or log in again",
        )
