"""Files of random weights in the place of pretrained ones, for trying out a recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.core.files import atomic_folder, atomic_write
from smalti.core.layout import TokenLayout

IMAGE_SIZE = 32
WIDTH = 64  # of transformers: one head of the published width
DEPTH = 2
CODES = 64
TEXT_TOKENS = 8

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,-"

Shapes = dict[str, tuple[int, ...]]
Data = dict[str, Any]

VECTORS: Data = {"name": "vq", "dim": 8, "codebook_size": CODES}
ONE_LAYER: Data = {"name": "titok", "width": WIDTH, "layers": 1, "heads": 1, "tokens": 4, "grid": [2, 2]}
SEQUENCE: Data = {
    "encoder": {**ONE_LAYER, "patch": IMAGE_SIZE // 2},
    "decoder": {**ONE_LAYER, "head": {"name": "pixels", "patch": IMAGE_SIZE // 2}},
}


class RandomNetworks:
    """Files of random weights that stand in the place of pretrained ones, made when they are needed."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder.absolute(), say
        self._told: set[str] = set()

    def tell(self, what: str) -> None:
        """Say something once."""
        if what not in self._told:
            self._told.add(what)
            self.say(f"shrunk: {what}")

    def lpips(self) -> tuple[str, str]:
        """Files of VGG16, which has one size only, and of the linear layers of LPIPS."""
        from smalti.core.losses.vgg import VGG16, WIDTHS

        self.tell("VGG16 is random")
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in VGG16().state_dict().items()}
        heads: Shapes = {f"lin{number}.model.1.weight": (1, width, 1, 1) for number, width in enumerate(WIDTHS)}
        return self._file("vgg16", shapes), self._file("lpips", heads, positive=True)

    def vit(self, patch: int) -> str:
        """A vision transformer under timm's names, for patches of `patch` pixels."""
        self.tell("pretrained vision transformers are random")
        shapes: Shapes = {
            "cls_token": (1, 1, WIDTH),
            "pos_embed": (1, 1 + (IMAGE_SIZE // patch) ** 2, WIDTH),
            "patch_embed.proj.weight": (WIDTH, 3, patch, patch),
            "patch_embed.proj.bias": (WIDTH,),
            "norm.weight": (WIDTH,),
            "norm.bias": (WIDTH,),
        }
        layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for block in range(DEPTH):
            for layer, (outputs, inputs) in layers.items():
                shapes[f"blocks.{block}.{layer}.weight"] = (outputs * WIDTH, inputs * WIDTH)
                shapes[f"blocks.{block}.{layer}.bias"] = (outputs * WIDTH,)
            for norm in ("norm1", "norm2"):
                shapes[f"blocks.{block}.{norm}.weight"] = shapes[f"blocks.{block}.{norm}.bias"] = (WIDTH,)
        return self._file(f"vit-patch{patch}", shapes)

    def tokenizer(self, grid: int) -> str:
        """A folder with a tokenizer of `grid` x `grid` tokens, for the loss of proxy codes."""
        self.tell("the tokenizer of the proxy codes is random")
        return self._tokenizer(f"tokenizer-{grid}", _convolutions(grid), VECTORS)

    def published(self, layout: TokenLayout | None) -> str:
        """A folder with a tokenizer whose tokens are like those of `layout`, fewer and of fewer codes; None: a grid."""
        self.tell("the published tokenizer is random")
        if layout is None:
            layout = TokenLayout.grid(2, 2, (CODES,))
        quantizer: Data = VECTORS
        if layout.kind == "scales":
            quantizer = {"name": "multi-scale", "scales": small_scales(layout.shape), "quantizer": quantizer}
        if layout.streams > 1:
            quantizer = {"name": "product", "quantizers": [quantizer], "branches": layout.streams}
        networks = SEQUENCE if layout.kind == "sequence" else _convolutions(2)
        return self._tokenizer(f"{layout.kind}-{len(layout.shape)}-{layout.streams}", networks, quantizer)

    def _tokenizer(self, name: str, networks: Data, quantizer: Data) -> str:
        from smalti.core.contracts import Tokenizer

        options = {"name": "composed", "preprocessing": {"image_size": IMAGE_SIZE}, **networks, "quantizer": quantizer}
        path = self.folder / name
        if not path.exists():
            torch.manual_seed(0)
            with atomic_folder(path) as new:
                Tokenizer.from_config({"kind": "tokenizer", "options": options}).save_pretrained(new)
        return str(path)

    def text_encoder(self) -> str:
        """A folder with the text half of a CLIP that reads letters."""
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        self.tell("the encoder of texts is random")
        path = self.folder / "clip-text"
        if not path.exists():
            ends = ["<|startoftext|>", "<|endoftext|>"]
            words = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), *ends]
            vocabulary = {word: number for number, word in enumerate(words)}
            torch.manual_seed(0)
            tower = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(words),
                    hidden_size=WIDTH,
                    intermediate_size=2 * WIDTH,
                    num_hidden_layers=DEPTH,
                    num_attention_heads=1,
                    max_position_embeddings=TEXT_TOKENS,
                    bos_token_id=len(words) - 2,
                    eos_token_id=len(words) - 1,
                )
            )
            with atomic_folder(path) as new:
                tower.save_pretrained(new)
                CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(new)
        return str(path)

    def _file(self, name: str, shapes: Shapes, *, positive: bool = False) -> str:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            generator = torch.Generator().manual_seed(0)
            tensors = {key: _random(key, shape, generator) for key, shape in shapes.items()}
            if positive:
                tensors = {key: tensor.abs() for key, tensor in tensors.items()}
            with atomic_write(path) as file:
                torch.save(tensors, file)
        return str(path)


def small_scales(scales: Sequence[Sequence[int]], last: int = 2) -> list[list[int]]:
    """As many scales, in the same order, up to a grid of `last` x `last`."""
    longest = max(scales[-1])
    return [[max(1, last * side // longest) for side in scale] for scale in scales]


def _convolutions(grid: int) -> Data:
    """An encoder and a decoder with a latent of `grid` x `grid`."""
    sizes = {"widths": [8] * round(math.log2(IMAGE_SIZE / grid)), "blocks": 1, "groups": 4}
    return {part: {"name": "cnn", **sizes} for part in ("encoder", "decoder")}


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what passes through them; in half the bytes, since only their size matters."""
    if len(shape) == 1:
        ones = "norm" in name and name.endswith("weight")
        return torch.full(shape, float(ones), dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))).to(torch.bfloat16)
