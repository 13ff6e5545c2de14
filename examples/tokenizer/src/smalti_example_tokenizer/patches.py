"""A tokenizer of square patches: an MLP, finite scalar quantization (Mentzer et al. 2023), and an MLP back."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Tokenizer, TokenizerOutput, check_images, check_tokens
from smalti.core.layout import TokenLayout
from smalti.core.options import TokenizerOptions


class PatchOptions(TokenizerOptions):
    """Patches of `patch` x `patch` pixels, codes of `digits` digits with `levels` values each."""

    name: Literal["example-patches"] = "example-patches"
    patch: Annotated[int, Field(ge=1)] = 4
    digits: Annotated[int, Field(ge=1)] = 4
    levels: Literal[3, 5, 7, 9] = 5

    def build(self) -> "PatchTokenizer":
        """Build it."""
        return PatchTokenizer(self)


class PatchTokenizer(Tokenizer):
    """Tokens `(B, H W / patch^2, 1)`."""

    def __init__(self, options: PatchOptions) -> None:
        super().__init__()
        self.options: PatchOptions = options
        pixels, digits = options.preprocessing.channels * options.patch**2, options.digits
        self.to_digits = nn.Sequential(nn.Linear(pixels, 128), nn.GELU(), nn.Linear(128, digits), nn.Tanh())
        self.to_pixels = nn.Sequential(nn.Linear(digits, 128), nn.GELU(), nn.Linear(128, pixels))

    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        height, width = image_size or (self.preprocessing.image_size,) * 2
        size = self.options.patch
        return TokenLayout.grid(height // size, width // size, (self.options.levels**self.options.digits,))

    def forward(self, images: Tensor) -> TokenizerOutput:
        check_images(images, self.preprocessing.channels)
        patches = nn.functional.unfold(images, self.options.patch, stride=self.options.patch).mT
        scaled = self.to_digits(patches) * (self.options.levels // 2)
        digits = scaled + (scaled.round() - scaled).detach()
        powers = self.options.levels ** torch.arange(self.options.digits, device=images.device)
        tokens = ((digits.detach().round().long() + self.options.levels // 2) * powers).sum(-1, keepdim=True)
        return TokenizerOutput(self._images(digits, (images.shape[2], images.shape[3])), tokens, {})

    def encode(self, images: Tensor) -> Tensor:
        output: TokenizerOutput = self(images)
        return output.tokens

    def decode(self, tokens: Tensor, layout: TokenLayout | None = None) -> Tensor:
        check_tokens(tokens, (self.options.levels**self.options.digits,))
        powers = self.options.levels ** torch.arange(self.options.digits, device=tokens.device)
        digits = tokens // powers % self.options.levels - self.options.levels // 2
        height, width = (layout or self.layout()).shape[0]
        return self._images(digits.float(), (height * self.options.patch, width * self.options.patch)).clamp(-1, 1)

    def _images(self, digits: Tensor, size: tuple[int, int]) -> Tensor:
        patches = self.to_pixels(digits / (self.options.levels // 2)).mT
        return nn.functional.fold(patches, size, self.options.patch, stride=self.options.patch)
