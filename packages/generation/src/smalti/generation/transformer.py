"""The transformer that all generators share: blocks in a row, for whole sequences and, with a cache, for new positions.

Legend: B batch, T positions, d width of a head, D width of the model, C width of the condition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smalti.generation.attention import Mask
from smalti.generation.blocks import Architecture, Block
from smalti.generation.cache import Cache
from smalti.generation.norms import Modulation

INITIAL_STD = 0.02


class Transformer(nn.Module):
    """Blocks in a row; what comes before and after is the generator's.

    Args:
        architecture: what the blocks compute.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        last = max(architecture.layers - 1, 1)
        self.blocks = nn.ModuleList(
            Block(architecture, architecture.drop_path * layer / last) for layer in range(architecture.layers)
        )
        if architecture.modulation == "shared":
            self.modulation = Modulation(architecture.condition_dim, architecture.dim, 6)

    def forward(
        self,
        x: Tensor,
        *,
        rotary: Tensor | None = None,
        mask: Mask = "causal",
        cache: Cache | None = None,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`.

        Args:
            x: `(B, T, D)`, the input of T positions in a row.
            rotary: `(T, d/2)`, the rotations of these positions, where the model has any.
            mask: what each position sees.
            cache: of `new_cache`; the T positions follow those in it.
            modulations: of `modulations`, where the architecture has any.
        """
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                rotary,
                mask,
                None if cache is None else cache.layers[layer],
                None if modulations is None else modulations[layer],
            )
        return x

    def modulations(self, condition: Tensor) -> list[Tensor] | None:
        """What the condition makes of each block, `(B, T or 1, 6, D)`; None where the architecture has no modulation.

        It does not depend on the tokens: sampling computes it once per image.

        Args:
            condition: `(B, T, C)`, or `(B, 1, C)` for all positions alike.
        """
        kind = self.architecture.modulation
        if kind == "none":
            return None
        if kind == "shared":
            shared: Tensor = self.modulation(condition)
            return [shared + block.get_parameter("modulation_table") for block in self.blocks]
        return [block.get_submodule("modulation")(condition) for block in self.blocks]

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` sequences of up to `capacity` positions."""
        shape = self.architecture
        return Cache(shape.layers, batch, shape.heads, capacity, shape.head_dim, next(self.parameters()))


class SkipTransformer(nn.Module):
    """Blocks whose outputs in the first half are joined to the inputs of the second (U-ViT, Bao et al. 2023).

    The last of the first half goes to the first of the second. All positions see each other.

    Args:
        architecture: what the blocks compute; there is one more, between the halves.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        half, dim = architecture.layers // 2, architecture.dim
        self.downward = nn.ModuleList(Block(architecture) for _ in range(half))
        self.middle = Block(architecture)
        self.upward = nn.ModuleList(Block(architecture) for _ in range(half))
        self.skips = nn.ModuleList(nn.Linear(2 * dim, dim) for _ in range(half))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        kept = []
        for block in self.downward:
            x = block(x)
            kept.append(x)
        x = self.middle(x)
        for block, skip in zip(self.upward, self.skips, strict=True):
            x = block(skip(torch.cat([x, kept.pop()], dim=-1)))
        return x


def initialise(module: nn.Module, std: float = INITIAL_STD) -> None:
    """Draw every linear and embedding weight below `module` from normal(0, std); biases become 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def initialise_modulation(module: nn.Module, gates: float, others: float) -> None:
    """Multiply the initial weights of every `Modulation` below `module`: its gates by one factor, the rest by another.

    Small gates let a deep model begin near the identity (AdaLN-zero, Peebles and Xie 2023, where both are 0).
    """
    for part in module.modules():
        if isinstance(part, Modulation):
            gated = 2 if part.parts == 6 else 0
            weight = part.linear.weight.data.unflatten(0, (part.parts, -1))
            weight[:gated].mul_(gates)
            weight[gated:].mul_(others)
