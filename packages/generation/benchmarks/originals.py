"""The decoding of LlamaGen and of FAR as their own code does it, written plainly: the peers of the benchmarks.

Caches and masks as long as the whole sequence, all of which every step attends to; separate projections of the gated
feed-forward; the inner head of FAR with new caches of that length for every position; draws by `torch.multinomial`.

Legend: B rows (both halves of guidance), N positions, H heads, d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generation.ar import AR
from smalti.generation.far import FAR
from smalti.generation.rotary import rotary_table
from smalti.generation.transformer import Transformer


class OriginalBlock:
    """One block with a cache `(B, H, N, d)` that is attended to whole, through a boolean mask."""

    def __init__(self, block: nn.Module) -> None:
        self.norms = block.attention_norm.weight, block.ffn_norm.weight
        self.qkv, self.out = block.attention.qkv.weight, block.attention.out.weight
        self.gate, self.up = (half.contiguous() for half in block.ffn.up.weight.chunk(2))
        self.down, self.heads = block.ffn.down.weight, block.attention.heads

    def allocate(self, batch: int, length: int) -> None:
        """New caches, as long as the sequence."""
        shape = (batch, self.heads, length, self.out.shape[0] // self.heads)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def step(self, x: Tensor, position: int, rotary: Tensor, mask: Tensor) -> Tensor:
        """One position `(B, 1, D)`."""
        query, key, value = (
            part.view(*x.shape[:2], self.heads, -1) for part in F.linear(_rms(x, self.norms[0]), self.qkv).chunk(3, -1)
        )
        query, key = _turned(query, rotary), _turned(key, rotary)
        self.keys[:, :, position] = key[:, 0]
        self.values[:, :, position] = value[:, 0]
        # each head has its own keys, which the original repeats once
        keys, values = self.keys.repeat_interleave(1, dim=1), self.values.repeat_interleave(1, dim=1)
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=mask)
        x = x + F.linear(attended.transpose(1, 2).reshape(x.shape), self.out)
        inner = _rms(x, self.norms[1])
        return x + F.linear(F.silu(F.linear(inner, self.gate)) * F.linear(inner, self.up), self.down)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * weight


def _turned(vectors: Tensor, rotary: Tensor) -> Tensor:
    """`(B, 1, H, d)` by cosines and sines `(d/2, 2)`."""
    pairs = vectors.float().reshape(*vectors.shape[:-1], -1, 2)
    cosine, sine = rotary[:, 0], rotary[:, 1]
    turned = [pairs[..., 0] * cosine - pairs[..., 1] * sine, pairs[..., 1] * cosine + pairs[..., 0] * sine]
    return torch.stack(turned, dim=-1).flatten(3).type_as(vectors)


def _blocks(transformer: Transformer) -> list[OriginalBlock]:
    return [OriginalBlock(block) for block in transformer.blocks]


def _length(positions: int) -> int:
    """Caches are a multiple of 8 long."""
    return -(-(positions + 1) // 8) * 8


def _masks(batch: int, length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1).clone()


def _drawn(logits: Tensor, scale: float, greedy: bool) -> Tensor:
    conditional, null = logits.chunk(2)
    guided = null + (conditional - null) * scale
    return guided.argmax(-1, keepdim=True) if greedy else torch.multinomial(guided.softmax(-1), 1)


@torch.inference_mode()
def sample_ar(model: AR, labels: Tensor, scale: float, tokens: int, *, greedy: bool) -> Tensor:
    """The first `tokens` tokens of LlamaGen's `generate`, guided."""
    blocks, positions = _blocks(model.transformer), model.token_layout.positions
    rotary = torch.view_as_real(rotary_table(model.token_layout, model.options.head_dim))
    rows = torch.cat([labels, torch.full_like(labels, model.classes)])
    length = _length(positions)
    masks = _masks(len(rows), length)
    for block in blocks:
        block.allocate(len(rows), length)
    x, drawn = model.condition.table(rows)[:, None], []
    for position in range(tokens):
        mask = masks[:, None, position, None]
        for block in blocks:
            x = block.step(x, position, rotary[position], mask)
        logits = F.linear(_rms(x, model.norm.weight), model.outputs[0].weight)[:, -1].float()
        drawn.append(_drawn(logits, scale, greedy))
        x = model.embeddings[0](torch.cat([drawn[-1], drawn[-1]]))
    return torch.cat(drawn, dim=1)


@torch.inference_mode()
def sample_far(model: FAR, labels: Tensor, scale: float, positions: int, *, greedy: bool) -> Tensor:
    """The first `positions` positions of FAR's `generate_fq`, guided: `(B, positions, S)`."""
    outer, inner = _blocks(model.transformer), _blocks(model.inner)
    rotary = torch.view_as_real(rotary_table(model.token_layout, model.options.head_dim))
    rows = torch.cat([labels, torch.full_like(labels, model.classes)])
    length = _length(model.token_layout.positions)
    masks = _masks(len(rows), length)
    for block in outer:
        block.allocate(len(rows), length)
    x, drawn = model.condition.table(rows)[:, None], []
    for position in range(positions):
        for block in outer:
            x = block.step(x, position, rotary[position], masks[:, None, position, None])
        for block in inner:
            block.allocate(len(rows), length)
        streams, embedded = [], []
        for stream, (table, output) in enumerate(zip(model.embeddings, model.outputs, strict=True)):
            for block in inner:
                x = block.step(x, stream, rotary[stream], masks[:, None, stream, None])
            logits = F.linear(_rms(x, model.norm.weight), output.weight)[:, -1].float()
            streams.append(_drawn(logits, scale, greedy))
            x = table(torch.cat([streams[-1], streams[-1]]))
            embedded.append(x)
        drawn.append(torch.cat(streams, dim=1))
        x = model.aggregation(torch.cat(embedded, dim=-1))
    return torch.stack(drawn, dim=1)
