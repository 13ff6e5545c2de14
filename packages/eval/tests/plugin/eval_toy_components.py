from typing import Literal

import torch
import torch.nn.functional as F

from smalti.core.contracts import Features, Generator, Tokenizer, TokenizerOutput
from smalti.core.layout import TokenLayout
from smalti.core.noise import uniform
from smalti.core.options import FeaturesOptions, GeneratorOptions, Preprocessing, TokenizerOptions

LEVELS = 16


class TilesOptions(TokenizerOptions):
    name: Literal["tiles"] = "tiles"
    preprocessing: Preprocessing = Preprocessing(image_size=16, channels=1, fit="pad")
    tile: int = 2

    def build(self):
        return Tiles(self)


class Tiles(Tokenizer):
    """One token per tile: its mean, rounded to one of 16 levels."""

    def __init__(self, options):
        super().__init__()
        self.options = options
        self.register_buffer("levels", torch.linspace(-1, 1, LEVELS))

    def layout(self, image_size=None):
        side = self.preprocessing.image_size // self.options.tile
        return TokenLayout.grid(side, side, (LEVELS,))

    def encode(self, images):
        means = F.avg_pool2d(images.mean(1, keepdim=True), self.options.tile).flatten(1)
        return ((means + 1) / 2 * (LEVELS - 1)).round().long()[..., None]

    def decode(self, tokens, layout=None):
        (height, width) = (layout or self.layout()).shape[0]
        images = self.levels[tokens[..., 0]].view(-1, 1, height, width)
        images = images.expand(-1, self.preprocessing.channels, -1, -1)
        return F.interpolate(images, scale_factor=self.options.tile)

    def forward(self, images):
        tokens = self.encode(images)
        return TokenizerOutput(self.decode(tokens), tokens, {})


class UniformOptions(GeneratorOptions):
    name: Literal["uniform"] = "uniform"

    def supports(self, layout):
        return None if layout.streams == 1 else "it models one stream"

    def build(self, layout, classes):
        return Uniform(self, layout, classes)


class Uniform(Generator):
    def loss(self, tokens, labels):
        return {}

    def sample(self, labels, settings, indices=None):
        indices = torch.arange(len(labels)) if indices is None else indices
        noise = uniform(settings.seed, indices, 0, self.token_layout.positions)
        return (noise * self.token_layout.vocab[0]).long()[..., None]


class SmallNetworkOptions(FeaturesOptions):
    name: Literal["small-network"] = "small-network"
    seed: int = 0

    def build(self):
        return SmallNetwork(self.seed)


class SmallNetwork(Features):
    """Features of six and four numbers, of images of any size; float64, so that no batch size changes them."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("kernel", torch.randn(6, 3, 3, 3, generator=generator).double() / 5)
        self.register_buffer("classes", torch.randn(4, 6, generator=generator).double())
        self.fingerprint = f"small-{seed}"

    def forward(self, images):
        maps = F.relu(F.conv2d(images.movedim(-1, 1).double() / 127.5 - 1, self.kernel, stride=2))
        pool = maps.mean((2, 3))
        return {"pool": pool, "spatial": maps[:, :1, :2, :2].flatten(1), "logits": pool @ self.classes.T}


class PixelsOptions(FeaturesOptions):
    name: Literal["pixels"] = "pixels"
    width: int = 2048

    def build(self):
        return PixelFeatures(self.width)


class PixelFeatures(Features):
    """As many features as Inception has, of an 8 x 8 corner of the image, so that 50,000 images take seconds."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("kernel", torch.randn(192, width, generator=torch.Generator().manual_seed(0)) / 14)
        self.fingerprint = f"pixels-{width}"

    def forward(self, images):
        pool = F.relu((images[:, :8, :8].flatten(1).float() / 127.5 - 1) @ self.kernel)
        return {"pool": pool, "logits": pool[:, :10]}
