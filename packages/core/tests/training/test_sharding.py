"""Sharded training equals data-parallel training, and goes on on any number of processes, sharded or not."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from smalti.core import distributed
from smalti.core.data.loader import Batch
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.testing.processes import run_in_processes
from smalti.core.training.loop import train
from smalti.core.training.options import Optimization, TokenizerTraining
from smalti.core.training.sharding import whole
from smalti.core.training.task import Task
from smalti.core.training.tasks import TokenizerTask

ADVERSARIAL = {
    "losses": [{"name": "l2"}],
    "adversarial": {
        "discriminator": {"name": "patchgan", "width": 16, "layers": 1, "norm": "group"},
        "start": 1,
        "adaptive": True,
        "lecam": {},
        "r1": 0.1,
    },
}


class Images:
    """Images by number; every update takes the next eight of them, over all processes."""

    position = 0

    def __next__(self):
        processes = distributed.world_size()
        generator = torch.Generator().manual_seed(self.position)
        self.position += 1
        images = (torch.rand(8, 1, 8, 8, generator=generator) * 2 - 1)[distributed.rank() :: processes]
        return Batch(images, torch.zeros(len(images), dtype=torch.int64), [""] * len(images))

    def state_dict(self):
        return dict.fromkeys(("epoch", "first", "undecodable"), 0) | {"records": 8 * self.position, "ahead": ()}

    def load_state_dict(self, state):
        self.position = state["records"] // 8


class Rows(Task):
    """Blocks of unequal layers, some of which have fewer rows than there are processes."""

    def __init__(self):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(64, 3), nn.GELU(), nn.Linear(3, 64))
        self.models = {"rows": nn.Sequential(block, nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 1))}

    def objectives(self, models, batch, step):
        yield "rows", {"fit": (models["rows"](batch.images.flatten(1)) - 1).square().mean()}


def trained(rank, task, options, folder):
    """Train up to the options' steps: whole weights, averaged ones, lines; and whether the weights were divided."""
    run = RunFolder(Path(folder))
    run.state.mkdir(parents=True, exist_ok=True)
    context = SimpleNamespace(run=run, recipe=SimpleNamespace(seed=1), device="cpu", reporter=Reporter(quiet=True))
    averaged = train(task, Images(), options, stage="test", context=context)
    divided = sum(hasattr(weight, "full_tensor") for weight in next(iter(task.models.values())).parameters())
    weights = {name: whole(model.state_dict()) for name, model in task.models.items()}
    return weights, averaged, run.metrics("test"), divided


def trained_tokenizer(rank, tokenizer, options, folder):
    return trained(rank, TokenizerTask(tokenizer, options), options, folder)


def trained_rows(rank, options, folder):
    return trained(rank, Rows(), options, folder)


def content(**changes):
    constant = {"schedule": "constant", "log_every": 1, "checkpoint_every": 100, "ema_decay": 0.9}
    return {"steps": 6, "batch_size": 8, "learning_rate": 0.01, **constant, **changes}


def assert_close(found, expected):
    for one, other in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    for line, other in zip(found[2], expected[2], strict=True):
        assert {name: value for name, value in line.items() if isinstance(value, float)} == pytest.approx(
            {name: value for name, value in other.items() if isinstance(value, float)}, rel=1e-3
        )


@pytest.mark.slow
def test_sharded_equals_data_parallel(tokenizer, tmp_path):
    """An adversarial training whose adaptive weight looks at one layer, and whose discriminator is not sharded."""
    results = {}
    for sharding in ("none", "full"):
        options = TokenizerTraining.model_validate(content(**ADVERSARIAL, sharding=sharding, accumulate=1))
        folder = str(tmp_path / sharding)
        results[sharding] = run_in_processes(trained_tokenizer, tokenizer(), options, folder)[0]
    assert results["none"][3] == 0
    assert results["full"][3] > 10
    assert "adversarial" in results["full"][2][-1]
    assert_close(results["full"], results["none"])


@pytest.mark.slow
def test_a_sharded_autoencoder_equals_a_data_parallel_one(autoencoder, tmp_path):
    results = {}
    for sharding in ("none", "full"):
        options = TokenizerTraining.model_validate(content(losses=[{"name": "l2"}], sharding=sharding))
        results[sharding] = run_in_processes(trained_tokenizer, autoencoder(), options, str(tmp_path / sharding))[0]
    assert results["full"][3] > 10
    assert "divergence" in results["full"][2][-1]
    assert_close(results["full"], results["none"])


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.05, None])
def test_two_sharded_then_one_then_two_sharded(tmp_path, clip):
    sharded = content(clip=clip, sharding="full", weight_decay=0.1)
    expected = trained_rows(0, Optimization(**sharded), str(tmp_path / "whole"))
    folder = str(tmp_path / "parts")
    for steps in (2, 4, 6):
        options = Optimization(**{**sharded, "steps": steps})
        found = trained_rows(0, options, folder) if steps == 4 else run_in_processes(trained_rows, options, folder)[0]
        assert bool(found[3]) == (steps != 4)
    assert_close(found, expected)


def test_sharding_with_float16():
    with pytest.raises(ValidationError, match="sharding: full goes with the precisions float32 and bfloat16, not with"):
        Optimization(**content(sharding="full", precision="float16"))
