"""The device of a process, and a device that is not there."""

import pytest

from smalti.core import distributed
from smalti.core.errors import UserError


def test_cuda_is_that_of_the_local_rank(monkeypatch):
    asked, current = [], []
    monkeypatch.setattr(distributed.torch, "empty", lambda _, device: asked.append(str(device)))
    monkeypatch.setattr(distributed.torch.cuda, "set_device", lambda device: current.append(str(device)))
    monkeypatch.setattr(distributed.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [distributed.chosen_device(name) for name in ("cuda", "auto", "cuda:1", "cpu")] == asked
    assert asked == ["cuda:3", "cuda:3", "cuda:1", "cpu"]
    assert current == asked[:3]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("gpu", r"there is no device 'gpu': give cpu, cuda or auto"),
        ("cpu:x", r"there is no device 'cpu:x': give cpu, cuda or auto"),
        ("", r"there is no device '': give cpu, cuda or auto"),
        ("cuda:99", r"device 'cuda:99' cannot be used \(.*\): give cpu, cuda or auto"),
    ],
)
def test_a_device_that_is_not_there(name, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        distributed.chosen_device(name)


def test_processes_are_left_again(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    began = []
    monkeypatch.setattr(distributed.dist, "init_process_group", began.append)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: bool(began))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", began.clear)

    def work():
        with distributed.joined("cpu") as device:
            assert (device, began) == ("cpu", ["gloo"])
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert began == []
