"""A frozen pretrained vision transformer and the features that losses and discriminators read from it.

Legend: B batch, H W pixels, D width, R registers, h w patch grid.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from smalti.core.backbones.pretrained import load_vit, vit_tensors
from smalti.core.backbones.vit_block import Activation, ViTBlock
from smalti.core.errors import UserError

HEAD_WIDTH = 64  # of every published DINO, DINOv2, CLIP and MAE


class VisionTransformer(nn.Module):
    """Patches, class token, registers, blocks and a last norm, with the names that `load_vit` gives.

    Args:
        weights: what `load_vit` returned; they decide the sizes and which parts there are.
        activation: of the hidden layers.
        eps: of the layer normalisations.
    """

    def __init__(self, weights: dict[str, Tensor], *, activation: Activation, eps: float) -> None:
        super().__init__()
        self.width, channels, self.patch_size, _ = weights["patch.weight"].shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        scaled = "blocks.0.scale1" in weights
        self.grid = round((weights["positions"].shape[1] - 1) ** 0.5)
        self.patch = nn.Conv2d(
            channels, self.width, self.patch_size, stride=self.patch_size, bias="patch.bias" in weights
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.registers = nn.Parameter(weights.get("registers", torch.zeros(1, 0, self.width)).clone())
        self.positions = nn.Parameter(torch.zeros(1, 1 + self.grid**2, self.width))
        self.norm_pre = nn.LayerNorm(self.width, eps=eps) if "norm_pre.weight" in weights else nn.Identity()
        self.blocks = nn.ModuleList(
            ViTBlock(
                self.width,
                self.width // HEAD_WIDTH,
                eps=eps,
                activation=activation,
                layer_scale=1.0 if scaled else None,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(self.width, eps=eps)
        self.load_state_dict({"registers": self.registers, "class_token": self.class_token, **weights})

    @property
    def image_size(self) -> int:
        """Side of the images it takes, in pixels."""
        return int(self.grid * self.patch_size)

    def forward(self, images: Tensor, depths: tuple[int, ...]) -> list[Tensor]:
        """Read the tokens at several depths.

        Args:
            images: normalised, `(B, 3, image_size, image_size)`.
            depths: numbers of blocks after which tokens are read, ascending, 0 to all of them; -1 stands for the
                last norm after all blocks.

        Returns:
            The tokens at each, `(B, 1 + h w, D)`, the class token first; registers are left out.
        """
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.positions
        registers = self.registers.shape[1]
        tokens = torch.cat([tokens[:, :1], self.registers.expand(len(tokens), -1, -1), tokens[:, 1:]], dim=1)
        tokens = self.norm_pre(tokens)
        found = [tokens] if 0 in depths else []
        for depth, block in enumerate(self.blocks, 1):
            if depth > max(depths) and -1 not in depths:
                break
            tokens = block(tokens)
            if depth in depths:
                found.append(tokens)
        if -1 in depths:
            found.append(self.norm(tokens))
        return [torch.cat([read[:, :1], read[:, 1 + registers :]], dim=1) for read in found]


def load_frozen_vit(
    source: str | Path,
    *,
    image_size: int,
    patch_size: int | None = None,
    activation: Activation = "gelu",
    eps: float = 1e-6,
) -> VisionTransformer:
    """A pretrained vision transformer of any size, for square images of `image_size` pixels.

    Args:
        source: a timm name, a hub repository or a path, see `load_vit`.
        image_size: positions are resampled to its grid.
        patch_size: the patch kernel is resampled to it; None keeps the source's.
        activation: that the source was trained with.
        eps: of its layer normalisations.

    Raises:
        UserError: the source cannot be had or is no plain ViT; the image cannot be cut into patches.
    """
    tensors = vit_tensors(str(source))
    kernel = tensors.get("patch_embed.proj.weight")
    if kernel is None:
        raise UserError(f"{source} holds no vision transformer: it lacks patch_embed.proj.weight")
    side = patch_size or kernel.shape[-1]
    if image_size % side:
        raise UserError(f"{source}: an image of {image_size} pixels cannot be cut into patches of {side}")
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    grid = (image_size // side, image_size // side)
    weights = load_vit(str(source), width=kernel.shape[0], depth=depth, patch_size=side, grid=grid)
    return VisionTransformer(weights, activation=activation, eps=eps)
