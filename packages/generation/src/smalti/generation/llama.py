"""Options of generators with LlamaGen's blocks (Sun et al. 2024)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.core.options import GeneratorOptions
from smalti.generation.blocks import Architecture
from smalti.generation.rotary import rotary_table


class LlamaOptions(GeneratorOptions):
    """What generators with LlamaGen's blocks have in common; the defaults are its GPT-B.

    Args:
        layers: blocks.
        dim: width of the model.
        heads: of attention; their width, dim / heads, must be divisible by 4.
        ffn_multiple: the feed-forward is 8/3 dim wide, rounded up to a multiple of this.
        token_dropout: of the input sequence.
        dropout: after both branches of every block.
        drop_path: chance to leave out a branch of the last block, per sample, rising linearly from 0 at the first
            (stochastic depth, Huang et al. 2016).
        label_dropout: chance to train a sample under the null class, which guidance needs.
        rotary_base: of the frequencies of the rotary embedding.
        norm_eps: of all norms.
    """

    layers: Annotated[int, Field(ge=1)] = 12
    dim: Annotated[int, Field(ge=4)] = 768
    heads: Annotated[int, Field(ge=1)] = 12
    ffn_multiple: Annotated[int, Field(ge=1)] = 256
    token_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    rotary_base: Annotated[float, Field(gt=0)] = 10_000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5

    @field_validator("heads")
    @classmethod
    def _fits_dim(cls, heads: int, info: ValidationInfo) -> int:
        dim = info.data.get("dim")
        if dim is not None and dim % (4 * heads):
            raise ValueError(f"dim {dim} must be a multiple of 4 times the number of heads")
        return heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward."""
        return -(-(8 * self.dim // 3) // self.ffn_multiple) * self.ffn_multiple

    def rotary(self, layout: TokenLayout, device: torch.device, prefix: int = 1, repeats: int = 1) -> Tensor:
        """The table of rotations, as of `rotary_table`."""
        return rotary_table(layout, self.head_dim, self.rotary_base, prefix=prefix, repeats=repeats, device=device)

    def architecture(self, layers: int) -> Architecture:
        """That of a stack of `layers` blocks."""
        return Architecture(
            layers=layers,
            dim=self.dim,
            heads=self.heads,
            ffn_dim=self.ffn_dim,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            drop_path=self.drop_path,
        )
