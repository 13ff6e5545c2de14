import threading
import time
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.data.parallel import ahead, in_order


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(0, 3), st.integers(1, 9))
def test_results_come_in_the_order_of_the_items(items, workers, chunk):
    def slowly(item):
        time.sleep(0.001 * (item % 3))
        return item * item

    assert list(in_order(slowly, range(items), workers, chunk)) == [item * item for item in range(items)]


def test_threads_do_the_work_and_end_with_it():
    names = set(in_order(lambda _: threading.current_thread().name, range(100), 2))
    assert all(name.startswith("smalti-data") for name in names)
    endless = in_order(lambda item: item, count(), 2)
    assert list(islice(endless, 5)) == [0, 1, 2, 3, 4]
    endless.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("smalti-data")]


def test_items_are_taken_only_a_little_ahead():
    taken = []
    results = in_order(lambda item: item, (taken.append(item) or item for item in count()), 2, chunk=3)
    next(results)
    assert len(taken) <= 3 * 6
    results.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_items_comes_after_the_results_before_it(workers):
    def items():
        yield from range(10)
        raise ValueError("no more")

    results = in_order(lambda item: item, items(), workers)
    assert list(islice(results, 10)) == list(range(10))
    with pytest.raises(ValueError, match="no more"):
        next(results)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_function(workers):
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda item: 1 // (5 - item), range(20), workers))


def test_ahead_gives_the_same_items_and_its_error():
    def items():
        yield from range(7)
        raise ValueError("no more")

    found = ahead(items(), 2)
    assert list(islice(found, 7)) == list(range(7))
    with pytest.raises(ValueError, match="no more"):
        next(found)
    assert list(ahead((item for item in range(3)), 2)) == [0, 1, 2]


def test_ahead_makes_a_few_items_and_stops_when_it_is_closed():
    made, closed = [], []

    def items():
        try:
            for item in count():
                made.append(item)
                yield item
        finally:
            closed.append(True)

    found = ahead(items(), 2)
    assert next(found) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(made) == 4  # one given, two waiting, one that found no room
    found.close()
    assert closed == [True]
    assert not [thread for thread in threading.enumerate() if thread.name == "smalti-data-ahead"]
