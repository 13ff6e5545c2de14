"""The contracts through which the parts of smalti meet.

Legend: B batch, C channels, H W pixels, h w latent grid, L token positions, S streams, D latent width,
K codes of a stream. Images are float tensors `(B, C, H, W)` in [-1, 1]; latents are channel-last,
`(B, *space, D)`; tokens are int64 `(B, L, S)`, also for S = 1. Every dictionary of losses holds terms that
are already weighted: their sum is what training minimises.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from smalti.core.captions import CaptionOptions
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import (
    DecoderOptions,
    EncoderOptions,
    GeneratorOptions,
    Options,
    Preprocessing,
    QuantizerOptions,
    Slot,
    TokenizerOptions,
)
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.weights import Pretrained, validated


class Quantized(NamedTuple):
    """What a quantizer makes of a latent.

    `latent` `(B, *space, D)` carries gradients to the input by the quantizer's estimator; `tokens` is
    `(B, L, S)`; `losses` are scalar terms, weighted, empty in evaluation mode.
    """

    latent: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]


class Quantizer(nn.Module, ABC):
    """Latents to tokens and back.

    `decode(tokens, space)` returns exactly the `latent` that `forward` gave for these tokens in evaluation
    mode. Search and updates run in float32 under autocast; statistics are all-reduced, so that replicas
    never diverge; without training mode nothing is updated.

    Attributes:
        options: what it was built from.
        dim: D, the latent width it takes.
        vocab: K of each stream.
    """

    options: QuantizerOptions
    dim: int
    vocab: tuple[int, ...]

    @abstractmethod
    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`."""

    @abstractmethod
    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Tokens `(B, L, S)` to the latent `(B, *space, D)`."""

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The layout of tokens over a latent of `space`: a grid for two axes, a sequence for one."""
        if len(space) == 1:
            return TokenLayout.sequence(space[0], self.vocab)
        if len(space) == 2:
            return TokenLayout.grid(space[0], space[1], self.vocab)
        raise UserError(f"a latent has one or two axes of space, got {space}")

    def codes(self, tokens: Tensor, scale: int) -> Tensor:
        """The vectors of tokens of one scale, for quantizers whose layout has scales.

        Args:
            tokens: int64 `(B, N, S)`, any N.
            scale: k, from 0.

        Returns:
            `(B, N, D)` float32, or wider.

        Raises:
            UserError: its tokens are no scales.
        """
        del tokens, scale
        raise UserError(f"the quantizer {self.options.name!r} does not go from scale to scale")

    def advance(self, total: Tensor | None, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """Take in one more scale, as sampling does, for quantizers whose layout has scales.

        Args:
            total: latent `(B, h, w, D)` after the scales before; None at scale 0.
            codes: `(B, p_k, D)` of all positions of this scale.
            scale: k, from 0.

        Returns:
            The latent after this scale, and the latent so far averaged down to the next scale's grid
            `(B, p_(k+1), D)`, from which a generator predicts that scale (VAR); None after the last.

        Raises:
            UserError: its tokens are no scales.
        """
        del total, codes, scale
        raise UserError(f"the quantizer {self.options.name!r} does not go from scale to scale")


class Encoder(nn.Module, ABC):
    """Images `(B, C, H, W)` in [-1, 1] to a latent `(B, *space, width)`."""

    options: EncoderOptions
    width: int

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Encode."""

    @abstractmethod
    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The `space` of the latent of an image of `(H, W)`; a `UserError` where that size cannot be taken."""


class Decoder(nn.Module, ABC):
    """A latent `(B, *space, width)` to images `(B, C, H, W)`, about [-1, 1], not clamped."""

    options: DecoderOptions
    width: int

    @abstractmethod
    def forward(self, latent: Tensor) -> Tensor:
        """Decode."""


@dataclass(frozen=True)
class TokenizerOutput:
    """What a tokenizer makes of images in training.

    `images` `(B, C, H, W)` are the reconstructions with gradients; `tokens` `(B, L, S)`; `losses` weighted
    scalar terms of the quantizer; `features` whatever further losses need, by name.
    """

    images: Tensor
    tokens: Tensor
    losses: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)


Drawing = Callable[[Tensor, TokenLayout, tuple[int, int]], Tensor]
"""Tokens `(B, L, S)` of a layout to pictures of the given rows and columns, uint8 `(B, 3, rows, columns)`."""


class Tokenizer(nn.Module, Pretrained, ABC):
    """Images to tokens and back. Subclass it, or compose one from encoder, quantizer and decoder."""

    kind = "tokenizer"
    options: TokenizerOptions

    @property
    def preprocessing(self) -> Preprocessing:
        """How image files become the tensors it was trained on."""
        return self.options.preprocessing

    @property
    def drawings(self) -> Mapping[str, Drawing]:
        """Ways to show what tokens stand for, by name, for `smalti reconstruct --draw`; most tokenizers have none."""
        return {}

    @property
    def codebooks(self) -> int:
        """How many of the first streams are codes, whose use tells of collapse; others are numbers, as of geometry."""
        return self.layout().streams

    @abstractmethod
    def layout(self, image_size: tuple[int, int] | None = None) -> TokenLayout:
        """The layout of the tokens of an image of `(H, W)`, by default of the preprocessing's size."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to tokens `(B, L, S)`."""

    @abstractmethod
    def decode(self, tokens: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """Tokens `(B, L, S)` to images in [-1, 1], clamped; `layout` where it is not the default one."""

    @abstractmethod
    def forward(self, images: Tensor) -> TokenizerOutput:
        """Encode, quantize and decode, with losses."""

    def config(self) -> dict[str, Any]:
        """What `config.json` holds beside the weights."""
        return {"kind": self.kind, "options": self.options.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it from what `config()` gave."""
        return validated(_TokenizerConfig, config).options.build()  # type: ignore[return-value]


class Generator(nn.Module, Pretrained, ABC):
    """Draws the tokens of an image of a class.

    Attributes:
        options: what it was built from.
        token_layout: the layout of the tokens it models.
        classes: labels lie in `[0, classes)`.
        captions: what it takes in the place of labels; None where it takes labels.
    """

    kind = "generator"
    options: GeneratorOptions
    captions: CaptionOptions | None = None

    def __init__(self, options: GeneratorOptions, layout: TokenLayout, classes: int) -> None:
        super().__init__()
        check_supports(options, layout)
        if classes < 1:
            raise UserError(f"a generator needs at least one class, got {classes}")
        self.options = options
        self.token_layout = layout
        self.classes = classes

    def attach(self, tokenizer: Tokenizer) -> None:
        """Take from the tokenizer what is needed of it beside tokens, which `save_pretrained` then saves too.

        Most generators need nothing. Whoever pairs a generator with a tokenizer calls it.
        """
        del tokenizer

    def begin_step(self, step: int) -> None:
        """Told before every training step which one it is, from 0; most generators learn alike in all of them."""
        del step

    @abstractmethod
    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Weighted terms for tokens `(B, L, S)` of images with labels `(B,)`."""

    @abstractmethod
    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, S)` for labels `(B,)`.

        `indices` `(B,)` number the samples within the whole run (default 0, 1, ...): sample i takes its
        noise from `(settings.seed, i, step)`, see `smalti.core.noise`.
        """

    def sample_traced(
        self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `sample`, and the step at which each position got its tokens, int64 `(B, L)`, from 0.

        By default that is one position after the other, and of scales one scale after the other.
        """
        tokens, layout = self.sample(labels, settings, indices), self.token_layout
        sizes = [math.prod(grid) for grid in layout.shape] if layout.kind == "scales" else [1] * layout.positions
        steps = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(tokens.device)
        return tokens, steps.expand(len(tokens), -1)

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss`, so that wrappers which hook into `forward` (DDP, FSDP) see the training step."""
        return self.loss(tokens, labels)

    def config(self) -> dict[str, Any]:
        """What `config.json` holds beside the weights."""
        return {
            "kind": self.kind,
            "options": self.options.model_dump(mode="json"),
            "layout": self.token_layout.model_dump(mode="json"),
            "classes": self.classes,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it from what `config()` gave."""
        checked = validated(_GeneratorConfig, config)
        return checked.options.build(checked.layout, checked.classes)  # type: ignore[return-value]


class Features(nn.Module, ABC):
    """Images to named feature tensors, for metrics.

    `fingerprint` identifies weights and preprocessing; results carry it.
    """

    fingerprint: str

    @abstractmethod
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 `(B, H, W, 3)` to features, e.g. `{"pool": (B, D), "logits": (B, classes)}`."""


@dataclass(frozen=True)
class PairMetric:
    """A number for every image against its reference.

    `compute` takes images and references, both uint8 `(B, C, H, W)`, and gives `(B,)`; `definition` says exactly what
    that is.
    """

    unit: str
    definition: str
    compute: Callable[[Tensor, Tensor], Tensor]


class _TokenizerConfig(Options):
    kind: Literal["tokenizer"]
    options: Annotated[TokenizerOptions, Slot("tokenizer")]


class _GeneratorConfig(Options):
    kind: Literal["generator"]
    options: Annotated[GeneratorOptions, Slot("generator")]
    layout: TokenLayout
    classes: int


def check_supports(options: GeneratorOptions, layout: TokenLayout) -> None:
    """Raise a `UserError` with the reason where a generator with these options cannot take the layout."""
    reason = options.supports(layout)
    if reason is not None:
        raise UserError(f"generator {options.name!r} cannot take the layout {layout}: {reason}")


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise a `UserError` that names the first label outside `[0, classes)`."""
    outside = (labels < 0) | (labels >= classes)
    if bool(outside.any()):
        first = int(labels[outside][0])
        raise UserError(f"label {first} is out of range: there are {classes} classes, 0 to {classes - 1}")


def check_images(images: Tensor, channels: int) -> None:
    """Raise a `UserError` unless `images` is a float `(B, channels, H, W)`."""
    if images.ndim != 4 or images.shape[1] != channels or not torch.is_floating_point(images):
        raise UserError(
            f"images must be float (B, {channels}, H, W) in [-1, 1], got {images.dtype} {tuple(images.shape)}"
        )


def check_pixels(images: Tensor) -> None:
    """Raise a `UserError` unless `images` is uint8 `(B, H, W, 3)`, as networks that judge images take them."""
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
        raise UserError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {tuple(images.shape)}")


def grid_of(image_size: tuple[int, int], step: int) -> tuple[int, int]:
    """`(H / step, W / step)` of an image; a `UserError` unless both sides are multiples of the step."""
    height, width = image_size
    if any(side < 1 or side % step for side in image_size):
        raise UserError(f"an image of {height}x{width} cannot be encoded: both sides must be multiples of {step}")
    return height // step, width // step


def check_latent(latent: Tensor, decoder: str, width: int, axes: Literal["h, w", "N"] = "h, w") -> None:
    """Raise a `UserError` that names the decoder unless `latent` is `(B, h, w, width)`, or `(B, N, width)`."""
    if latent.ndim != axes.count(",") + 3 or latent.shape[-1] != width:
        raise UserError(f"the {decoder} decoder takes a latent (B, {axes}, {width}), got {tuple(latent.shape)}")


def check_tokens(tokens: Tensor, vocab: tuple[int, ...]) -> None:
    """Raise a `UserError` unless `tokens` is int64 `(B, L, S)` with stream s in `[0, vocab[s])`."""
    if tokens.ndim != 3 or tokens.shape[-1] != len(vocab) or tokens.dtype != torch.int64:
        raise UserError(f"tokens must be int64 (B, L, {len(vocab)}), got {tokens.dtype} {tuple(tokens.shape)}")
    if tokens.numel() == 0 or torch.compiler.is_compiling():
        return  # values cannot be looked at within a compiled graph
    lowest, highest = (bound.tolist() for bound in torch.aminmax(tokens.reshape(-1, len(vocab)), dim=0))
    for stream, size in enumerate(vocab):
        if lowest[stream] < 0 or highest[stream] >= size:
            wrong = lowest[stream] if lowest[stream] < 0 else highest[stream]
            raise UserError(
                f"token {wrong} of stream {stream} is out of range: there are {size} codes, 0 to {size - 1}"
            )
