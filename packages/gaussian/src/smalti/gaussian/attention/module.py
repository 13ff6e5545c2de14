"""Deformable attention as a module: GaussianToken's variant, with one more point per level that never learns.

Legend: B batch, Q queries, E width, M heads, L levels, P learnt points of a level, S positions of all levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.gaussian.attention.deformable import multi_scale_deformable_attention


class DeformableAttention(nn.Module):
    """Every query reads feature maps at points around a reference of its own (arXiv 2010.04159, section 4.1).

    As in GaussianToken (arXiv 2501.15619), each head has P + 1 points per level: the first is at the offset
    `fixed_offsets`, a buffer, zero in new models and random in published ones. It runs in float32 under autocast.

    Args:
        dim: E, a multiple of the heads.
        heads: M.
        levels: L.
        points: P, at least 1.

    Raises:
        UserError: a size below 1, or a width that is no multiple of the heads.
    """

    fixed_offsets: Tensor

    def __init__(self, dim: int, *, heads: int = 4, levels: int = 1, points: int = 4) -> None:
        super().__init__()
        if min(dim, heads, levels, points) < 1 or dim % heads:
            raise UserError(
                f"deformable attention needs a width that its heads divide, at least one level and one point, got "
                f"dim={dim}, heads={heads}, levels={levels}, points={points}"
            )
        self.heads, self.levels, self.points = heads, levels, points
        self.register_buffer("fixed_offsets", torch.zeros(1, 2))
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * (points + 1))
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start with points on rays: head m looks into the direction 2πm / M, its points 1 to P pixels away."""
        angles = 2 * math.pi * torch.arange(self.heads) / self.heads
        rays = torch.stack((angles.cos(), angles.sin()), dim=-1)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        distances = torch.arange(1.0, self.points + 1)[:, None]
        offsets = (rays[:, None, None] * distances).expand(-1, self.levels, -1, -1)
        self.sampling_offsets.weight.zero_()
        self.sampling_offsets.bias.copy_(offsets.flatten())
        self.attention_weights.weight.zero_()
        self.attention_weights.bias.zero_()
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            projection.bias.zero_()

    def forward(self, query: Tensor, references: Tensor, source: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Read the source.

        Args:
            query: `(B, Q, E)`.
            references: `(B, Q, 2)`, points (x, y), or `(B, Q, 4)`, boxes (x, y, width, height), the same on all
                levels, which span [0, 1]. Offsets from a point are in pixels of the level; from the centre of a
                box, in 2 (P + 1) parts of its size.
            source: `(B, S, E)`, the levels one after the other, each row by row.
            shapes: height and width of every level.

        Returns:
            `(B, Q, E)`.

        Raises:
            UserError: references that are neither, another number of levels, and what
                `multi_scale_deformable_attention` says.
        """
        if references.shape[:-1] != query.shape[:-1] or references.shape[-1] not in (2, 4):
            raise UserError(
                f"references must be points {(*query.shape[:-1], 2)} or boxes {(*query.shape[:-1], 4)} to go with "
                f"the queries, got {tuple(references.shape)}"
            )
        if len(shapes) != self.levels:
            raise UserError(f"this attention reads {self.levels} levels, got {len(shapes)} shapes")
        dtype = self.value_proj.weight.dtype
        with torch.autocast(query.device.type, enabled=False):
            query, references, source = query.to(dtype), references.to(dtype), source.to(dtype)
            value = self.value_proj(source).unflatten(-1, (self.heads, -1))
            locations = self._locations(query, references, shapes)
            logits = self.attention_weights(query).unflatten(-1, (self.heads, -1))
            weights = logits.softmax(-1).view(locations.shape[:-1])
            read = multi_scale_deformable_attention(value, shapes, locations, weights)
            projected: Tensor = self.output_proj(read.to(dtype))
            return projected

    def _locations(self, query: Tensor, references: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Where to sample, `(B, Q, M, L, P + 1, 2)`."""
        free = self.sampling_offsets(query).unflatten(-1, (self.heads, self.levels, self.points, 2))
        fixed = self.fixed_offsets.to(free.dtype).expand(*free.shape[:-2], 1, 2)
        offsets = torch.cat((fixed, free), dim=-2)
        references = references[:, :, None, None, None]
        if references.shape[-1] == 4:
            return references[..., :2] + offsets / (2 * (self.points + 1)) * references[..., 2:]
        sizes = offsets.new_tensor([(width, height) for height, width in shapes])
        return references + offsets / sizes[:, None]
