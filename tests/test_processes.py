"""One process or two: the same tokens and samples, and replicas that never part."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stages.train_tokenizer import TrainTokenizer
from smalti.core.testing.processes import run_in_processes
from smalti.core.training import loop
from smalti.core.weights import read_tensors

pytestmark = pytest.mark.slow


def copy_without(finished, target, *stages):
    """A copy of the run in which some stages have not run yet."""
    shutil.copytree(finished, target)
    run = RunFolder(target)
    outputs = {"tokenize": ("tokens",), "sample": ("samples",), "evaluate": ("evaluation", "summary.json")}
    for stage in stages:
        run.remove(outputs[stage])
        run.record(stage, done=False)
    return run


@pytest.mark.parametrize("stage", ["tokenize", "sample"])
def test_two_processes_make_the_same_files_as_one(finished, smalti, files, stage):
    run = copy_without(finished, smalti.folder / "run", stage, "evaluate")
    smalti.two(stage, "run")
    folder = {"tokenize": "tokens", "sample": "samples"}[stage]
    expected = {name: content for name, content in files(finished).items() if name.startswith(folder)}
    found = {name: content for name, content in files(run.path).items() if name.startswith(folder)}
    assert found.keys() == expected.keys()
    assert found == expected


def test_two_processes_run_the_whole_pipeline(smalti, shrunk):
    smalti.two("run", "quickstart", *shrunk, "--out", "run")
    run = smalti.folder / "run"
    assert all(stage["done"] for stage in RunFolder(run).stages().values())
    assert (run / "report.html").exists()


def replica(rank, folder, overrides):
    """Train the quickstart's tokenizer as one of two; what this process holds at the end."""
    kept = {}
    finish = loop._Loop.run

    def spying(self):
        averaged = finish(self)
        kept.update({name: tensor.detach().clone() for name, tensor in self.main.state_dict().items()})
        return averaged

    loop._Loop.run = spying
    recipe = load_recipe("quickstart", overrides)
    context = SimpleNamespace(run=RunFolder(folder), recipe=recipe, device="cpu", reporter=Reporter(quiet=True))
    if rank == 0:
        context.run.prepare(recipe)
    torch.distributed.barrier()
    TrainTokenizer(context).run()
    return kept


def test_tokenizer_replicas_end_with_equal_weights(tmp_path, shrunk):
    overrides = [*shrunk, "train.tokenizer.steps=25", "train.tokenizer.adversarial.discriminator.name=patchgan"]
    overrides += [
        "train.tokenizer.adversarial.discriminator.width=8",
        "train.tokenizer.adversarial.discriminator.layers=1",
    ]
    first, second = run_in_processes(replica, tmp_path / "run", overrides)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    saved = read_tensors(tmp_path / "run" / "tokenizer" / "model.safetensors")
    assert all(torch.equal(saved[name], first[name]) for name in saved)


def test_going_on_with_another_number_of_processes_is_refused(finished, smalti, shrunk):
    run = copy_without(finished, smalti.folder / "run", "sample", "evaluate")
    run.record("train-generator", done=False)
    _, stderr = smalti.two("train", "generator", "run", code=1)
    assert "was written by 1 processes, this is 2: go on with as many" in stderr
