"""How much of its memory a running tree writes in a while, as a capture with precopy would meet it.

Promises: nothing is read or copied, and nothing stays in the processes; what cannot be followed is
counted as written.
Does not: say what that means for a capture; ``model/plan`` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from agent import errors
from agent.engines.tracking import areas
from agent.engines.tracking.protected import Protected
from agent.host import clock, injection, pagemap, proc
from agent.host.moves import Moves
from agent.model.plan import Written


def measure(roots: Iterable[int], span_s: float, look_s: float) -> Written:
    """Follow the trees below ``roots`` for ``span_s``, after ``look_s``; processes that they fork
    meanwhile are not seen.

    Raises:
        errors.NotFound: a root has ended.
    """
    pids = dict.fromkeys(pid for root in roots for pid in proc.tree(root))
    with contextlib.ExitStack() as stack:
        moves = Moves()
        stack.callback(moves.close)
        followed: list[Protected] = []
        memory_bytes = apart_bytes = 0
        reasons: set[str] = set()
        for pid in pids:
            with contextlib.suppress(errors.NotFound):
                own_bytes = sum(_existing(pid))
                try:
                    tracker = Protected(proc.identity(pid), moves)
                except (injection.InjectionRefused, errors.EnvironmentUnfit) as exc:
                    reasons.add(exc.message)
                    apart_bytes += own_bytes
                    continue
                stack.callback(tracker.close)
                followed.append(tracker)
                memory_bytes += own_bytes
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
            reasons=tuple(sorted(reasons | {each.reason for each in followed} - {""})),
        )


def _written(followed: Iterable[Protected]) -> int:
    """How much was written since the last call; in the first one, how much there is."""
    total = 0
    for tracker in followed:
        with contextlib.suppress(errors.NotFound):
            total += sum(map(pagemap.size_bytes, tracker.round()))
    return total


def _existing(pid: int) -> Iterator[int]:
    pages = pagemap.Pagemap(pid)
    try:
        for start, end in areas.eligible(pid).tolist():
            yield pagemap.size_bytes(pages.existing(start, end))
    finally:
        pages.close()
