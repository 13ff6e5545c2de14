import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.data.loader import TrainBatches
from smalti.core.data.position import Position, merged
from smalti.core.data.token_batches import TokenBatches
from smalti.core.data.token_shards import TokenSet
from smalti.core.layout import TokenLayout
from smalti.core.options import Preprocessing

PIXELS = Preprocessing(image_size=4, channels=1, fit="pad")


def loaders(dataset, batch, world, workers=0):
    return [
        TrainBatches(dataset, PIXELS, batch, 1, rank, world, len(dataset), str, workers=workers)
        for rank in range(world)
    ]


def taken(processes, batches):
    """The keys of each step, sorted, for a step of several processes has no order."""
    rounds = [[next(process).keys for process in processes] for _ in range(batches)]
    return [sorted(key for keys in step for key in keys) for step in rounds]


def number(loader):
    state = loader.state_dict()
    return state["first"] + state["records"]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_run_goes_on_with_another_number_of_processes(memory_dataset, data):
    count = data.draw(st.integers(3, 23), "records")
    dataset = memory_dataset(count)
    legs = data.draw(
        st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=2, max_size=4), "processes, batches"
    )
    batch = data.draw(st.integers(1, 5), "batch size")
    found, state = [], Position()._asdict()
    for processes, batches in legs:
        running = loaders(dataset, batch, processes)
        for process in running:
            process.load_state_dict(state)
        found += taken(running, batches)
        state = merged([process.state_dict() for process in running])
        assert state["ahead"] == ()
    (alone,) = loaders(dataset, 1, 1)
    assert found == [sorted(key for (key,) in taken([alone], len(step))) for step in found]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_damaged_images_neither_repeat_nor_lose_others(memory_dataset, data):
    count = data.draw(st.integers(12, 40), "records")
    broken = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 8), "broken")
    dataset = memory_dataset(count, dict.fromkeys(broken, b"broken"))
    legs = data.draw(
        st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3)), min_size=2, max_size=4), "processes, batches"
    )
    found, state = [], Position()._asdict()
    for processes, batches in legs:
        running = loaders(dataset, 1, processes)
        for process in running:
            process.load_state_dict(state)
        found += taken(running, batches)
        state = merged([process.state_dict() for process in running])
    (last,) = loaders(dataset, 1, 1)
    last.load_state_dict(state)
    found += taken([last], 1)
    while last.state_dict()["ahead"]:
        found += taken([last], 1)
    (alone,) = loaders(dataset, 1, 1)
    expected = []
    while number(alone) < number(last):
        expected += next(alone).keys
    assert sorted(key for step in found for key in step) == sorted(expected)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_same_number_of_processes_goes_on_as_with_its_own_states(memory_dataset, processes):
    dataset = memory_dataset(11)
    running = loaders(dataset, 2, processes)
    taken(running, 3)
    states = [process.state_dict() for process in running]
    common = merged(states)
    for rank, process in enumerate(loaders(dataset, 2, processes)):
        process.load_state_dict(common)
        own = loaders(dataset, 2, processes)[rank]
        own.load_state_dict(states[rank])
        for _ in range(8):
            assert next(process).keys == next(own).keys


def test_numbers_of_records_consumed_ahead():
    # Of three processes, one left out a record (it is further), one is behind.
    states = [Position(0, 4, 0), Position(0, 8, 0), Position(0, 6, 0)]
    found = Position(**merged([state._asdict() for state in states]))
    # next are 6, 10 and 8: records 7 (of process 1) is behind 10, and so consumed
    assert found == Position(0, 6, 0, 0, (7,))


def test_tokens_go_on_with_another_number_of_processes(tmp_path):
    count = 7
    tokens = np.arange(2 * count).reshape(count, 2, 1, 1)
    layout = TokenLayout.grid(1, 1, (2 * count,))
    labels = np.arange(count, dtype=np.int64)
    token_set = TokenSet(tmp_path, tokens, labels, layout, tuple(map(str, labels)), "", ("original", "flip"))

    def leg(processes, batches, state):
        running = [TokenBatches(token_set, 1, 0, rank, processes) for rank in range(processes)]
        for process in running:
            process.load_state_dict(state)
        found = [[int(next(process).tokens) for process in running] for _ in range(batches)]
        return found, merged([process.state_dict() for process in running])

    alone, _ = leg(1, 22, Position()._asdict())
    first, state = leg(3, 3, Position()._asdict())
    second, state = leg(2, 4, state)
    third, _ = leg(1, 5, state)
    steps = [sorted(step) for step in (*first, *second, *third)]
    sizes = [3] * 3 + [2] * 4 + [1] * 5
    order = [token for (token,) in alone]
    expected = [sorted(order[sum(sizes[:number]) : sum(sizes[: number + 1])]) for number in range(len(sizes))]
    assert steps == expected
