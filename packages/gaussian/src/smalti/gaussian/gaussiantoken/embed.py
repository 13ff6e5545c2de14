"""From a feature map to Gaussians: the embedding of GaussianToken (Dong et al. 2025, arXiv 2501.15619).

Legend: B images, H W feature map, C its channels, N Gaussians of an image, A entries of an anchor, E width, Z channels
of a Gaussian's feature, G numbers of its geometry.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.options import Options
from smalti.gaussian.gaussians import Gaussians
from smalti.gaussian.gaussiantoken.embed_layers import Count, DeformableStackOptions, MapLayer, perceptron, scaled_head
from smalti.gaussian.gaussiantoken.falling_bound import FallingBound
from smalti.gaussian.gaussiantoken.geometry import GEOMETRY, unit
from smalti.gaussian.gaussiantoken.lifter import Lifter, Positions
from smalti.gaussian.gaussiantoken.operations import (
    AttentionOptions,
    FeedForward,
    FeedForwardOptions,
    GaussianAttention,
    Refinement,
    centres,
)
from smalti.gaussian.gaussiantoken.sparse_convolution import SparseConvolution, SparseConvolutionOptions

Operation = Literal["attention", "feed-forward", "refine", "sparse-convolution"]


class GaussianEmbedOptions(Options):
    """Options of `GaussianEmbed`.

    Args:
        gaussians: N.
        width: E, a multiple of 32.
        positions: see `Lifter`.
        encoder: the layers in which places of the feature map look at each other.
        operations: what is done in turn, with `attention` among it; the last one is `refine`, and after attention that
            concatenates comes `feed-forward`.
        share: operations of one name are the same module.
        attention: see `AttentionOptions`.
        feed_forward: see `FeedForwardOptions`.
        sparse_convolution: see `SparseConvolutionOptions`.
        moved: how many of an anchor's first entries (x, y, rotation, two scales, perhaps opacity, features) refinement
            adds to; it makes the others anew.
        opacity: Gaussians have one each.
        learn_anchors: the first anchors are weights.
        learn_features: the features that Gaussians begin with are weights; else they are 0.
        centres: range of x and y, where the feature map is [-1, 1].
        scales: smallest and, at first, largest standard deviation in places of the feature map.
        final_scale: what the largest one falls to in training.
    """

    gaussians: Count = 256
    width: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    positions: Positions = "sine"
    encoder: DeformableStackOptions = DeformableStackOptions()
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)] = ("attention", "feed-forward", "refine") * 3
    share: bool = False
    attention: AttentionOptions = AttentionOptions()
    feed_forward: FeedForwardOptions = FeedForwardOptions()
    sparse_convolution: SparseConvolutionOptions = SparseConvolutionOptions()
    moved: Annotated[int, Field(ge=0)] = 2
    opacity: bool = False
    learn_anchors: bool = True
    learn_features: bool = False
    centres: tuple[float, float] = (-1.0, 1.0)
    scales: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 4.0)
    final_scale: Annotated[float, Field(gt=0)] = 3.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for part in (self.encoder, self.attention):
            if self.width % part.heads:
                raise ValueError(f"width {self.width} cannot be divided among {part.heads} heads")
        if self.operations[-1] != "refine":
            raise ValueError(f"the last operation must be refine, got {self.operations[-1]}")
        if "attention" not in self.operations:
            raise ValueError("operations need attention, nothing else looks at the feature map")
        for operation, width in zip(self.operations, self.widths, strict=True):
            if operation != "feed-forward" and width != self.width:
                raise ValueError(
                    f"{operation} takes features of width {self.width}, but they are concatenated to {width} there: "
                    "put feed-forward before it, or give attention the shortcut add"
                )
        if self.moved > self.entries:
            raise ValueError(f"moved is {self.moved}, but an anchor has {self.entries} entries")
        if self.centres[0] >= self.centres[1]:
            raise ValueError(f"centres must be a range, got {self.centres}")
        if not self.scales[0] < self.final_scale <= self.scales[1]:
            raise ValueError(f"final_scale must lie within scales {self.scales}, got {self.final_scale}")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the features that come into each operation."""
        widths = [self.width]
        for operation in self.operations:
            if operation == "attention" and self.attention.shortcut == "concatenate":
                widths.append(2 * widths[-1])
            else:
                widths.append(self.width)
        return tuple(widths[:-1])

    @property
    def numbers(self) -> int:
        """G."""
        return GEOMETRY + self.opacity

    @property
    def entries(self) -> int:
        """A."""
        return self.numbers + self.width

    def build(self, inputs: int, features: int) -> GaussianEmbed:
        """Build it for feature maps of `inputs` channels, C, and Gaussians that carry `features`, Z."""
        return GaussianEmbed(self, inputs, features)


class Embedded(NamedTuple):
    """What a feature map becomes: its Gaussians, and their geometry `(B, N, G)`, in [0, 1], that these were made of."""

    gaussians: Gaussians
    geometry: Tensor


class AnchorEncoder(nn.Module):
    """Anchors to embeddings: a perceptron for each part of an anchor, their sum, and one more."""

    def __init__(self, width: int, *, opacity: bool) -> None:
        super().__init__()
        self.sizes = [2, 1, 2, *([1] if opacity else []), width]  # x and y, rotation, scales, opacity, features
        self.parts = nn.ModuleList(_embedder(size, width) for size in self.sizes)
        self.out = _embedder(width, width)

    def forward(self, anchors: Tensor) -> Tensor:
        """`(B, N, A)` to `(B, N, E)`."""
        parts = anchors.split(self.sizes, dim=-1)
        summed = torch.stack([embed(part) for embed, part in zip(self.parts, parts, strict=True)]).sum(0)
        result: Tensor = self.out(summed)
        return result


class GaussianEmbed(nn.Module):
    """Learned Gaussians that look at a feature map, and move, in turn.

    Everything runs in float32, also under autocast.

    Args:
        options: of it.
        inputs: C.
        features: Z.

    Attributes:
        anchors: `(N, A)`, the first ones.
        instances: `(N, E)`, the features that Gaussians begin with.
        limit: the largest scale, which falls in training.
    """

    anchors: Tensor
    instances: Tensor

    def __init__(self, options: GaussianEmbedOptions, inputs: int, features: int) -> None:
        super().__init__()
        self.options = options
        width = options.width
        self.lifter = Lifter(inputs, width, options.positions)
        self.encoder = nn.ModuleList(MapLayer(width, options.encoder) for _ in range(options.encoder.layers))
        self.operations = nn.ModuleList()
        self._keep("anchors", _first_anchors(options), learned=options.learn_anchors)
        instances = torch.zeros(options.gaussians, width)
        if options.learn_features:
            nn.init.xavier_uniform_(instances)
        self._keep("instances", instances, learned=options.learn_features)
        self.anchor_encoder = AnchorEncoder(width, opacity=options.opacity)
        made: dict[object, nn.Module] = {}
        for index, kind in enumerate(zip(options.operations, options.widths, strict=True)):
            key = kind if options.share else index
            if key not in made:
                made[key] = _operation(*kind, options)
            self.operations.append(made[key])
        self.to_features = scaled_head(width, features)
        lowest, highest = options.scales
        self.limit = FallingBound(highest, options.final_scale, lowest=lowest)

    def forward(self, features: Tensor) -> Embedded:
        """A feature map `(B, H, W, C)` to Gaussians on a map of that size; in training the largest scale falls."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(self.lifter.norm.weight)
            height, width = features.shape[1:3]
            memory = self._memory(features)
            anchors = self._refined(memory, (height, width))
            geometry = _geometry(anchors, self.options.numbers)
            gaussians = self.gaussians(geometry, self.to_features(anchors[..., self.options.numbers :]))
            if self.training:
                self.limit.update(gaussians.scales.mean())
            return Embedded(gaussians, geometry)

    def gaussians(self, geometry: Tensor, features: Tensor) -> Gaussians:
        """Gaussians of a geometry `(B, N, G)`: x, y, two scales, angle, perhaps opacity, each in [0, 1].

        Args:
            geometry: see above.
            features: `(B, N, Z)`, what they carry.
        """
        (left, right), lowest = self.options.centres, self.options.scales[0]
        means = left + (right - left) * geometry[..., :2]
        scales = lowest + (self.limit.bound - lowest) * geometry[..., 2:4]
        opacities = geometry[..., 5] if self.options.opacity else torch.ones_like(geometry[..., 4])
        return Gaussians(means, scales, math.pi * geometry[..., 4], features, opacities)

    def _memory(self, features: Tensor) -> Tensor:
        """A feature map `(B, H, W, C)` as its Gaussians see it, `(B, H W, E)`."""
        shape = (features.shape[1], features.shape[2])
        memory: Tensor = self.lifter(features)
        positions = self.lifter.positions(*shape)
        reference = _places(*shape, like=memory).expand(len(memory), -1, -1)
        for layer in self.encoder:
            memory = layer(memory, positions, reference, shape)
        return memory

    def _refined(self, memory: Tensor, shape: tuple[int, int]) -> Tensor:
        """The anchors `(B, N, A)` after all operations, for the `memory` of a map of `shape` (H, W)."""
        features = self.instances.expand(len(memory), -1, -1)
        anchors = self.anchors.expand(len(memory), -1, -1)
        embedding = self.anchor_encoder(anchors)
        last = len(self.operations) - 1
        for index, operation in enumerate(self.operations):
            match operation:
                case GaussianAttention():
                    features = operation(features, embedding, centres(anchors), memory, shape)
                case FeedForward():
                    features = operation(features)
                case SparseConvolution():
                    features = operation(features, centres(anchors), *shape)
                case Refinement():
                    anchors = operation(features, embedding, anchors)
                    if index < last:
                        embedding = self.anchor_encoder(anchors)
        return anchors

    def _keep(self, name: str, value: Tensor, *, learned: bool) -> None:
        """Under `name`, as a weight or as a buffer."""
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)


def _embedder(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(*perceptron(inputs, width, linear=1, repeated=2))


def _operation(operation: Operation, inputs: int, options: GaussianEmbedOptions) -> nn.Module:
    width = options.width
    match operation:
        case "attention":
            return GaussianAttention(width, options.attention)
        case "feed-forward":
            return FeedForward(inputs, width, options.feed_forward)
        case "refine":
            return Refinement(width, options.entries, options.moved)
        case "sparse-convolution":
            return SparseConvolution(width, options.sparse_convolution)


def _first_anchors(options: GaussianEmbedOptions) -> Tensor:
    """Random places, angles and scales, an opacity of 0.1, and features from the normal distribution."""
    anchors = torch.randn(options.gaussians, options.entries)
    anchors[:, :GEOMETRY] = torch.rand(options.gaussians, GEOMETRY).logit(1e-4)
    if options.opacity:
        anchors[:, GEOMETRY] = math.log(0.1 / 0.9)
    return anchors


def _geometry(anchors: Tensor, numbers: int) -> Tensor:
    """The geometry `(B, N, G)` of anchors `(B, N, A)`, which have the angle before the scales."""
    x, y, angle, first, second, *opacity = unit(anchors[..., :numbers]).unbind(-1)
    return torch.stack([x, y, first, second, angle, *opacity], dim=-1)


def _places(height: int, width: int, like: Tensor) -> Tensor:
    """The middles `(H W, 2)` of the places of a map, x and y in [0, 1], row by row."""
    rows = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    columns = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    return torch.stack([columns.repeat(height), rows.repeat_interleave(width)], dim=-1)
