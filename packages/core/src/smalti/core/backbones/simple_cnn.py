"""The small convolutional encoder and decoder of VQ-VAE (van den Oord et al. 2017), without normalisation.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.contracts import Decoder, Encoder, check_images, check_latent, grid_of
from smalti.core.options import DecoderOptions, EncoderOptions, Options

FACTOR = 4
SLOPE = 0.01


class _Sizes(Options):
    """What encoder and decoder have in common.

    Args:
        width: channels of the latent and of the residual blocks, half as many at half the resolution.
        blocks: residual blocks.
    """

    width: Annotated[int, Field(ge=2)] = 256
    blocks: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width}")
        return self


class SimpleCNNEncoderOptions(_Sizes, EncoderOptions):
    """Options of `SimpleCNNEncoder`."""

    name: Literal["simple-cnn"] = "simple-cnn"

    def build(self, channels: int) -> SimpleCNNEncoder:
        """Build it for images of `channels` channels."""
        return SimpleCNNEncoder(self, channels)


class SimpleCNNDecoderOptions(_Sizes, DecoderOptions):
    """Options of `SimpleCNNDecoder`."""

    name: Literal["simple-cnn"] = "simple-cnn"

    def build(self, channels: int) -> SimpleCNNDecoder:
        """Build it for images of `channels` channels."""
        return SimpleCNNDecoder(self, channels)


class RectifiedBlock(nn.Module):
    """`relu(x) + conv2(relu(conv1(relu(x))))`, 3 x 3 and 1 x 1, without biases.

    That the skip path is rectified, too, is a defect of visual-tokenizer-pytorch that its weights were trained with.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, width, h, w)` to the same."""
        rectified = F.relu(x)
        result: Tensor = rectified + self.conv2(F.relu(self.conv1(rectified)))
        return result


class SimpleCNNEncoder(Encoder):
    """Two convolutions 4 x 4 of stride 2, one 3 x 3, and residual blocks."""

    def __init__(self, options: SimpleCNNEncoderOptions, channels: int) -> None:
        super().__init__()
        self.options: SimpleCNNEncoderOptions = options
        self.channels = channels
        self.width = options.width
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(channels, self.width // 2, 4, stride=2, padding=1),
                nn.Conv2d(self.width // 2, self.width, 4, stride=2, padding=1),
                nn.Conv2d(self.width, self.width, 3, padding=1),
            ]
        )
        self.blocks = nn.ModuleList(RectifiedBlock(self.width) for _ in range(options.blocks))

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` to `(B, H/4, W/4, width)`."""
        check_images(images, self.channels)
        self.latent_space((images.shape[2], images.shape[3]))
        first, second, third = self.convolutions
        latent = third(F.leaky_relu(second(F.leaky_relu(first(images), SLOPE)), SLOPE))
        for block in self.blocks:
            latent = block(latent)
        result: Tensor = latent.permute(0, 2, 3, 1)
        return result

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """`(H/4, W/4)`."""
        return grid_of(image_size, FACTOR)


class SimpleCNNDecoder(Decoder):
    """Residual blocks, a 3 x 3 convolution, two transposed ones 4 x 4 of stride 2, and tanh."""

    def __init__(self, options: SimpleCNNDecoderOptions, channels: int) -> None:
        super().__init__()
        self.options: SimpleCNNDecoderOptions = options
        self.width = options.width
        self.blocks = nn.ModuleList(RectifiedBlock(self.width) for _ in range(options.blocks))
        self.convolutions = nn.ModuleList(
            [
                nn.Conv2d(self.width, self.width, 3, padding=1),
                nn.ConvTranspose2d(self.width, self.width // 2, 4, stride=2, padding=1),
                nn.ConvTranspose2d(self.width // 2, channels, 4, stride=2, padding=1),
            ]
        )

    def forward(self, latent: Tensor) -> Tensor:
        """Latent `(B, h, w, width)` to images `(B, C, 4 h, 4 w)` in [-1, 1]."""
        check_latent(latent, "simple-cnn", self.width)
        x = latent.permute(0, 3, 1, 2)
        for block in self.blocks:
            x = block(x)
        for convolution in self.convolutions:
            x = convolution(F.leaky_relu(x, SLOPE))
        return x.tanh()
