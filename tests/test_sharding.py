"""Stages whose model is divided over two processes end with the files of those where each process holds all of it."""

import shutil

import pytest
import torch

from smalti.core import distributed
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.stages.train_generator import TrainGenerator
from smalti.core.stages.train_tokenizer import TrainTokenizer
from smalti.core.testing.processes import run_in_processes
from smalti.core.weights import read_tensors

pytestmark = pytest.mark.slow
STAGES = {"tokenizer": TrainTokenizer, "generator": TrainGenerator}


def train(rank, folder, kind, changes):
    recipe = load_recipe(folder, [f"train.{kind}.{option}" for option in changes])
    STAGES[kind](Context(RunFolder(folder), recipe, "cpu", Reporter(quiet=True))).run()
    distributed.barrier()


@pytest.mark.parametrize("kind", ["tokenizer", "generator"])
def test_sharded_stages(finished, tmp_path, kind):
    """Transformer blocks; and a tokenizer with its codebook, validated while it trains."""
    changes = ["steps=6", "checkpoint_every=6", "log_every=2"]
    if kind == "tokenizer":
        changes.append("validation={every: 4, images: 24, batch_size: 8, pictures: 4}")
    found = {}
    for sharding in ("none", "full"):
        folder = tmp_path / sharding
        shutil.copytree(finished, folder)
        RunFolder(folder).remove((kind, f"state/train-{kind}.pt"))
        run_in_processes(train, str(folder), kind, [*changes, f"sharding={sharding}"])
        weights = read_tensors(folder / kind / "model.safetensors")
        weights |= {f"ema.{name}": tensor for name, tensor in read_tensors(folder / kind / "ema.safetensors").items()}
        (line,) = (line for line in RunFolder(folder).metrics(f"train-{kind}") if line["step"] == 4)
        # Biases before a normalisation have no gradient but rounding errors, and Adam makes much of them.
        found[sharding] = {name: tensor for name, tensor in weights.items() if tensor.ndim > 1}
        found[sharding]["validation"] = torch.tensor(list(line.get("validation", {}).get("ema", {}).values()))
    assert len(found["full"]["validation"]) == (2 if kind == "tokenizer" else 0)
    torch.testing.assert_close(found["full"], found["none"], rtol=1e-3, atol=5e-4)
