"""The hooks of a pod around one checkpoint of it, or after a restore: which run, when, and what
their failures mean.

Promises: where pre hooks were begun, post hooks follow, each exactly once, whatever became of the
checkpoint; no post hook begins before the last pre hook has ended; nothing here is done while the
job stands still; a post hook's failure is told and fails nothing. Where an agent is killed before
any post hook was begun, its successor runs them.
Does not: know how a hook is carried out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Protocol

from agent import errors
from agent.host import addresses
from agent.kube.events import Reason
from agent.model import hooks as model_hooks
from agent.model.container import Container
from agent.model.hooks import Hook, Hooks, Outcome, Phase, Scope, Told, When
from agent.model.pods import Placement, Pod
from agent.node.interrupted import Left, Trail

_log = logging.getLogger(__name__)


class Calls(Protocol):
    """Carries a hook out (``hookcalls``)."""

    def call(self, hook: Hook, containers: Sequence[Container], told: Told) -> None:
        """Do it.

        Raises:
            errors.HookFailed: it failed.
        """


class Teller(Protocol):
    """Tells people what happened to a pod (agent.kube.events)."""

    def tell(self, pod: Pod, reason: Reason, note: str) -> None:
        """Put an event on the pod; returns at once."""


Find = Callable[[Left], tuple[Pod, Sequence[Container]]]
Alone = Callable[[Pod, Sequence[Container]], AbstractContextManager[None]]


class PodHooks:
    """The hooks of pods of this node."""

    def __init__(self, calls: Calls, teller: Teller, trail: Trail) -> None:
        """``trail`` is for these notes only; those of a predecessor are taken."""
        self._calls = calls
        self._teller = teller
        self._trail = trail
        self._left = trail.take()

    def follow_up(self, find: Find, alone: Alone) -> None:
        """Run the post hooks that a killed predecessor owes; returns at once. ``find`` gives the
        pod and its containers, or raises ``errors.CkptError`` if they are no more; in ``alone``
        nothing else is done to them, and it raises such an error if that cannot be.
        """
        left, self._left = self._left, []
        for each in left:
            # What waits for its turn must not keep a program from ending: it is written down.
            threading.Thread(
                target=self._owed, args=(each, find, alone), name="post hooks", daemon=True
            ).start()

    def _owed(self, left: Left, find: Find, alone: Alone) -> None:
        try:
            pod, containers = find(left)
            with contextlib.ExitStack() as waiting:
                waiting.enter_context(self._trail.noted(left.kind, pod, leads=left.leads))
                with alone(pod, containers):
                    waiting.close()
                    self.around(pod, containers, leads=left.leads).owed()
        except errors.CkptError as exc:
            name = f"{left.namespace}/{left.pod}"
            _log.warning("post hooks of pod %s cannot be run any more: %s", name, exc.message)

    def around(
        self, pod: Pod, containers: Sequence[Container], *, leads: bool = True, image: str = ""
    ) -> Around:
        """Those of ``pod``. ``leads``: the hooks of its group are run here; ``image`` is what the
        checkpoint will be called, if that is known.

        Raises:
            errors.InvalidInput: what the pod's owner wants makes no sense.
        """
        found = model_hooks.read(pod.annotations, pod.containers)
        about = Where(pod, tuple(containers), leads, image)
        return Around(self._calls, self._teller, self._trail, found, about)

    def restored(
        self,
        pod: Pod,
        containers: Sequence[Container],
        image: str,
        was: Placement,
        *,
        leads: bool = True,
    ) -> tuple[str, ...]:
        """Run the post hooks of a pod that runs an image's processes; what failed."""
        try:
            around = self.around(pod, containers, leads=leads, image=image)
        except errors.InvalidInput as exc:
            # The pod runs: it is too late to refuse anything.
            self._teller.tell(pod, "HookFailed", exc.message)
            return (exc.message,)
        return around.restored(was)


@dataclasses.dataclass(frozen=True)
class Where:
    """The pod, its containers that take part, and as what."""

    pod: Pod
    containers: tuple[Container, ...]
    leads: bool
    image: str


class Around:
    """One checkpoint: ``before``, ``running`` when the processes run again, ``after`` when its
    outcome is known. Or one restore: ``restored``.
    """

    def __init__(
        self, calls: Calls, teller: Teller, trail: Trail, hooks: Hooks, where: Where
    ) -> None:
        self._calls = calls
        self._teller = teller
        self._trail = trail
        self._noted = contextlib.ExitStack()
        self._hooks = hooks
        self._where = where
        self._image = where.image
        self._turn, self._state = threading.Lock(), threading.Lock()
        self._begun = False
        self._given_up = False
        self._resuming: threading.Thread | None = None
        self._problems: list[str] = []

    @property
    def problems(self) -> tuple[str, ...]:
        """What failed and was not to give the checkpoint up, a text for people each."""
        return tuple(self._problems)

    def give_up(self) -> bool:
        """Begin no more pre hooks; whether post hooks have to follow."""
        with self._state:
            self._given_up = True
            return self._begun and bool(self._hooks.post)

    def before(self, check: Callable[[], None] = lambda: None) -> None:
        """Run the pre hooks, unless they were run and nothing has followed; ``check`` may raise
        between them.

        Raises:
            errors.HookFailed: one failed that must not.
        """
        with self._turn:
            if self._resuming is not None:
                # A second try, for which the job has to be prepared once more.
                self._resuming.join()
                self._resuming, self._begun = None, False
            if self._begun:
                return
            for step in self._hooks.pre:
                check()
                self._begin()
                for hook, failure in self._run(step, Phase.PRE, None):
                    if hook.aborts:
                        raise failure
            self._begin()

    def _begin(self) -> None:
        with self._state:
            if self._given_up:
                raise errors.DumpFailed("the epoch was given up", hint="the job goes on")
            if not self._begun and self._hooks.post:
                pod, leads = self._where.pod, self._where.leads
                self._noted.enter_context(self._trail.noted("dump", pod, leads=leads))
            self._begun = True

    def running(self) -> None:
        """The processes run again: let them know. Returns at once."""
        with self._turn:
            if self._begun and self._resuming is None:
                self._resuming = threading.Thread(
                    target=self._post, args=(Outcome.CAPTURED, (When.RUNNING,)), name="post hooks"
                )
                self._resuming.start()

    def after(self, outcome: Outcome, image: str = "") -> tuple[str, ...]:
        """Run the post hooks that are left, if any pre hook was begun; gives ``problems``."""
        self.give_up()
        with self._turn:
            self._image = image or self._image
            if self._begun:
                self._begun = False
                due = tuple(When)
                if self._resuming is not None:
                    self._resuming.join()
                    due = (When.DECIDED,)
                self._post(outcome, due)
        return self.problems

    def restored(self, was: Placement) -> tuple[str, ...]:
        """Tell restored processes where they are; gives ``problems``."""
        self._post(Outcome.RESTORED, tuple(When), was)
        return self.problems

    def owed(self) -> None:
        """Run the post hooks that another agent has not begun."""
        self._post(Outcome.UNKNOWN, tuple(When))

    def _post(self, outcome: Outcome, due: Sequence[When], was: Placement | None = None) -> None:
        self._noted.close()
        for step in self._hooks.post:
            self._run([hook for hook in step if hook.when in due], Phase.POST, outcome, was)

    def _run(
        self,
        step: Sequence[Hook],
        phase: Phase,
        outcome: Outcome | None,
        was: Placement | None = None,
    ) -> list[tuple[Hook, errors.HookFailed]]:
        """Run hooks at once; those that failed."""
        ours = [hook for hook in step if hook.scope is Scope.MEMBER or self._where.leads]
        if not ours:
            return []
        now = self._now()

        def one(hook: Hook) -> errors.HookFailed | None:
            told = Told(hook.name, phase, self._where.pod.namespace, now, outcome, self._image, was)
            try:
                self._calls.call(hook, self._where.containers, told)
            except errors.HookFailed as exc:
                return exc
            except Exception as exc:  # noqa: BLE001 - told as the hook's failure, and logged whole
                # A defect costs a hook, and not what was done around it: the job may run already.
                _log.exception("the hook %r met a defect", hook.name)
                failed = errors.HookFailed(
                    f"the hook {hook.name!r} failed: the agent met a defect",
                    hint="the agent's log says more",
                    hook=hook.name,
                )
                failed.__cause__ = exc
                return failed
            return None

        with ThreadPoolExecutor(len(ours), thread_name_prefix="hook") as pool:
            ended = zip(ours, pool.map(one, ours), strict=True)
        failed = [(hook, failure) for hook, failure in ended if failure is not None]
        for hook, failure in failed:
            if not hook.aborts:
                self._note(phase, failure)
        return failed

    def _note(self, phase: Phase, failure: errors.HookFailed) -> None:
        # What it said is for whoever asked for the checkpoint, not for the log.
        facts = {"pod": str(self._where.pod), "phase": phase.value}
        _log.warning("%s", failure.message, extra={"facts": facts})
        self._teller.tell(self._where.pod, "HookFailed", f"{failure.message} ({failure.hint})")
        said = failure.facts.get("output")
        self._problems.append(f"{failure.message}\n{said}" if said else failure.message)

    def _now(self) -> Placement:
        pod, here = self._where.pod, addresses.of(self._where.containers[0].pid)
        return Placement(pod.name, pod.uid, pod.node, tuple(here))
