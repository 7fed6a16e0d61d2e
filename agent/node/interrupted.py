"""What this agent was doing to which pod, written down so that its successor can tell.

What an engine must undo is in the engine's own journal; this is for people: one small file an
operation, in a directory that is emptied at boot, as the processes are.

Promises: an operation that ended, well or not, leaves nothing; one whose agent was killed is found
exactly once.
Does not: undo anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
from collections.abc import Iterator
from typing import Literal

from agent import errors
from agent.model.pods import Pod

_log = logging.getLogger(__name__)

Kind = Literal["dump", "restore"]


@dataclasses.dataclass(frozen=True)
class Left:
    """An operation that nobody finished; ``leads`` as ``Trail.noted`` was told."""

    kind: Kind
    namespace: str
    pod: str
    uid: str
    leads: bool = True


class Trail:
    """The files in ``directory``, which is made when first needed."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    @contextlib.contextmanager
    def noted(self, kind: Kind, pod: Pod, *, leads: bool = True) -> Iterator[None]:
        """Write the operation down until the context is left. ``leads``: what is done once for the
        pod's group is done with this pod.

        Raises:
            errors.EnvironmentUnfit: the directory cannot be written.
        """
        path = os.path.join(self._directory, f"{secrets.token_hex(8)}.json")
        left = Left(kind, pod.namespace, pod.name, pod.uid, leads)
        try:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            with open(f"{path}.new", "w", encoding="utf-8") as stream:
                json.dump(dataclasses.asdict(left), stream)
            os.rename(f"{path}.new", path)
        except OSError as exc:
            raise errors.EnvironmentUnfit(
                f"cannot write to {self._directory}: {exc.strerror}",
                hint="is it a directory of the node, mounted read-write?",
                path=self._directory,
            ) from exc
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    def take(self) -> list[Left]:
        """What a predecessor was doing when it was killed; forgotten by this. To be called before
        the first operation.
        """
        found = []
        try:
            names = os.listdir(self._directory)
        except FileNotFoundError:
            return []
        for name in sorted(names):
            path = os.path.join(self._directory, name)
            try:
                with open(path, encoding="utf-8") as stream:
                    fields = json.load(stream)
                leads = bool(fields.pop("leads", True))
                words = {key: str(value) for key, value in fields.items()}
                found.append(Left(**words, leads=leads))  # type: ignore[arg-type]
            except (OSError, ValueError, TypeError, AttributeError) as exc:
                # Cut short by a crash of the node, or of another version: nothing depends on it.
                _log.warning("%s cannot be read: %s", path, exc)
            with contextlib.suppress(OSError):
                os.unlink(path)
        return found
