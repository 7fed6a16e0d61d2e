"""Which late pages come next, and what is said of one that was asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.engines.criu import lazy
from agent.engines.criu.pending import Answer, Pending, Share
from agent.model.streams import PAGE_BYTES, PageRun

_gaps = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 900)), min_size=1, max_size=8)

_either = st.booleans()


def _runs(gaps: list[tuple[int, int]]) -> list[PageRun]:
    found, at = [], 1
    for gap, pages in gaps:
        found.append(PageRun((at + gap) * PAGE_BYTES, pages, 4))
        at += gap + pages
    return found


def _pages(runs: list[PageRun]) -> list[int]:
    return [run.address + n * PAGE_BYTES for run in runs for n in range(run.pages)]


@given(st.lists(_gaps, min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_every_page_is_sent_once_and_every_question_answered_once(
    gaps: list[list[tuple[int, int]]], senders: int, data: st.DataObject
) -> None:
    spaces = [_runs(each) for each in gaps]
    all_pages = [(n, page) for n, runs in enumerate(spaces) for page in _pages(runs)]
    pending = Pending(spaces, senders)
    under_way: list[Share] = []
    sent: list[tuple[int, int]] = []
    asked: list[tuple[int, int]] = []
    answered: list[tuple[int, int]] = []

    def finish(share: Share) -> None:
        sent.extend((share.number, page) for page in _pages(share.runs))
        for address, answer in pending.finish(share):
            assert answer is Answer.SENT
            assert (share.number, address) in sent
            answered.append((share.number, address))

    while not pending.complete:
        assert pending.sent_pages == len(sent)
        waiting = [each for each in all_pages if each not in asked]
        some, other = data.draw(_either), data.draw(_either)
        if under_way and some:
            finish(under_way.pop(data.draw(st.integers(0, len(under_way) - 1))))
        elif waiting and len(asked) < 8 and other:
            number, page = data.draw(st.sampled_from(waiting))
            asked.append((number, page))
            found = pending.ask(number, page)
            if isinstance(found, Share):
                assert page in _pages(found.runs)
                under_way.append(found)
            elif found is not None:
                assert found is Answer.SENT
                assert (number, page) in sent
                answered.append((number, page))
        else:
            share = pending.take(data.draw(st.integers(0, senders - 1)))
            if share is not None:
                under_way.append(share)
            else:
                finish(under_way.pop())
    assert sorted(sent) == all_pages
    assert sorted(answered) == sorted(asked)


def test_what_was_sent_is_never_answered_as_zero_and_sent_again_when_asked_for_again() -> None:
    run = PageRun(16 * PAGE_BYTES, 8, 4)
    pending = Pending([[run]], 1)
    share = pending.take(0)
    assert share is not None
    pending.zero(share, 20 * PAGE_BYTES, 2)
    assert pending.finish(share) == []
    assert pending.ask(0, 20 * PAGE_BYTES) is pending.ask(0, 21 * PAGE_BYTES) is Answer.ZERO
    assert pending.ask(0, 15 * PAGE_BYTES) is pending.ask(0, 24 * PAGE_BYTES) is Answer.ZERO
    assert pending.ask(0, 22 * PAGE_BYTES) is Answer.SENT
    again = pending.ask(0, 22 * PAGE_BYTES)
    assert isinstance(again, Share)
    assert not pending.complete  # or it would be zero when all others have come
    assert again.runs == [PageRun(22 * PAGE_BYTES, 1, 4)]
    assert pending.finish(again) == [(22 * PAGE_BYTES, Answer.SENT)]
    assert pending.sent_pages == 8


def test_a_page_that_is_asked_for_while_it_is_sent_is_answered_when_it_was() -> None:
    pending = Pending([[PageRun(0, 8, 4)]], 1)
    share = pending.take(0)
    assert share is not None
    assert pending.ask(0, 3 * PAGE_BYTES) is None
    assert pending.ask(0, 4 * PAGE_BYTES) is None
    pending.zero(share, 4 * PAGE_BYTES, 1)
    assert pending.finish(share) == [
        (3 * PAGE_BYTES, Answer.SENT),
        (4 * PAGE_BYTES, Answer.ZERO),
    ]


def test_senders_go_on_where_somebody_reads_and_then_where_they_were() -> None:
    pending = Pending([[PageRun(0, 100_000, 4)]], 2)
    first, second = pending.take(0), pending.take(1)
    assert first is not None
    assert second is not None
    assert (first.first, second.first) == (0, 50_000)
    asked = pending.ask(0, 70_030 * PAGE_BYTES)
    assert isinstance(asked, Share)
    assert asked.first <= 70_030 < asked.last < asked.first + 1000
    following = pending.take(0)
    assert following is not None
    assert following.first == asked.last
    other = pending.take(1)
    assert other is not None
    assert other.first == second.last


def test_the_holes_of_late_mappings_are_told_where_they_are_long() -> None:
    page = PAGE_BYTES
    runs = (PageRun(120 * page, 10, 4), PageRun(135 * page, 5, 4), PageRun(300 * page, 100, 4))
    deferred = lazy.Deferred(((100 * page, 200 * page), (300 * page, 400 * page)), runs)
    assert list(deferred.holes(16)) == [(100 * page, 20), (140 * page, 60)]
