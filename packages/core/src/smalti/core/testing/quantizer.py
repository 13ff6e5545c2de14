"""The contract of quantizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from smalti.core import distributed
from smalti.core.contracts import Quantizer
from smalti.core.errors import UserError
from smalti.core.options import QuantizerOptions
from smalti.core.testing.processes import run_in_processes
from smalti.core.weights import load_tensors, save_tensors


class QuantizerContract:
    """What every quantizer must do. Subclasses set `options`.

    Attributes:
        options: of the quantizer under test.
        space: of the latents it is tried with.
    """

    options: ClassVar[QuantizerOptions]
    space: ClassVar[tuple[int, ...]] = (4, 6)

    def build(self) -> Quantizer:
        """A quantizer with fixed weights."""
        torch.manual_seed(0)
        return self.options.build()

    def latent(self, quantizer: Quantizer, batch: int = 3, seed: int = 1) -> Tensor:
        """A latent `(B, *space, D)`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, *self.space, quantizer.dim, generator=generator)

    def test_shapes(self) -> None:
        quantizer = self.build().eval()
        latent = self.latent(quantizer)
        quantized = quantizer(latent)
        layout = quantizer.layout(self.space)
        assert quantized.latent.shape == latent.shape
        assert quantized.latent.dtype == latent.dtype
        assert quantized.tokens.dtype == torch.int64
        assert quantized.tokens.shape == (3, layout.positions, layout.streams)
        assert layout.vocab == quantizer.vocab
        assert bool((quantized.tokens >= 0).all())
        assert bool((quantized.tokens < torch.tensor(layout.vocab)).all())
        assert quantized.losses == {}

    def test_decode_inverts_tokens_exactly(self) -> None:
        quantizer = self.build().eval()
        quantized = quantizer(self.latent(quantizer))
        assert torch.equal(quantizer.decode(quantized.tokens, self.space), quantized.latent)

    def test_samples_do_not_depend_on_their_batch(self) -> None:
        quantizer = self.build().eval()
        latent = self.latent(quantizer)
        alone = torch.cat([quantizer(row[None]).tokens for row in latent])
        assert torch.equal(alone, quantizer(latent).tokens)

    def test_gradients(self) -> None:
        quantizer = self.build().train()
        latent = self.latent(quantizer).requires_grad_()
        quantized = quantizer(latent)
        for name, loss in quantized.losses.items():
            assert loss.ndim == 0, name
            assert math.isfinite(loss.item()), name
        (quantized.latent.square().sum() + sum(quantized.losses.values())).backward()
        assert latent.grad is not None
        assert bool(torch.isfinite(latent.grad).all())
        assert bool((latent.grad != 0).any())
        for name, weight in quantizer.named_parameters():
            assert not weight.requires_grad or weight.grad is not None, f"{name} gets no gradient"

    def test_evaluation_changes_nothing(self) -> None:
        quantizer = self.build().eval()
        before = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
        quantizer(self.latent(quantizer))
        after = quantizer.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_autocast_searches_in_float32(self) -> None:
        quantizer = self.build().eval()
        latent = self.latent(quantizer).bfloat16()
        expected = quantizer(latent.float()).tokens
        with torch.autocast("cpu", dtype=torch.bfloat16):
            quantized = quantizer(latent)
        assert torch.equal(quantized.tokens, expected)

    def test_same_seed_same_training(self) -> None:
        first, second = (_trained(self.build(), self.latent) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_state_dict_goes_on_exactly(self, tmp_path: Path) -> None:
        whole = self.build().train()
        for step in range(4):
            torch.manual_seed(step)
            whole(self.latent(whole, seed=step))
        half = self.build().train()
        for step in range(2):
            torch.manual_seed(step)
            half(self.latent(half, seed=step))
        save_tensors(tmp_path / "state.safetensors", half.state_dict())
        resumed = self.build().train()
        load_tensors(resumed, tmp_path / "state.safetensors")
        for step in range(2, 4):
            torch.manual_seed(step)
            resumed(self.latent(resumed, seed=step))
        expected, found = whole.state_dict(), resumed.state_dict()
        assert all(torch.equal(expected[name], found[name]) for name in expected)

    def test_wrong_width_is_told(self) -> None:
        quantizer = self.build().eval()
        with pytest.raises(UserError, match=str(quantizer.dim)):
            quantizer(torch.zeros(2, *self.space, quantizer.dim + 1))

    def test_tokens_out_of_range_are_told(self) -> None:
        quantizer = self.build().eval()
        layout = quantizer.layout(self.space)
        tokens = torch.zeros(1, layout.positions, layout.streams, dtype=torch.int64)
        tokens[0, 0, 0] = layout.vocab[0]
        with pytest.raises(UserError, match=str(layout.vocab[0])):
            quantizer.decode(tokens, self.space)

    def test_replicas_never_diverge(self) -> None:
        first, second = run_in_processes(_replica, self.options, self.space)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} differs between two processes"


def _trained(quantizer: Quantizer, latent: Any) -> dict[str, Tensor]:
    """The state after three optimizer steps."""
    torch.manual_seed(0)
    quantizer.train()
    weights = [weight for weight in quantizer.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1) if weights else None
    for step in range(3):
        quantized = quantizer(latent(quantizer, seed=step))
        losses = list(quantized.losses.values())
        if optimizer is not None and losses:
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in quantizer.state_dict().items()}


def _replica(rank: int, options: QuantizerOptions, space: tuple[int, ...]) -> dict[str, Tensor]:
    """Train on this rank's own data; the state that all ranks must share."""
    torch.manual_seed(0)
    quantizer = options.build().train()
    weights = [weight for weight in quantizer.parameters() if weight.requires_grad]
    replica = DistributedDataParallel(quantizer, broadcast_buffers=False) if weights else quantizer
    optimizer = torch.optim.SGD(weights, lr=0.1) if weights else None
    for step in range(4):
        torch.manual_seed(100 * step + rank)
        quantized = replica(torch.randn(2, *space, quantizer.dim))
        if optimizer is not None:
            optimizer.zero_grad()
            (quantized.latent.sum() * 0 + sum(quantized.losses.values())).backward()
            optimizer.step()
    assert distributed.world_size() == 2
    return {name: tensor.detach().clone() for name, tensor in quantizer.state_dict().items()}
