"""The decoding of RAR and of MaskGIT as 1d-tokenizer does it, written plainly: the peers of the benchmarks.

RAR: every step embeds the sequence so far again and keeps its last row; caches grow by concatenation; every block makes
its own modulation. MaskGIT: guidance in a second pass, separate projections, Gumbel noise for all codes.

Legend: B rows, T positions, D width of the model, K codes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generation.maskgit import MaskGIT
from smalti.generation.masking import masked_counts
from smalti.generation.rar import RAR


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


class _RARBlock:
    def __init__(self, block: nn.Module) -> None:
        self.block, self.kept = block, None

    def __call__(self, x: Tensor, condition: Tensor) -> Tensor:
        block, attention = self.block, self.block.attention
        linear = block.modulation.linear
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = linear(F.silu(condition)).chunk(6, dim=-1)
        inner = block.attention_norm(x) * (1 + scale_a) + shift_a
        query, key, value = (_heads(part, attention.heads) for part in attention.qkv(inner).chunk(3, -1))
        query, key = attention.query_norm(query), attention.key_norm(key)
        first = self.kept is None
        if not first:
            key, value = torch.cat([self.kept[0], key], dim=2), torch.cat([self.kept[1], value], dim=2)
        self.kept = key, value
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=first)
        x = x + gate_a * attention.out(attended.transpose(1, 2).reshape(x.shape))
        inner = block.ffn_norm(x) * (1 + scale_f) + shift_f
        return x + gate_f * block.ffn.down(F.gelu(block.ffn.up(inner)))


@torch.inference_mode()
def sample_rar(model: RAR, labels: Tensor, scale: float, power: float, *, greedy: bool, tokens: int) -> Tensor:
    """The first `tokens` tokens `(B, tokens)` of RAR's `generate`, guided."""
    length = model.token_layout.positions
    blocks = [_RARBlock(block) for block in model.transformer.blocks]
    rows = torch.cat([labels, torch.full_like(labels, model.classes)])
    ids = torch.empty(len(labels), 0, dtype=torch.int64)
    for step in range(tokens):
        klass = model.condition.table(rows)[:, None]
        embedded = model.embeddings[0](torch.cat([ids, ids]))
        x = torch.cat([model.start.expand_as(klass), klass, embedded], dim=1) + model.positions[: step + 2]
        x = x + F.pad(model.targets[: step + 1], (0, 0, 1, 0))
        condition = klass + model.times[: step + 2]
        if step:
            x, condition = x[:, -1:], condition[:, -1:]
        for block in blocks:
            x = block(x, condition)
        factor, shift = model.norm.modulation.linear(F.silu(condition)).chunk(2, dim=-1)
        normed = F.layer_norm(x, x.shape[-1:], eps=model.options.norm_eps) * (1 + factor) + shift
        conditional, null = model.outputs[0](normed)[:, -1].chunk(2)
        weight = (scale - 1) * (1 - math.cos(math.pi * (step / length) ** power)) / 2 + 1
        logits = null + (conditional - null) * weight
        drawn = logits.argmax(-1, keepdim=True) if greedy else torch.multinomial(logits.softmax(-1), 1)
        ids = torch.cat([ids, drawn], dim=1)
    return ids


def _vit(model: MaskGIT, ids: Tensor, labels: Tensor) -> Tensor:
    embedded = torch.cat([model.condition.table(labels)[:, None], model.embeddings[0](ids)], dim=1)
    x = model.norm(embedded + model.positions)
    for block in model.transformer.blocks:
        weights, biases = block.attention.qkv.weight.chunk(3), block.attention.qkv.bias.chunk(3)
        query, key, value = (
            _heads(F.linear(x, *pair), block.attention.heads) for pair in zip(weights, biases, strict=True)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = block.attention_norm(x + block.attention.out(attended))
        x = block.ffn_norm(x + block.ffn.down(F.gelu(block.ffn.up(x))))
    return model.outputs[0](x)[:, 1:]


def _noise(like: Tensor) -> Tensor:
    return -torch.log((-torch.log(torch.rand_like(like).clamp(min=1e-20))).clamp(min=1e-20))


@torch.inference_mode()
def sample_maskgit(model: MaskGIT, labels: Tensor, scale: float, temperature: float, steps: int) -> Tensor:
    """`(B, N)` of MaskGIT's `generate` with linear guidance, where `scale` is ours, and with annealing."""
    (mask,), length = model.token_layout.vocab, model.token_layout.positions
    ids, null = torch.full((len(labels), length), mask), torch.full_like(labels, model.classes)
    for step, count in enumerate(masked_counts(length, steps, "arccos")):
        left, masked, weight = 1 - (step + 1) / steps, ids == mask, (scale - 1) * step / steps
        logits = _vit(model, ids, labels)
        if weight:
            logits = logits + weight * (logits - _vit(model, ids, null))
        logits = logits / (0.5 + 0.8 * left)
        drawn = (logits + temperature * left * _noise(logits)).argmax(-1)
        drawn_logits = logits.gather(-1, drawn[:, :, None])[:, :, 0].masked_fill(~masked, torch.inf)
        ids = torch.where(masked, drawn, ids)
        if count:
            confidence = drawn_logits + temperature * left * _noise(drawn_logits)
            ids[confidence <= confidence.sort(1).values[:, count - 1 : count]] = mask
    return ids
