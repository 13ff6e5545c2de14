import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.core.training.activations import checkpoint_activations


class Counted(nn.Module):
    """A block with dropout that counts its calls."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout, self.calls = nn.Linear(4, 4), nn.Dropout(0.5), 0

    def forward(self, x):
        self.calls += 1
        return x + self.dropout(self.linear(x).tanh())


def gradients(model, x):
    torch.manual_seed(1)
    loss = model(x).square().mean()
    loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}, loss


def test_blocks_are_computed_twice_with_equal_gradients():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Tanh(), Counted(), nn.ModuleDict({"a": nn.Identity()})["a"], Counted()),
        torch.randn(8, 4),
    )
    names = list(model.state_dict())
    expected, loss = gradients(model, x)
    model.zero_grad()
    assert checkpoint_activations(model) == 2
    found, again = gradients(model, x)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert [block.calls for block in model if isinstance(block, Counted)] == [3, 3]
    assert list(model.state_dict()) == names


def test_what_keeps_statistics_is_left_out():
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 4)]
    model = nn.ModuleDict(
        {"blocks": nn.ModuleList(blocks), "quantizer": registry().options("quantizer", "signs")().build()}
    )
    assert checkpoint_activations(model) == 2  # the layer beside the normalisation, and the second block
    before = blocks[0][1].num_batches_tracked.clone()
    blocks[0](torch.randn(8, 4, requires_grad=True)).sum().backward()
    assert blocks[0][1].num_batches_tracked == before + 1


def test_a_model_without_blocks():
    with pytest.raises(UserError, match=r"^checkpoint_activations: Linear has no list of blocks to compute again$"):
        checkpoint_activations(nn.Linear(2, 2))
