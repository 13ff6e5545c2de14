"""What makes codes or targets without being a quantizer: the binary mapper and random projections."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from smalti.core.errors import UserError
from smalti.quant.binary_mapper import BinaryMapper
from smalti.quant.random_projection import RandomProjectionQuantizer


def test_one_hot_codes_carry_the_gradient_of_their_distribution() -> None:
    torch.manual_seed(0)
    mapper, probe = BinaryMapper(3, free_nats=0.01), torch.randn(4, 8, dtype=torch.float64)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mapped = mapper(logits, sample=False)
    strings = ((torch.arange(8)[:, None] >> torch.arange(3)) & 1).double()
    distribution = torch.softmax(logits @ strings.t(), dim=1)
    assert torch.equal(mapped.tokens, distribution.argmax(1))
    assert torch.equal(mapped.one_hot, F.one_hot(mapped.tokens, 8).double())
    found = torch.autograd.grad((mapped.one_hot * probe).sum(), logits)[0]
    torch.testing.assert_close(found, torch.autograd.grad((distribution * probe).sum(), logits, retain_graph=True)[0])
    divergence = math.log(8) + (distribution * distribution.log()).sum(1)
    torch.testing.assert_close(mapped.loss, (divergence - 0.01).clamp(min=0).mean())
    picked = distribution.log().gather(1, mapped.tokens[:, None])[:, 0]
    torch.testing.assert_close(mapper.log_prob(logits, mapped.tokens), picked)


def test_sampled_bits_follow_their_odds() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([2.0, -1.0]).expand(20_000, 2)
    tokens = BinaryMapper(2)(logits, sample=True).tokens
    shares = torch.stack([tokens & 1, tokens >> 1], dim=1).double().mean(0)
    torch.testing.assert_close(shares, torch.sigmoid(logits[0]).double(), atol=0.01, rtol=0.0)


def test_close_to_uniform_is_free() -> None:
    logits = torch.full((3, 2), 0.1, requires_grad=True)
    loss = BinaryMapper(2)(logits, sample=False).loss
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_wrong_bits_of_the_mapper_are_told() -> None:
    with pytest.raises(UserError, match="one-hot codes can have 1 to 20 bits, got 21"):
        BinaryMapper(21)
    with pytest.raises(UserError, match=r"log-odds must be float \(..., 3\), got torch.float32 \(2, 4\)"):
        BinaryMapper(3)(torch.zeros(2, 4), sample=False)


def test_random_projections_are_a_cosine_search() -> None:
    torch.manual_seed(0)
    quantizer, latent = RandomProjectionQuantizer(10, 30, 4, codebooks=3), torch.randn(2, 5, 6, 10)
    tokens = quantizer(latent)
    assert tokens.shape == (2, 30, 3)
    normal = (latent - latent.mean(-1, keepdim=True)) / latent.var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()
    for stream in range(3):
        projected = normal.flatten(1, 2) @ quantizer.projections[stream].t()
        cosines = F.cosine_similarity(projected[:, :, None], quantizer.codes[stream], dim=-1)
        assert torch.equal(tokens[..., stream], cosines.argmax(-1))
        torch.testing.assert_close(quantizer.similarities(latent)[:, :, stream], cosines)


def test_random_projections_never_learn_and_are_saved() -> None:
    torch.manual_seed(0)
    first, second = (RandomProjectionQuantizer(6, 9, 4, normalise=False) for _ in range(2))
    latent = torch.randn(2, 20, 6)
    assert not list(first.parameters())
    assert not torch.equal(first(latent), second(latent))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(latent), second(latent))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first(latent.bfloat16()), second(latent.bfloat16().float()))
    with pytest.raises(UserError, match="random projections need sizes of at least 1, got dim 6, codebook_size 0"):
        RandomProjectionQuantizer(6, 0, 4)
