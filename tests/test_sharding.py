"""Stages whose model is divided over two processes end with the files of those where each process holds all of it."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

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
    """Transformer blocks; and a tokenizer with its codebook; both validated while they train."""
    validation = "validation={every: 4, images: 24, batch_size: 8, pictures: 4}"
    changes, found, drawn = ["steps=6", "checkpoint_every=6", "log_every=2", validation], {}, []
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
        for weights, figures in line["validation"].items():
            found[sharding] |= {f"{weights} {name}": torch.tensor(figure) for name, figure in figures.items()}
        if kind == "generator":
            drawn.append(np.asarray(Image.open(folder / "drawn" / "00000004.png")))
    assert ({"ema psnr", "ema ssim"} if kind == "tokenizer" else {"ema cross_entropy"}) <= found["full"].keys()
    if kind == "generator":  # all but tokens whose noise lies within rounding of a border
        assert drawn[0].std() > 0
        assert (drawn[0] == drawn[1]).mean() > 0.9
    torch.testing.assert_close(found["full"], found["none"], rtol=1e-3, atol=5e-4)
