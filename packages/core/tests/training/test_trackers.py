import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate import PartialState

from smalti.core.errors import UserError
from smalti.core.run_folder import RunFolder
from smalti.core.training import trackers
from smalti.core.training.trackers import Trackers

LINE = {
    "stage": "test",
    "step": 3,
    "fit": 0.5,
    "codebook_health": {"usage": [0.25, 1.0]},
    "validation": {"ema": {"psnr": 20.0}},
}
FLAT = {"fit": 0.5, "codebook_health/usage/0": 0.25, "codebook_health/usage/1": 1.0, "validation/ema/psnr": 20.0}
PICTURE = np.zeros((4, 6, 3), np.uint8)


@pytest.mark.parametrize(("name", "extra"), [("tensorboard", "train"), ("wandb", "wandb"), ("trackio", "trackio")])
def test_what_is_not_installed(tmp_path, monkeypatch, name, extra):
    monkeypatch.setattr(trackers, "find_spec", lambda _name: None)
    sentence = rf"^the tracker {name} needs the extra smalti-core\[{extra}\], which is not installed$"
    with pytest.raises(UserError, match=sentence):
        Trackers([name], RunFolder(tmp_path), "test", 0, {})


@pytest.fixture(autouse=True)
def accelerate():
    """As the loop sets it up before it makes trackers."""
    PartialState(cpu=True)


@pytest.fixture
def service(monkeypatch):
    """A module that takes down what it is called with, in the place of wandb and trackio."""

    def service(name):
        calls = []
        run = SimpleNamespace(
            log=lambda values, step: calls.append(("log", values, step)), finish=lambda: calls.append(("finish",))
        )
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.config = SimpleNamespace(update=lambda values, **_: calls.append(("config", values)))
        run.config = module.config
        module.Image = lambda image, **_: ("image", image.shape)

        def init(project, **settings):
            calls.append(("init", project, settings))
            return run

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return service


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_numbers_settings_and_the_same_run_again(tmp_path, service, name):
    calls = service(name)
    for step in (0, 3):
        told = Trackers([name], RunFolder(tmp_path / "cats"), "test", step, {"steps": 9})
        told.log(LINE)
        told.show("reconstructions", PICTURE, 3)
        told.finish()
    (first, second) = (call for call in calls if call[0] == "init")
    assert first == second
    assert first[1] == "cats"
    assert first[2]["resume"] == "allow"
    assert ("config", {"steps": 9}) in calls
    assert ("log", FLAT, 3) in calls
    assert calls[-1] == ("finish",)
    assert (("log", {"reconstructions": [("image", (4, 6, 3))]}, 3) in calls) == (name == "wandb")


def test_tensorboard_forgets_what_will_be_told_again(tmp_path):
    run = RunFolder(tmp_path)
    for start, values in ((0, (1.0, 2.0, 3.0)), (2, (30.0,))):
        told = Trackers(["tensorboard"], run, "test", start, {})
        for step, value in enumerate(values, start + 1):
            told.log({**LINE, "step": step, "fit": value})
            told.show("reconstructions", PICTURE, step)
        told.finish()
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = module.EventAccumulator(str(run / "tensorboard" / "test"))
    found.Reload()
    assert {event.step: event.value for event in found.Scalars("fit")} == {1: 1.0, 2: 2.0, 3: 30.0}
    assert len(found.Scalars("fit")) == 3
    assert [(image.step, image.width, image.height) for image in found.Images("reconstructions")] == [
        (step, 6, 4) for step in (1, 2, 3)
    ]
