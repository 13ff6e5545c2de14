import pytest
import torch

from smalti.eval.token_usage import TokenUsage


def test_usage_and_perplexity_of_each_stream():
    usage = TokenUsage((8, 4))
    usage.update(torch.stack([torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 1], [1, 1]])], -1))
    usage.update(torch.stack([torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 1, 1, 1]])], -1))
    assert usage.counts[0].tolist() == [2, 2, 2, 2, 0, 0, 0, 0]
    assert usage.usage == [0.5, 0.25]
    assert usage.perplexity == pytest.approx([4.0, 1.0])


def test_perplexity_of_uneven_use():
    usage = TokenUsage((2,))
    usage.update(torch.tensor([0, 0, 0, 1]).view(1, 4, 1))
    assert usage.perplexity == pytest.approx([4 / 3**0.75])
