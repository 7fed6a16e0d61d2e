"""One operation from its beginning, or from where another replica left it, to its end.

Promises: what is about to be done is recorded before it is done; what was asked with a caller's
rights is reviewed again when its turn has come; what fails is raised, and says what became of the
job.
Does not: choose which operation is next (``runner``), or end its record if it fails.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from agent import errors
from agent.cluster import objections
from agent.cluster import session as cluster_session
from agent.cluster.session import Session
from agent.coordination import asked, messages
from agent.coordination.book import Book
from agent.coordination.reviews import Reviews
from agent.coordinator import (
    checkpoint,
    followed,
    jobsetcourse,
    jobsetrestore,
    jobsets,
    selected,
)
from agent.coordinator.machine import State as Progress
from agent.host import clock
from agent.kube.connection import Connection
from agent.model import access
from agent.model.jobsetrestore import Step
from agent.model.operations import CANCELLABLE, Operation, Stage, State
from agent.rpc import epochclient, results
from agent.rpc.v1 import coordinator_pb2 as api
from agent.settings import Settings

T = TypeVar("T")

# An API server or a store that is away for longer is an outage that people look at.
_PATIENCE_S = 600.0
_PAUSE_S = 2.0


class Handle:
    """Lets others ask an operation to give up while it runs. Whoever asks has seen, with its
    record held (``Book.held``), that it still can.
    """

    def __init__(self) -> None:
        self.leaving = threading.Event()
        """This replica ends; another goes on with it."""
        self.late = threading.Event()
        """It took longer than it may."""
        self.control = checkpoint.Control()
        self.watch = jobsetcourse.Watch()

    def give_up(self) -> None:
        """Ask."""
        self.control.cancel()
        self.watch.stop()


class Work:
    """Does operations of ``book``, in the cluster of ``api``."""

    def __init__(self, api: Connection, settings: Settings, book: Book, reviews: Reviews) -> None:
        self._api, self._settings = api, settings
        self._book, self._reviews = book, reviews

    @contextlib.contextmanager
    def session(self, namespace: str, caller: access.Caller) -> Iterator[Session]:
        """A session that acts for ``caller``."""
        may = self._reviews.of(caller)
        with cluster_session.acting_for(self._api, self._settings, namespace, may) as made:
            yield made

    def run(self, operation: Operation, handle: Handle) -> None:
        """Do it from the beginning, and record its success.

        Raises:
            errors.Interrupted: it was given up as asked; the job is as it was.
            errors.CkptError: it failed.
        """
        with self.session(operation.namespace, operation.caller) as session:
            self.begin(session, operation, handle)

    def begin(self, session: Session, operation: Operation, handle: Handle) -> None:
        """As ``run``."""
        said = asked.request(operation)
        handle.watch = self.watch(operation.id, handle)
        match said:
            case api.CreateEpochRequest():
                self._epoch(session, operation, said, handle)
            case api.RestoreGroupRequest() if operation.jobset:
                returned = jobsetrestore.bring_back(
                    session,
                    operation.jobset,
                    epoch=said.epoch,
                    nodes=tuple(said.nodes),
                    storage=said.storage,
                    replace=said.replace,
                    now_s=operation.ordered_s,
                    watch=handle.watch,
                )
                self.returned(operation.id, returned)
            case api.RestoreGroupRequest():
                self._restore_selected(session, operation, said, handle)
            case api.MigrateRequest():
                moved = jobsetrestore.migrate(
                    session,
                    operation.jobset,
                    tuple(said.nodes),
                    now_s=operation.ordered_s,
                    watch=handle.watch,
                )
                self.returned(operation.id, moved.returned)

    def _epoch(
        self,
        session: Session,
        operation: Operation,
        said: api.CreateEpochRequest,
        handle: Handle,
    ) -> None:
        create = access.Right("create", "images", session.namespace)
        objections.check_rights(session, [create])
        target, watch = asked.target_of(operation), handle.watch
        if target.jobset:
            dump = functools.partial(jobsets.dump, session, target.jobset)
        elif target.followed:
            dump = functools.partial(followed.dump, session, target.followed)
        else:
            dump = functools.partial(selected.dump, session, target.group, target.selector)
        done = dump(
            now_s=operation.ordered_s,
            storage=said.storage,
            stop=said.stop,
            control=handle.control,
            watch=watch.state,
            named=watch.named,
        )
        self.committed(operation.id, done, state=State.SUCCEEDED)

    def _restore_selected(
        self,
        session: Session,
        operation: Operation,
        said: api.RestoreGroupRequest,
        handle: Handle,
    ) -> None:
        restore = access.Right("restore", "images", session.namespace)
        objections.check_rights(session, [restore])

        def attempting(image: results.Image, attempt: str) -> None:
            self._stage(
                operation.id,
                handle,
                stage=Stage.ATTEMPTED,
                image=messages.image(image),
                attempt=attempt,
            )

        returned = selected.restore(
            session,
            operation.group,
            said.epoch,
            now_s=operation.ordered_s,
            storage=said.storage,
            again=said.again,
            control=handle.control,
            watch=handle.watch.state,
            attempting=attempting,
        )
        self.returned(operation.id, returned)

    def watch(self, which: str, handle: Handle) -> jobsetcourse.Watch:
        """Who looks on at an operation, and records what it announces."""

        def named(epoch: epochclient.Epoch) -> None:
            self._stage(which, handle, stage=Stage.NAMED, epoch=epoch.name, storage=epoch.storage)

        def committed(done: checkpoint.Checkpoint) -> None:
            self.committed(which, done)
            made.go_on()

        def intends(image: results.Image) -> None:
            self._stage(
                which, handle, stage=Stage.INTENDED, image=messages.image(image), attempt=""
            )

        def attempting(attempt: str) -> None:
            self._stage(which, handle, stage=Stage.ATTEMPTED, attempt=attempt)

        def step(now: Step | Progress) -> None:
            self._book.step(which, now.value)

        made = jobsetcourse.Watch(
            step=step,
            state=step,
            named=named,
            committed=committed,
            intends=intends,
            attempting=attempting,
        )
        return made

    def committed(
        self, which: str, done: checkpoint.Checkpoint, state: State = State.RUNNING
    ) -> None:
        """Record a committed epoch; ``state`` is whether that is all."""
        ended_s = clock.wall_s() if state is State.SUCCEEDED else 0.0
        self.patiently(
            lambda: self._book.change(
                which,
                stage=Stage.COMMITTED,
                image=messages.image(done.image),
                figures=messages.figures(done),
                state=state,
                ended_s=ended_s,
            )
        )

    def returned(self, which: str, done: jobsetcourse.Returned) -> None:
        """Record that a group runs again."""
        self.patiently(
            lambda: self._book.change(
                which,
                state=State.SUCCEEDED,
                ended_s=clock.wall_s(),
                image=messages.image(done.image),
                pods=tuple(messages.pods(done)),
            )
        )

    def patiently(self, act: Callable[[], T]) -> T:
        """Do what is past giving up, again while that may help and this replica leads."""
        deadline = clock.Deadline.after(_PATIENCE_S)
        while True:
            try:
                return act()
            except errors.CkptError as exc:
                if not exc.retryable or self._book.deposed.is_set() or deadline.expired:
                    raise
            pause = deadline.sooner(_PAUSE_S)
            clock.wait_until(self._book.deposed.is_set, pause, every_s=_PAUSE_S)

    def _stage(self, which: str, handle: Handle, **changes: Any) -> None:
        def check(found: Operation) -> None:
            given_up = found.cancelling or handle.leaving.is_set()
            if found.stage in CANCELLABLE and given_up:
                raise errors.Interrupted("interrupted", hint="the job goes on")

        self._book.change(which, check, **changes)
