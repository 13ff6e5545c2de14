"""The contract of generators."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from smalti.core.contracts import Generator
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import GeneratorOptions
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.testing.processes import run_in_processes


class GeneratorContract:
    """What every generator must do. Subclasses set `options`; it must be registered, so that it can be loaded.

    Attributes:
        options: of the generator under test.
        layout: of the tokens it is tried with.
        unsupported: a layout that it cannot take, if there is one.
        classes: number of labels.
    """

    options: ClassVar[GeneratorOptions]
    layout: ClassVar[TokenLayout] = TokenLayout.grid(3, 4, (16,))
    unsupported: ClassVar[TokenLayout | None] = None
    classes: ClassVar[int] = 5

    def build(self) -> Generator:
        """A generator with fixed weights; the output is not left at zero, so that samples depend on all of it."""
        torch.manual_seed(0)
        generator = self.options.build(self.layout, self.classes)
        noise = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for weight in generator.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=noise))
        return generator

    def tokens(self, batch: int = 4) -> Tensor:
        """Random tokens `(B, L, S)`."""
        generator = torch.Generator().manual_seed(1)
        streams = [
            torch.randint(0, size, (batch, self.layout.positions), generator=generator) for size in self.layout.vocab
        ]
        return torch.stack(streams, dim=-1)

    def labels(self, batch: int = 4) -> Tensor:
        """Labels `(B,)`."""
        return torch.arange(batch) % self.classes

    def settings(self) -> SamplingSettings:
        """Settings that use every filter."""
        return SamplingSettings(guidance_scale=2.0, temperature=0.9, top_k=8, top_p=0.95, seed=3)

    def test_supports(self) -> None:
        assert self.options.supports(self.layout) is None
        if self.unsupported is not None:
            reason = self.options.supports(self.unsupported)
            assert reason
            with pytest.raises(UserError, match="cannot take the layout"):
                self.options.build(self.unsupported, self.classes)

    def test_loss_and_gradients(self) -> None:
        generator = self.build().train()
        losses = generator.loss(self.tokens(), self.labels())
        assert losses
        for name, loss in losses.items():
            assert loss.ndim == 0, name
            assert math.isfinite(loss.item()), name
        torch.stack(list(losses.values())).sum().backward()
        for name, weight in generator.named_parameters():
            assert not weight.requires_grad or weight.grad is not None, f"{name} gets no gradient"

    def test_learns_one_batch(self) -> None:
        generator = self.build().train()
        tokens, labels = self.tokens(), self.labels()
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
        values = []
        for step in range(40):
            torch.manual_seed(step)
            loss = torch.stack(list(generator(tokens, labels).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        assert values[-1] < 0.9 * values[0]

    def test_samples_have_the_layout(self) -> None:
        generator = self.build().eval()
        tokens = generator.sample(self.labels(), self.settings())
        assert tokens.dtype == torch.int64
        assert tokens.shape == (4, self.layout.positions, self.layout.streams)
        assert bool((tokens >= 0).all())
        assert bool((tokens < torch.tensor(self.layout.vocab)).all())

    def test_a_sample_is_the_same_in_every_batch(self) -> None:
        generator = self.build().eval()
        labels, indices = self.labels(6), torch.tensor([5, 9, 0, 7, 1, 3])
        together = generator.sample(labels, self.settings(), indices)
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            assert torch.equal(generator.sample(labels[rows], self.settings(), indices[rows]), together[rows])

    def test_a_trace_tells_steps(self) -> None:
        generator = self.build().eval()
        tokens, steps = generator.sample_traced(self.labels(), self.settings())
        assert torch.equal(tokens, generator.sample(self.labels(), self.settings()))
        assert steps.dtype == torch.int64
        assert steps.shape == (4, self.layout.positions)
        assert int(steps.min()) >= 0

    def test_seed_and_index_decide(self) -> None:
        generator = self.build().eval()
        labels = torch.zeros(8, dtype=torch.int64)
        settings = SamplingSettings(seed=3)
        first = generator.sample(labels, settings)
        assert torch.equal(first, generator.sample(labels, settings, torch.arange(8)))
        assert not torch.equal(first, generator.sample(labels, SamplingSettings(seed=4)))
        assert not torch.equal(first[0], first[1])

    def test_sampling_leaves_the_mode(self) -> None:
        generator = self.build().train()
        generator.sample(self.labels(), self.settings())
        assert generator.training

    def test_greedy_takes_no_noise(self) -> None:
        generator = self.build().eval()
        first, second = (
            generator.sample(self.labels(), SamplingSettings(temperature=0.0, seed=seed)) for seed in (1, 2)
        )
        assert torch.equal(first, second)

    def test_save_and_load(self, tmp_path: Path) -> None:
        generator = self.build().eval()
        generator.save_pretrained(tmp_path)
        loaded = Generator.from_pretrained(tmp_path)
        assert loaded.options == generator.options
        assert loaded.token_layout == self.layout
        assert loaded.classes == self.classes
        assert torch.equal(
            loaded.sample(self.labels(), self.settings()), generator.sample(self.labels(), self.settings())
        )

    def test_labels_out_of_range_are_told(self) -> None:
        generator = self.build().eval()
        labels = torch.tensor([0, self.classes])
        with pytest.raises(UserError, match=f"label {self.classes} is out of range"):
            generator.sample(labels, self.settings())
        with pytest.raises(UserError, match=f"label {self.classes} is out of range"):
            generator.loss(self.tokens(2), labels)

    def test_replicas_never_diverge(self) -> None:
        first, second = run_in_processes(_replica, self.options, self.layout, self.classes)
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} differs between two processes"


def _replica(rank: int, options: GeneratorOptions, layout: TokenLayout, classes: int) -> dict[str, Tensor]:
    """Train on this rank's own data; the weights that all ranks must share."""
    torch.manual_seed(0)
    generator = options.build(layout, classes).train()
    replica = DistributedDataParallel(generator, broadcast_buffers=False)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(100 * step + rank)
        tokens = torch.stack([torch.randint(0, size, (2, layout.positions)) for size in layout.vocab], dim=-1)
        losses = replica(tokens, torch.randint(0, classes, (2,)))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in generator.state_dict().items()}
