"""Who calls, and what they want to do.

Promises: values only, without any secret.
Does not: decide; the API server does, by its users' roles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

# What roles name to give rights on images; no such objects are in the API server.
API_GROUP = "ckpt-agent.dev"


@dataclasses.dataclass(frozen=True)
class Caller:
    """An identity as the API server knows it."""

    user: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Right:
    """One thing that a role can allow: ``verb`` on ``resource``, or on its ``subresource``, of an
    API ``group``, which is "" for Kubernetes' own. An empty ``namespace`` is the whole cluster, an
    empty ``name`` any.
    """

    verb: str
    resource: str
    namespace: str = ""
    name: str = ""
    group: str = API_GROUP
    subresource: str = ""

    def attributes(self) -> dict[str, str]:
        """The ``resourceAttributes`` of an access review."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}

    def __str__(self) -> str:
        what = self.resource + (f"/{self.subresource}" if self.subresource else "")
        what += f".{self.group}" if self.group else ""
        named = f" {self.name}" if self.name else ""
        where = f" in namespace {self.namespace}" if self.namespace else ""
        return f"{self.verb} {what}{named}{where}"
