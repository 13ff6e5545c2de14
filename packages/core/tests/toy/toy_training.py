"""What the tests of training run in two processes."""

from pathlib import Path
from types import SimpleNamespace

import torch

from smalti.core import distributed
from smalti.core.data.loader import Batch
from smalti.core.losses.contrastive import contrastive, gathered
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.training.adversarial import LeCamRegularization
from smalti.core.training.loop import train
from smalti.core.training.options import LeCam
from smalti.core.training.tasks import TokenizerTask


class Images:
    """Batches of random images that count."""

    position = 0

    def __next__(self):
        self.position += 1
        generator = torch.Generator().manual_seed(self.position)
        images = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
        return Batch(*(images if name == "images" else torch.zeros(4, dtype=torch.int64) for name in Batch._fields))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def weights(task):
    return {
        f"{name}.{key}": tensor for name, model in task.models.items() for key, tensor in model.state_dict().items()
    }


def replica(rank, tokenizer, options, folder):
    """A whole training in one of two processes."""
    run_folder = RunFolder(Path(folder))
    run_folder.state.mkdir(parents=True, exist_ok=True)
    context = SimpleNamespace(
        run=run_folder, recipe=SimpleNamespace(seed=1), device="cpu", reporter=Reporter(quiet=True)
    )
    batches = Images()
    batches.position = 100 * rank
    task = TokenizerTask(tokenizer, options)
    train(task, batches, options, stage="test", context=context)
    return weights(task), task.adversary.lecam.averages


def lecam_of(rank):
    lecam = LeCamRegularization(LeCam(decay=0.5))
    lecam(torch.full((2,), 1.0 + 2 * rank), torch.full((2,), -4.0 * rank))
    return lecam.averages


def pairs():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 6, generator=generator)


def shared_loss(rank):
    first, second = (part[2 * rank : 2 * rank + 2].clone().requires_grad_() for part in pairs())
    loss = contrastive(gathered(first), gathered(second), 2.0)
    loss.backward()
    # Data-parallel training averages the gradients of the processes.
    return loss.detach(), first.grad / distributed.world_size(), second.grad / distributed.world_size()
