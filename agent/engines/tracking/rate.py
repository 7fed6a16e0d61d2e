"""How much of its memory a running tree writes in a while, as a capture with precopy would meet it.

Promises: nothing is read or copied, and nothing stays in the processes; what cannot be followed is
counted as written. If this program stands still meanwhile the kernel ends it, since processes that
move mappings wait for it.
Does not: say what that means for a capture; ``model/plan`` does.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Container, Iterable, Iterator, Sequence

from agent import errors
from agent.engines.tracking import areas
from agent.engines.tracking.protected import Protected
from agent.host import clock, deadman, injection, pagemap, proc
from agent.host.moves import Moves
from agent.model.plan import Written

log = logging.getLogger(__name__)


def measure(roots: Sequence[int], span_s: float, look_s: float) -> Written:
    """Follow the trees below ``roots`` for ``span_s``, after ``look_s``; processes that they fork
    meanwhile are not seen.

    Raises:
        errors.NotFound: a root has ended.
    """
    pids = dict.fromkeys(pid for root in roots for pid in proc.tree(root))
    with contextlib.ExitStack() as stack:
        stack.enter_context(deadman.armed())
        moves = Moves()
        stack.callback(moves.close)
        followed: list[tuple[int, Protected]] = []
        memory_bytes = apart_bytes = 0
        reasons: set[str] = set()
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                existing = _existing(pid, areas.eligible(pid))
                own_bytes = sum(map(pagemap.size_bytes, existing))
                try:
                    tracker = Protected(proc.identity(pid), moves)
                except (injection.InjectionRefused, errors.EnvironmentUnfit) as exc:
                    reasons.add(exc.message)
                    apart_bytes += own_bytes
                    continue
                stack.callback(tracker.close)
                followed.append((pid, tracker))
                memory_bytes += own_bytes
        # Before they are closed: by its descriptor a tracker knows who holds it, too.
        stack.callback(_take_back, roots, pids, followed)
        _written(followed)
        look = clock.Deadline.after(look_s)
        clock.wait_until(lambda: False, look, every_s=look_s)
        looked_bytes = _written(followed)
        began_s = clock.monotonic_s()
        clock.wait_until(lambda: False, clock.Deadline.after(span_s), every_s=span_s)
        passed_s = clock.monotonic_s() - began_s
        return Written(
            followed_bytes=memory_bytes,
            apart_bytes=apart_bytes,
            look_bytes=looked_bytes,
            span_bytes=_written(followed),
            span_s=passed_s,
            reasons=tuple(sorted(reasons | {each.reason for _, each in followed} - {""})),
        )


def _written(followed: Iterable[tuple[int, Protected]]) -> int:
    """How much may have been written since the last call; in the first one, how much there is."""
    total = 0
    for pid, tracker in followed:
        with contextlib.suppress(errors.NotFound):
            tracker.again()
            written = sum(pagemap.size_bytes(piece) for piece in tracker.round())
            if tracker.reason:
                chosen = areas.eligible(pid)
                existing = pagemap.union(pagemap.none(), *_existing(pid, chosen))
                written = pagemap.size_bytes(existing)
            total += written
    return total


def _existing(pid: int, chosen: pagemap.Ranges) -> Iterator[pagemap.Ranges]:
    pages = pagemap.Pagemap(pid)
    try:
        for start, end in chosen.tolist():
            yield pages.existing(start, end)
    finally:
        pages.close()


def _take_back(
    roots: Iterable[int], known: Container[int], followed: Iterable[tuple[int, Protected]]
) -> None:
    """Leave nothing in processes that were forked while their parents were taken on."""
    for root in roots:
        with contextlib.suppress(errors.NotFound):
            for pid in proc.tree(root):
                if pid not in known:
                    _take_back_from(pid, followed)


def _take_back_from(pid: int, followed: Iterable[tuple[int, Protected]]) -> None:
    try:
        for _, tracker in followed:
            tracker.take_back(pid)
    except errors.NotFound:
        pass  # and with it what it held
    except injection.InjectionRefused as exc:
        log.warning("a descriptor of ours stays in process %d: %s", pid, exc.message)
