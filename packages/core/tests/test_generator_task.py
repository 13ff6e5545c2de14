"""What a generator is told before it learns."""

import torch

from smalti.core.layout import TokenLayout
from smalti.core.plugins import registry
from smalti.core.training.tasks import GeneratorTask


def test_the_generator_is_told_the_step_before_its_loss():
    generator = registry().options("generator", "table")().build(TokenLayout.sequence(3, (4,)), 2)
    told = []
    generator.begin_step = told.append
    task = GeneratorTask(generator)
    batch = torch.zeros(2, 3, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    for step in (5, 6):
        (objective,) = task.objectives({"generator": generator}, batch, step)
        assert told[-1] == step
        assert objective[1].keys() == {"cross_entropy"}


def test_most_generators_take_nothing_of_a_tokenizer():
    generator = registry().options("generator", "table")().build(TokenLayout.sequence(3, (4,)), 2)
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator.attach(torch.nn.Identity())
    generator.begin_step(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in generator.state_dict().items())
