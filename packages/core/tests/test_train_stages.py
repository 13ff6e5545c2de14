"""Options of training that reach beyond the loop: validation, a start, compiled and checkpointed models, trackers."""

import json
from pathlib import Path

import pytest
import torch

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.stages.train_tokenizer import TrainTokenizer
from smalti.core.training import loop, trackers
from smalti.core.weights import read_tensors


@pytest.fixture
def trained(content, tmp_path):
    """The folder of a run of the tests' recipe with other options of tokenizer training."""

    def trained(name, **changes):
        content["train"]["tokenizer"] |= {"steps": 4, **changes}
        recipe = Recipe.model_validate({**content, "evaluate": None})
        run = RunFolder(tmp_path / name)
        run.state.mkdir(parents=True, exist_ok=True)
        TrainTokenizer(Context(run, recipe, "cpu", Reporter(quiet=True))).run()
        return run

    return trained


VALIDATION = {"every": 2, "images": 5, "pictures": 2, "best": {"metric": "difference", "prefer": "lower"}}


def test_validation_changes_nothing_and_goes_on(trained, monkeypatch):
    plain = trained("plain")
    whole = trained("whole", validation=VALIDATION)
    assert (whole / "tokenizer" / "model.safetensors").read_bytes() == (
        plain / "tokenizer" / "model.safetensors"
    ).read_bytes()
    lines = whole.metrics("train-tokenizer")
    assert [line["step"] for line in lines if "validation" in line] == [2, 4]
    found = {line["step"]: line["validation"]["ema"]["difference"] for line in lines}
    best = json.loads((whole / "tokenizer-best" / "best.json").read_text())
    assert best == {"step": min(found, key=found.get), "weights": "ema", "difference": min(found.values())}
    assert [path.name for path in sorted((whole / "images").iterdir())] == [
        "train-tokenizer-00000002.png",
        "train-tokenizer-00000004.png",
    ]
    update = loop._Loop._update

    def dying(self):
        if self.step == 3:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "_update", dying)
        with pytest.raises(KeyboardInterrupt):
            trained("parts", validation=VALIDATION)
    parts = trained("parts", validation=VALIDATION)
    assert parts.metrics("train-tokenizer") == lines
    for name in ("tokenizer", "tokenizer-best", "images"):
        for file in (whole / name).iterdir():
            assert (parts / name / file.name).read_bytes() == file.read_bytes()


def test_fine_tuning_begins_with_averaged_weights(trained, monkeypatch):
    first = trained("first")
    begun = []
    run = loop._Loop.run

    def watched(self):
        begun.append({name: tensor.clone() for name, tensor in self.main.state_dict().items()})
        assert all(torch.equal(tensor, self.ema.weights[name]) for name, tensor in begun[-1].items())
        return run(self)

    monkeypatch.setattr(loop._Loop, "run", watched)
    trained("second", start=str(first.path))
    expected = Tokenizer.from_pretrained(first / "tokenizer").state_dict()
    assert all(torch.equal(tensor, begun[0][name]) for name, tensor in expected.items())
    # Once there is a state, what it began with is no longer asked for.
    (first / "tokenizer" / "config.json").unlink()
    trained("second", start=str(first.path))


def test_activation_checkpointing_changes_no_bit(trained):
    plain, spared = trained("plain"), trained("spared", checkpoint_activations=True)
    for name in ("model.safetensors", "ema.safetensors"):
        assert (spared / "tokenizer" / name).read_bytes() == (plain / "tokenizer" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_compiled_models_learn_the_same(trained):
    plain, compiled = (
        read_tensors(trained(name, compile=name == "compiled") / "tokenizer" / "model.safetensors")
        for name in ("plain", "compiled")
    )
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, atol=2e-3, rtol=0)


def test_a_tracker_that_is_not_installed_is_told_before_any_step(trained, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"^the tracker wandb needs the extra smalti-core\[wandb\], which is not"):
        trained("told", trackers=["wandb"])
    assert not Path("wandb").exists()
