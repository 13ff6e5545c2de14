"""The contract of tokenizers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import TokenizerOptions


class TokenizerContract:
    """What every tokenizer must do. Subclasses set `options`; it must be registered, so that it can be loaded.

    Attributes:
        options: of the tokenizer under test.
    """

    options: ClassVar[TokenizerOptions]

    def build(self) -> Tokenizer:
        """A tokenizer with fixed weights."""
        torch.manual_seed(0)
        return self.options.build()

    def images(self, batch: int = 3) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] of the preprocessing's size."""
        preprocessing = self.options.preprocessing
        size = preprocessing.image_size
        generator = torch.Generator().manual_seed(1)
        coarse = torch.rand(batch, preprocessing.channels, 4, 4, generator=generator) * 2 - 1
        return torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)

    def context(self, batch: int) -> dict[str, Any]:
        """What `forward` and `decode` need beside images or tokens, by argument name, for a batch of that size."""
        del batch
        return {}

    def test_tokens_have_the_layout(self) -> None:
        tokenizer = self.build().eval()
        layout = tokenizer.layout()
        tokens = tokenizer.encode(self.images())
        assert tokens.dtype == torch.int64
        assert tokens.shape == (3, layout.positions, layout.streams)
        assert bool((tokens >= 0).all())
        assert bool((tokens < torch.tensor(layout.vocab)).all())

    def test_tokens_alone_decode(self) -> None:
        tokenizer = self.build().eval()
        images = self.images()
        tokens = tokenizer.encode(images)
        decoded = tokenizer.decode(tokens, **self.context(3))
        assert decoded.shape == images.shape
        assert bool((decoded.abs() <= 1).all())
        assert torch.equal(decoded, tokenizer.decode(tokens, tokenizer.layout(), **self.context(3)))

    def test_decode_agrees_with_forward(self) -> None:
        tokenizer = self.build().eval()
        images = self.images()
        with torch.no_grad():
            output = tokenizer(images, **self.context(len(images)))
        assert torch.equal(output.tokens, tokenizer.encode(images))
        torch.testing.assert_close(
            tokenizer.decode(output.tokens, **self.context(3)), output.images.clamp(-1, 1), atol=1e-4, rtol=0
        )

    def test_every_weight_learns(self) -> None:
        tokenizer = self.build().train()
        images = self.images()
        for _ in range(2):  # a layer that starts at zero hides those before it from the first gradient
            output = tokenizer(images, **self.context(len(images)))
            for name, loss in output.losses.items():
                assert math.isfinite(loss.item()), name
            features = sum(feature.square().mean() for feature in output.features.values())
            loss = (output.images - images).square().mean() + sum(output.losses.values()) + features
            tokenizer.zero_grad()
            loss.backward()
            with torch.no_grad():
                for weight in tokenizer.parameters():
                    if weight.grad is not None:
                        weight.sub_(1e-2 * weight.grad)
        for name, weight in tokenizer.named_parameters():
            assert not weight.requires_grad or weight.grad is not None, f"{name} gets no gradient"

    def test_training_reconstructs_better(self) -> None:
        tokenizer = self.build().train()
        images = self.images(8)
        optimizer = torch.optim.Adam(tokenizer.parameters(), lr=2e-3)
        errors = []
        for step in range(30):
            torch.manual_seed(step)
            output = tokenizer(images, **self.context(len(images)))
            error = (output.images - images).square().mean()
            optimizer.zero_grad()
            (error + sum(output.losses.values())).backward()
            optimizer.step()
            errors.append(error.item())
        assert errors[-1] < 0.9 * errors[0]

    def test_save_and_load(self, tmp_path: Path) -> None:
        tokenizer = self.build().eval()
        tokenizer.save_pretrained(tmp_path)
        loaded = Tokenizer.from_pretrained(tmp_path)
        assert loaded.options == tokenizer.options
        assert not loaded.training
        assert torch.equal(loaded.encode(self.images()), tokenizer.encode(self.images()))

    def test_batch_size_does_not_matter(self) -> None:
        tokenizer = self.build().eval()
        images = self.images(4)
        singly = torch.cat([tokenizer.encode(image[None]) for image in images])
        # Rounding may differ with the batch size and tip a near tie; more than a rare token must not change.
        assert (tokenizer.encode(images) == singly).float().mean() >= 0.99

    def test_autocast(self) -> None:
        tokenizer = self.build().train()
        with torch.autocast("cpu", torch.bfloat16):
            output = tokenizer(self.images(), **self.context(3))
            loss = output.images.float().square().mean() + sum(output.losses.values())
        loss.backward()
        assert bool(torch.isfinite(output.images).all())
        gradients = [weight.grad for weight in tokenizer.parameters() if weight.grad is not None]
        assert gradients
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def test_compiles_as_one_graph(self) -> None:
        tokenizer = self.build().eval()
        images = self.images()
        torch._dynamo.reset()
        with torch.no_grad():
            context = self.context(3)
            output = torch.compile(tokenizer, fullgraph=True, backend="aot_eager")(images, **context)
            torch.testing.assert_close(output.images, tokenizer(images, **context).images, atol=1e-4, rtol=1e-4)

    def test_wrong_channels_are_told(self) -> None:
        tokenizer = self.build().eval()
        size, channels = self.options.preprocessing.image_size, self.options.preprocessing.channels + 1
        with pytest.raises(UserError, match=str(channels)):
            tokenizer.encode(torch.zeros(1, channels, size, size))
