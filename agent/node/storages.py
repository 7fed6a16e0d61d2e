"""All storages of an agent: which one a dump goes to, and where an image lies.

Promises: an image is found in whichever storage it lies; a storage that cannot be read does not
hide the others, and whoever asks hears of it; where pods and namespaces choose, no storage is
guessed: a namespace that cannot be read is a refusal.
Does not: move images between storages.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import TypeVar

from agent import errors
from agent.model import ids, storage
from agent.model.pods import Pod
from agent.node.stores import NamespaceStores
from agent.store.repository import Store

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Found:
    """An image and where it lies."""

    storage: str
    store: Store
    group: ids.GroupName
    epoch: ids.EpochId

    @property
    def image(self) -> str:
        """Its full name."""
        return ids.image_name(self.group, self.epoch)


class Storages:
    """The storages by name, the default one among them. ``annotations`` asks for those of a
    namespace, by its name.
    """

    def __init__(
        self,
        storages: Mapping[str, NamespaceStores],
        annotations: Callable[[str], Mapping[str, str]],
    ) -> None:
        self._storages = storages
        self._annotations = annotations
        self._problems: dict[str, str] = {}

    def for_pod(self, pod: Pod) -> str:
        """The name of the storage that the images of ``pod`` go to.

        Raises:
            errors.InvalidInput: there is none of the name that it, or its namespace, asks for.
            errors.CkptError: its namespace cannot be read.
        """
        asks_itself = storage.asks_itself(pod.annotations)
        of_namespace = {} if asks_itself else self._annotations(pod.namespace)
        return storage.choose(self._storages, pod.annotations, of_namespace).name

    def for_namespace(self, namespace: ids.Namespace, asked: str = "") -> str:
        """The name of the storage for images of ``namespace`` that no pod of it was dumped to:
        ``asked`` unless it is "". Raises as ``for_pod``.
        """
        if asked:
            storage.check_known(self._storages, asked)
            return asked
        return storage.choose(self._storages, {}, self._annotations(namespace)).name

    def make(self, namespace: ids.Namespace, name: str) -> Store:
        """The store of ``namespace`` in the storage ``name``, made if there is none.

        Raises:
            errors.InvalidInput: there is no storage of that name.
            errors.CkptError: as ``NamespaceStores.open``.
        """
        storage.check_known(self._storages, name)
        return self._storages[name].open(namespace, create=True)

    def check(self) -> None:
        """Return if at least one storage can take a dump. Those that come and go are logged.

        Raises:
            errors.VolumeError: none can; why the default one cannot.
        """
        failed: dict[str, errors.CkptError] = {}
        for name, stores in self._storages.items():
            try:
                stores.space()
            except errors.CkptError as exc:
                failed[name] = exc
        if len(failed) == len(self._storages):
            self._problems = {}
            raise failed[storage.DEFAULT]
        for name in self._storages:
            problem = failed[name].message if name in failed else ""
            if problem != self._problems.get(name, ""):
                level = logging.WARNING if problem else logging.INFO
                _log.log(level, "storage %s: %s", name, problem or "is there again")
        self._problems = {name: exc.message for name, exc in failed.items()}

    def each(
        self, namespace: ids.Namespace, only: str, act: Callable[[Store], T]
    ) -> tuple[dict[str, T], dict[str, str]]:
        """What ``act`` returns for the namespace's store in each storage, or ``only`` in that one
        unless it is ""; and of those where that failed, why. A storage without a store is in
        neither.

        Raises:
            errors.InvalidInput: there is no storage ``only``.
            errors.CkptError: it failed in the only storage there was to look at, or in all.
        """
        if only:
            storage.check_known(self._storages, only)
        done: dict[str, T] = {}
        failed: dict[str, errors.CkptError] = {}
        for name in [only] if only else self._storages:
            try:
                done[name] = act(self._storages[name].open(namespace, create=False))
            except errors.NotFound:
                continue
            except errors.CkptError as exc:
                failed[name] = exc
        if failed and len(failed) == (1 if only else len(self._storages)):
            raise next(iter(failed.values()))
        return done, {name: exc.message for name, exc in failed.items()}

    def find(self, namespace: ids.Namespace, image: str, only: str = "") -> Found:
        """The image that ``image`` names, in whichever storage, or in ``only`` unless it is "".

        Raises:
            errors.NotFound: nothing, or several.
            errors.InvalidInput: it is no name of an image, or there is no storage ``only``.
            errors.VolumeGone: it may lie in a storage that cannot be read.
            errors.VolumeError | errors.DataError: no storage can be read.
        """
        ids.group_name(image.partition("@")[0])
        looked, unread = self.each(namespace, only, lambda store: (store, *store.matching(image)))
        if not looked and not unread:
            raise errors.NotFound(
                f"namespace {namespace} has no images", hint="the first dump makes its store"
            )
        matching = {name: epochs for name, (_, _, epochs) in looked.items()}
        name, epoch = storage.find(image, matching, unread)
        store, group, _ = looked[name]
        return Found(name, store, group, epoch)
