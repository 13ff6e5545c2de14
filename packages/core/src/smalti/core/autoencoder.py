"""Autoencoders with a continuous latent: a Gaussian posterior instead of tokens (VAE, Kingma and Welling 2014).

Legend: B batch, C channels, H W pixels, D latent width. Latents are channel-last, `(B, *space, D)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import check_images
from smalti.core.errors import UserError
from smalti.core.options import AutoencoderOptions, DecoderOptions, EncoderOptions, Options, Preprocessing, Slot
from smalti.core.weights import Pretrained, validated


class DiagonalGaussian(NamedTuple):
    """A Gaussian without correlations: `mean` and `log_variance`, both `(B, *space, D)`."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> Self:
        """From `(B, *space, 2 D)`: mean, then logarithm of the variance, held within [-30, 20]; both in float32."""
        mean, log_variance = moments.float().chunk(2, dim=-1)
        return cls(mean, log_variance.clamp(-30.0, 20.0))

    @property
    def std(self) -> Tensor:
        """The standard deviation `(B, *space, D)`."""
        return torch.exp(0.5 * self.log_variance)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw `(B, *space, D)`, with gradients to both moments."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise

    def divergence(self) -> Tensor:
        """The Kullback-Leibler divergence from the standard normal distribution, summed over D: `(B, *space)`."""
        terms = self.mean.square() + self.log_variance.exp() - 1.0 - self.log_variance
        return 0.5 * terms.sum(-1)


@dataclass(frozen=True)
class AutoencoderOutput:
    """What an autoencoder makes of images in training.

    `images` `(B, C, H, W)` are the reconstructions with gradients; `posterior` what they were drawn from; `losses`
    weighted scalar terms; `features` whatever further losses need, by name.
    """

    images: Tensor
    posterior: DiagonalGaussian
    losses: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)


class Autoencoder(nn.Module, Pretrained, ABC):
    """Images to a continuous latent and back."""

    kind = "autoencoder"
    options: AutoencoderOptions
    width: int

    @property
    def preprocessing(self) -> Preprocessing:
        """How image files become the tensors it was trained on."""
        return self.options.preprocessing

    @abstractmethod
    def latent_space(self, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The `space` of the latent of an image of `(H, W)`, by default of the preprocessing's size."""

    @abstractmethod
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images `(B, C, H, W)` in [-1, 1] to the distribution of their latents, with gradients."""

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images to latents `(B, *space, D)`: the mean, or with a generator a sample drawn with it."""
        posterior = self.posterior(images)
        return posterior.mean if generator is None else posterior.sample(generator)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents `(B, *space, D)` to images in [-1, 1], clamped."""

    @abstractmethod
    def forward(self, images: Tensor) -> AutoencoderOutput:
        """Encode, sample in training and take the mean else, decode, with losses."""

    def config(self) -> dict[str, Any]:
        """What `config.json` holds beside the weights."""
        return {"kind": self.kind, "options": self.options.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it from what `config()` gave."""
        return validated(_AutoencoderConfig, config).options.build()  # type: ignore[return-value]


class _AutoencoderConfig(Options):
    kind: Literal["autoencoder"]
    options: Annotated[AutoencoderOptions, Slot("autoencoder")]


class ComposedAutoencoderOptions(AutoencoderOptions):
    """Options of `ComposedAutoencoder`.

    Args:
        encoder: images to what the moments of the posterior are read from.
        decoder: a latent to images.
        width: D, of the latent.
        divergence_weight: of the divergence from the standard normal distribution, summed over an image's latent.
    """

    name: Literal["composed"] = "composed"
    encoder: Annotated[EncoderOptions, Slot("encoder")]
    decoder: Annotated[DecoderOptions, Slot("decoder")]
    width: Annotated[int, Field(ge=1)]
    divergence_weight: Annotated[float, Field(ge=0)] = 1e-6

    def build(self) -> ComposedAutoencoder:
        """Build it."""
        return ComposedAutoencoder(self)


class ComposedAutoencoder(Autoencoder):
    """Encoder, linear map to the moments, linear map to the decoder's width, decoder.

    `forward` and `decode` hand what a decoder needs beside the latent through to it, by name: `text=...`.
    """

    def __init__(self, options: ComposedAutoencoderOptions) -> None:
        super().__init__()
        channels = options.preprocessing.channels
        self.width = options.width
        self.encoder = options.encoder.build(channels)
        self.decoder = options.decoder.build(channels)
        # What was built tells its options: a part that started from pretrained weights is saved without that start.
        parts = {"encoder": self.encoder.options, "decoder": self.decoder.options}
        self.options: ComposedAutoencoderOptions = options.model_copy(update=parts)
        self.to_moments = nn.Linear(self.encoder.width, 2 * options.width)
        self.from_latent = nn.Linear(options.width, self.decoder.width)
        self.latent_space()  # an image size that the encoder cannot take shall be known before any work

    def latent_space(self, image_size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The `space` of the latent of an image of `(H, W)`."""
        size = self.preprocessing.image_size
        return self.encoder.latent_space(image_size or (size, size))

    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """Images `(B, C, H, W)` to the distribution of their latents."""
        check_images(images, self.preprocessing.channels)
        return DiagonalGaussian.from_moments(self.to_moments(self.encoder(images)))

    @torch.no_grad()
    def decode(self, latents: Tensor, **context: Tensor) -> Tensor:
        """Latents `(B, *space, D)` to images `(B, C, H, W)`."""
        check_latents(latents, self.width)
        images: Tensor = self.decoder(self.from_latent(latents), **context)
        return images.clamp(-1.0, 1.0)

    def forward(self, images: Tensor, **context: Tensor) -> AutoencoderOutput:
        """Encode, sample in training and take the mean else, decode."""
        posterior = self.posterior(images)
        latents = posterior.sample() if self.training else posterior.mean
        losses = divergence_losses(posterior, self.options.divergence_weight) if self.training else {}
        return AutoencoderOutput(self.decoder(self.from_latent(latents), **context), posterior, losses)


def divergence_losses(posterior: DiagonalGaussian, weight: float) -> dict[str, Tensor]:
    """The weighted divergence, summed over each image and averaged over the batch."""
    return {"divergence": weight * posterior.divergence().sum() / len(posterior.mean)}


def check_latents(latents: Tensor, width: int) -> None:
    """Raise a `UserError` unless `latents` is a float `(B, *space, width)`."""
    if latents.ndim < 3 or latents.shape[-1] != width or not torch.is_floating_point(latents):
        raise UserError(f"latents must be float (B, *space, {width}), got {latents.dtype} {tuple(latents.shape)}")
