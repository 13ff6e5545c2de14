import json
import re
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.data.augmentation import Augmentation, RandomResizedCrop
from smalti.core.data.decode import decode, decode_ten_crops
from smalti.core.data.loader import TrainBatches, read_images
from smalti.core.data.views import Views
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing

PIXELS = Preprocessing(image_size=4, channels=1, fit="pad")


def refuse(sentence):
    pytest.fail(sentence)


def batches(dataset, batch_size=3, seed=0, rank=0, world_size=1, max_undecodable=0, warn=refuse):
    return TrainBatches(dataset, PIXELS, batch_size, seed, rank, world_size, max_undecodable, warn)


def keys(loader, count):
    return [key for batch in islice(loader, count) for key in batch.keys]


def test_batches_hold_images_labels_and_keys(memory_dataset):
    dataset = memory_dataset(256)
    batch = next(batches(dataset, batch_size=256))
    assert (batch.images.shape, batch.images.dtype) == ((256, 1, 4, 4), torch.float32)
    numbers = torch.tensor([int(key[1:]) for key in batch.keys])
    assert torch.equal(batch.images[:, 0, 0, 0], numbers.to(torch.float32) / 127.5 - 1)
    assert (batch.images.min(), batch.images.max()) == (-1, 1)
    assert batch.labels.dtype == torch.int64
    assert torch.equal(batch.labels, numbers % 2)


def test_epochs_are_different_permutations_and_the_seed_fixes_them(memory_dataset):
    dataset = memory_dataset(12)
    seen = keys(batches(dataset, 4), 9)
    epochs = [seen[:12], seen[12:24], seen[24:]]
    assert all(sorted(epoch) == sorted(f"k{i}" for i in range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert keys(batches(dataset, 4), 9) == seen
    assert keys(batches(dataset, 4, seed=1), 9) != seen


def test_batches_run_across_the_borders_of_epochs(memory_dataset):
    seen = keys(batches(memory_dataset(5), 3), 5)
    assert all(sorted(seen[start : start + 5]) == [f"k{i}" for i in range(5)] for start in (0, 5, 10))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 23), st.integers(1, 5), st.integers(0, 3))
def test_strides_of_all_processes_cover_every_record_once(memory_dataset, count, world_size, epoch):
    if count < world_size:
        count = world_size
    dataset = memory_dataset(count)
    shares = []
    for rank in range(world_size):
        loader = batches(dataset, 1, rank=rank, world_size=world_size)
        loader.load_state_dict({"epoch": epoch, "records": 0, "undecodable": 0})
        shares.append(keys(loader, len(range(rank, count, world_size))))
    seen = [key for share in shares for key in share]
    assert sorted(seen) == sorted(f"k{i}" for i in range(count))
    alone = batches(dataset, 1)
    alone.load_state_dict({"epoch": epoch, "records": 0, "undecodable": 0})
    order = keys(alone, count)
    assert shares == [order[rank::world_size] for rank in range(world_size)]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_state_from_anywhere_goes_on_exactly(memory_dataset, data):
    count = data.draw(st.integers(3, 20), "records")
    broken = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 3), "broken")
    world_size = data.draw(st.integers(1, 2), "world size") if not broken else 1
    arguments = {
        "batch_size": data.draw(st.integers(1, 7), "batch size"),
        "seed": data.draw(st.integers(0, 5), "seed"),
        "rank": data.draw(st.integers(0, world_size - 1), "rank"),
        "world_size": world_size,
        "max_undecodable": count,
        "warn": str,
    }
    dataset = memory_dataset(count, dict.fromkeys(broken, b"broken"))
    first = batches(dataset, **arguments)
    for _ in islice(first, data.draw(st.integers(0, 12), "batches before")):
        continue
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == {**state, "ahead": list(state["ahead"])}
    second = batches(dataset, **arguments)
    second.load_state_dict(state)
    for expected, found in islice(zip(first, second, strict=False), 8):
        assert expected.keys == found.keys
        assert torch.equal(expected.images, found.images)
        assert torch.equal(expected.labels, found.labels)
        assert first.state_dict() == second.state_dict()


def test_resuming_and_the_share_of_others_cost_no_decoding(memory_dataset, monkeypatch):
    from smalti.core.data import loader as module

    decoded = []
    genuine = module.decode
    monkeypatch.setattr(module, "decode", lambda image, **how: decoded.append(image) or genuine(image, **how))
    dataset = memory_dataset(100)
    loader = batches(dataset, 5, rank=1, world_size=2)
    loader.load_state_dict({"epoch": 0, "records": 60, "undecodable": 0})
    next(loader)
    assert len(decoded) == 5


def test_undecodable_images_are_left_out_and_told_once(memory_dataset):
    told = []
    dataset = memory_dataset(6, {2: b"broken", 4: b""})
    loader = batches(dataset, 4, max_undecodable=2, warn=told.append)
    seen = keys(loader, 3)
    assert sorted(seen) == sorted(["k0", "k1", "k3", "k5"] * 3)
    assert len(told) == 2
    assert {sentence.partition(":")[0] for sentence in told} == {
        "image 'k2' of memory cannot be decoded and is left out",
        "image 'k4' of memory cannot be decoded and is left out",
    }


def test_too_many_undecodable_images_stop_the_run(memory_dataset):
    told = []
    dataset = memory_dataset(9, dict.fromkeys(range(1, 9), b"broken"))
    sentence = r"4 images of memory cannot be decoded and 3 may be left out, the last one is 'k\d' \(.*\): mend it or raise data\.max_undecodable"  # noqa: E501
    with pytest.raises(UserError, match=sentence):
        keys(batches(dataset, 4, max_undecodable=3, warn=told.append), 1)
    assert len(told) == 3
    with pytest.raises(UserError, match="1 images of memory cannot be decoded and 0 may be left out"):
        keys(batches(dataset, 4), 1)


def test_the_count_of_undecodable_images_survives_a_restart(memory_dataset):
    dataset = memory_dataset(40, dict.fromkeys(range(20), b"broken"))
    first = batches(dataset, 8, max_undecodable=19, warn=str)
    next(first)
    state = first.state_dict()
    assert 0 < state["undecodable"] < 20
    second = batches(dataset, 8, max_undecodable=19, warn=str)
    second.load_state_dict(state)
    with pytest.raises(UserError, match="20 images of memory cannot be decoded and 19 may be left out"):
        keys(second, 3)


@pytest.mark.parametrize(
    ("count", "broken", "rank", "sentence"),
    [
        (0, 0, 0, "for process 0 of 2: it holds 0 records, 0 of them undecodable here"),
        (4, 4, 1, "for process 1 of 2: it holds 4 records, 2 of them undecodable here"),
    ],
)
def test_no_image_at_all_is_an_error_and_no_endless_loop(memory_dataset, count, broken, rank, sentence):
    dataset = memory_dataset(count, dict.fromkeys(range(broken), b"broken"))
    loader = batches(dataset, 1, rank=rank, world_size=2, max_undecodable=9, warn=str)
    with pytest.raises(UserError, match=f"memory has no image to train on {sentence}"):
        next(loader)


def test_an_image_that_does_not_fit_names_its_key(memory_dataset, make_png):
    dataset = memory_dataset(2, {1: make_png(np.zeros((5, 5), np.uint8))})
    with pytest.raises(UserError, match=re.escape("image 'k1' of memory: an image of 5x5 pixels does not fit")):
        keys(batches(dataset, 2, max_undecodable=5), 1)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 14), st.none() | st.integers(0, 14))
def test_reading_in_stored_order_from_start_to_stop(memory_dataset, count, batch_size, start, stop):
    dataset = memory_dataset(count)
    found = list(read_images(dataset, PIXELS, batch_size, start, stop, max_undecodable=0, warn=refuse))
    expected = list(range(count))[start:stop]
    assert [index for batch in found for index in batch.indices.tolist()] == expected
    assert [key for batch in found for key in batch.keys] == [f"k{index}" for index in expected]
    assert all(len(batch.labels) == batch_size for batch in found[:-1])
    assert all(batch.indices.dtype == batch.labels.dtype == torch.int64 for batch in found)


def test_reading_leaves_undecodable_images_out_and_keeps_the_numbers(memory_dataset):
    told = []
    dataset = memory_dataset(6, {1: b"broken", 4: b"broken"})
    found = list(read_images(dataset, PIXELS, 3, max_undecodable=2, warn=told.append))
    assert [batch.indices.tolist() for batch in found] == [[0, 2, 3], [5]]
    assert len(told) == 2
    with pytest.raises(UserError, match="2 images of memory cannot be decoded and 1 may be left out"):
        list(read_images(dataset, PIXELS, 3, max_undecodable=1, warn=str))
    # What lies outside of start and stop is not looked at.
    found = list(read_images(dataset, PIXELS, 3, 2, 4, max_undecodable=0, warn=refuse))
    assert [batch.indices.tolist() for batch in found] == [[2, 3]]


def test_workers_change_nothing(memory_dataset):
    broken = dict.fromkeys((3, 11), b"broken")
    dataset = memory_dataset(50, broken)
    loaders = [
        TrainBatches(dataset, PIXELS, 7, 0, 0, 1, 2, str, augment=Augmentation(flip=True), workers=workers)
        for workers in (0, 1, 3)
    ]
    for _ in range(20):
        expected, *others = (next(loader) for loader in loaders)
        state, *states = (loader.state_dict() for loader in loaders)
        for batch in others:
            assert batch.keys == expected.keys
            assert torch.equal(batch.images, expected.images)
        assert all(other == state for other in states)
    fresh = TrainBatches(dataset, PIXELS, 7, 0, 0, 1, 2, str, augment=Augmentation(flip=True), workers=2)
    fresh.load_state_dict(state)
    assert torch.equal(next(fresh).images, next(loaders[0]).images)


def test_with_workers_errors_and_warnings_come_through(memory_dataset):
    told = []
    dataset = memory_dataset(9, dict.fromkeys(range(1, 9), b"broken"))
    loader = TrainBatches(dataset, PIXELS, 4, 0, 0, 1, 3, told.append, workers=2)
    with pytest.raises(UserError, match="4 images of memory cannot be decoded and 3 may be left out"):
        next(loader)
    assert len(told) == 3


def test_augmentation_belongs_to_the_image_and_the_epoch_and_not_to_the_process(memory_dataset, make_png):
    random = np.random.default_rng(0)
    images = {index: make_png(random.integers(0, 256, (9, 12, 3), np.uint8)) for index in range(12)}
    dataset = memory_dataset(12, images)
    augment = Augmentation(crop=RandomResizedCrop(), flip=True)

    def images_of(world):
        share = [
            TrainBatches(dataset, Preprocessing(image_size=4), 3, 5, rank, world, 0, refuse, augment=augment)
            for rank in range(world)
        ]
        found = {}
        for loader in share:
            for number, batch in enumerate(islice(loader, 24 // 3 // world)):
                for key, image in zip(batch.keys, batch.images, strict=True):
                    found[key, number * world // 4] = image
        return found

    alone, shared = images_of(1), images_of(2)
    assert alone.keys() == shared.keys()
    assert len(alone) == 24
    assert all(torch.equal(image, shared[place]) for place, image in alone.items())
    assert not any(torch.equal(alone[f"k{index}", 0], alone[f"k{index}", 1]) for index in range(12))


def test_views_of_every_image(memory_dataset, make_png):
    image = make_png(np.random.default_rng(0).integers(0, 256, (9, 9), np.uint8))
    dataset = memory_dataset(3, {1: image})
    how = Preprocessing(image_size=8, channels=1)

    def pixels(views):
        (batch,) = read_images(dataset, how, 4, views=views, max_undecodable=0, warn=refuse)
        assert batch.images.shape == (3, len(views.names), 1, 8, 8)
        return batch.images[1]

    near, far = (decode_ten_crops(image, how, crop_range=crops) for crops in (1.1, 1.5))
    assert torch.equal(pixels(Views(ten_crops=(1.1, 1.5))), torch.from_numpy(np.concatenate([near, far])) / 127.5 - 1)
    (whole,) = pixels(Views())
    assert torch.equal(whole, torch.from_numpy(decode(image, how)) / 127.5 - 1)
    assert torch.equal(pixels(Views(flip=True)), torch.stack([whole, whole.flip(-1)]))


def test_reading_with_workers_is_the_same(memory_dataset):
    dataset = memory_dataset(30, {4: b"broken"})
    one, two = (
        list(read_images(dataset, PIXELS, 7, max_undecodable=1, warn=str, workers=workers)) for workers in (0, 2)
    )
    assert [batch.indices.tolist() for batch in one] == [batch.indices.tolist() for batch in two]
    assert all(torch.equal(left.images, right.images) for left, right in zip(one, two, strict=True))


def test_every_byte_becomes_the_float_that_torch_computes(memory_dataset, make_png):
    dataset = memory_dataset(1, {0: make_png(np.arange(256, dtype=np.uint8).reshape(16, 16))})
    batch = next(batches_of(dataset, 16))
    assert torch.equal(batch.images.flatten(), torch.arange(256, dtype=torch.uint8).to(torch.float32) / 127.5 - 1)


def batches_of(dataset, size):
    return TrainBatches(dataset, Preprocessing(image_size=size, channels=1), 1, 0, 0, 1, 0, refuse)


def test_a_process_without_a_record_in_an_epoch_waits_for_the_next(memory_dataset):
    dataset = memory_dataset(1)
    loader = batches(dataset, 1, rank=1, world_size=2)
    assert keys(loader, 3) == ["k0"] * 3
    assert loader.state_dict()["epoch"] == 5


def test_threads_end_with_the_loader(memory_dataset):
    def names():
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("smalti-data")]

    loader = TrainBatches(memory_dataset(20), PIXELS, 3, 0, 0, 1, 0, refuse, workers=2)
    next(loader)
    assert names()
    del loader
    assert not names()
