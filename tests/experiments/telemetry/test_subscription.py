"""A viewer's queue: bounded, in order, and never silent about what it threw away."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from experiments.live.reader import QUEUE_BYTES, Heard, Subscription


@given(st.lists(st.sampled_from(["push", "big", "missed", "pop", "fill"]), max_size=60))
def test_whatever_happens_somebody_wakes_for_it(acts: list[str]) -> None:
    """The event is set whenever there is something to do; what is popped comes in order and is only ever missing where a gap was told."""
    queue, number, expected = Subscription(), 0, 1
    for act in acts:
        if act in ("push", "big"):
            number += 1
            queue.push(Heard("steps", bytes(QUEUE_BYTES // 2 + 1 if act == "big" else 10), number, number))
        elif act == "missed":
            queue.missed()
        elif act == "fill" and queue.gap:
            queue.gap = False
            expected = number + 1
        elif act == "pop" and (heard := queue.pop()) is not None:
            assert heard.first == expected
            expected += 1
        assert queue._size <= QUEUE_BYTES + 1
        if queue.gap or queue._items:
            assert queue.news.is_set()


def test_one_message_may_be_larger_than_the_queue() -> None:
    queue = Subscription()
    queue.push(Heard("steps", bytes(3 * QUEUE_BYTES), 1, 1))
    assert not queue.gap
    assert queue.pop() is not None
