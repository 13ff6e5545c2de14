import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from smalti.core.training.ema import EMA, ema_decay
from smalti.core.training.optimizer import build_optimizer, set_rates
from smalti.core.training.options import Optimization, Ramp
from smalti.core.training.schedule import multiplier, weight_decay


def options(**changes):
    return Optimization.model_validate({"steps": 101, "batch_size": 4, "learning_rate": 0.1, **changes})


def at(optimization, *steps):
    return [multiplier(optimization, step) for step in steps]


def test_warm_up_from_a_ratio_and_under_the_schedule():
    assert at(options(warmup_steps=10, warmup_from=0.0, schedule="constant"), 0, 5, 10, 99) == [0, 0.5, 1, 1]
    assert at(options(warmup_steps=10, warmup_from=0.2), 0, 5, 10) == pytest.approx([0.2, 0.6, 1.0])
    hidden = options(warmup_steps=10, warmup_from=0.0, schedule_under_warmup=True)
    assert at(hidden, 5, 10, 50, 100) == pytest.approx([0.5, (1 + math.cos(0.1 * math.pi)) / 2, 0.5, 0.0])


def test_schedules_pass_their_knots():
    linear = options(schedule="linear", knots=[[0.25, 1.0], [0.5, 0.4]], final_ratio=0.2)
    assert at(linear, 0, 25, 50, 75, 100, 500) == pytest.approx([1, 1, 0.4, 0.3, 0.2, 0.2])
    exponential = options(schedule="exponential", knots=[[0.5, 1.0]], final_ratio=0.01)
    assert at(exponential, 50, 75, 100) == pytest.approx([1.0, 0.1, 0.01])
    steps = options(schedule="steps", knots=[[0.5, 0.1], [0.8, 0.01]])
    assert at(steps, 0, 49, 50, 79, 80, 100) == [1, 1, 0.1, 0.1, 0.01, 0.01]


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(["cosine", "linear", "exponential"]), st.floats(0.01, 1), st.integers(0, 50))
def test_schedules_fall_from_one_to_the_final_ratio(schedule, final, warmup):
    optimization = options(schedule=schedule, final_ratio=final, warmup_steps=warmup)
    values = at(optimization, *range(warmup, 101))
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(final)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": "linear", "knots": [[0.5, 1], [0.5, 0.2]]}, "knots must ascend, got shares 0.5, 0.5"),
        ({"knots": [[0.5, 1]]}, "knots belong to the schedules linear, exponential and steps, not to cosine"),
        ({"schedule": "steps"}, "the schedule steps needs knots"),
        ({"schedule": "exponential"}, "the schedule exponential needs a final_ratio and knots above 0"),
    ],
)
def test_schedules_that_cannot_be(changes, sentence):
    with pytest.raises(ValidationError, match=sentence.replace("[", r"\[")):
        options(**changes)


def test_the_weight_decay_moves_along_half_a_cosine():
    moving = options(weight_decay=0.05, final_weight_decay=0.25)
    assert [weight_decay(moving, step) for step in (0, 50, 100)] == pytest.approx([0.05, 0.15, 0.25])
    assert weight_decay(options(weight_decay=0.05), 70) == 0.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.embed = nn.Embedding(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def decays(**changes):
    model = Model()
    optimizer = build_optimizer(model, options(weight_decay=0.1, **changes))
    names = {id(weight): name for name, weight in model.named_parameters()}
    first, second = ({names[id(weight)] for weight in group["params"]} for group in optimizer.param_groups)
    assert not first & second
    assert "frozen.weight" not in first | second
    return optimizer, first


def test_who_has_weight_decay():
    assert decays()[1] == {"linear.weight", "embed.weight"}
    assert decays(no_decay=["embed", "norm"])[1] == {"linear.weight"}
    assert decays(decay_vectors=True)[1] == {"linear.weight", "linear.bias", "embed.weight"}
    assert decays(decay_vectors=True, no_decay=["bias"])[1] == {"linear.weight", "embed.weight"}


def test_the_optimizers_of_the_field():
    adamw, adam = decays()[0], decays(optimizer="adam")[0]
    assert (type(adamw), type(adam)) == (torch.optim.AdamW, torch.optim.Adam)
    set_rates(adamw, options(weight_decay=0.1, final_weight_decay=0.0), 100)
    assert [group["lr"] for group in adamw.param_groups] == [0.0, 0.0]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.0, 0.0]
    set_rates(adamw, options(weight_decay=0.1, schedule="constant"), 100)
    assert [group["lr"] for group in adamw.param_groups] == [0.1, 0.1]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("warmup", ["none", "ramp", "power"])
def test_averages_follow_their_decays(warmup):
    module = nn.Linear(2, 2)
    expected = module.weight.detach().clone()
    ema = EMA(module, 0.8, warmup)
    rules = {"none": lambda n: 1.0, "ramp": lambda n: (1 + n) / (10 + n), "power": lambda n: 1 - (1 + n) ** (-2 / 3)}
    for update in range(1, 30):
        with torch.no_grad():
            module.weight += 0.1 * update
        decay = min(0.8, rules[warmup](update))
        assert ema_decay(0.8, warmup, update) == pytest.approx(decay)
        expected = decay * expected + (1 - decay) * module.weight.detach()
        ema.update()
    torch.testing.assert_close(ema.weights["weight"], expected)


def test_a_ramp():
    ramp = Ramp(start=1.0, end=0.01, steps=100)
    assert [ramp(step) for step in (0, 50, 100, 1000)] == pytest.approx([1.0, 0.505, 0.01, 0.01])


@pytest.mark.parametrize(("betas", "place"), [([0.9, 1.0], "betas.1"), ([-0.1, 0.95], "betas.0")])
def test_betas_that_no_optimizer_takes(betas, place):
    with pytest.raises(ValidationError, match=place):
        options(betas=betas)
