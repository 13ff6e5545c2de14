"""VAR's sampling as its own code does it, written plainly: the peer of the benchmark.

Every block computes its modulation anew at every scale, keys and values are joined to those so far by copying, filters
change logits in place, and draws are `torch.multinomial`.

Legend: B rows (both halves of guidance), N positions of a scale, L positions so far, H heads, d width of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from plain import PlainVQGAN
from torch import Tensor, nn

from smalti.generation.var import VAR


class OriginalBlock:
    """One block with keys and values `(B, H, L, d)` that grow from scale to scale."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.keys, self.values = block, None, None

    def step(self, x: Tensor, condition: Tensor) -> Tensor:
        """One scale `(B, N, D)`."""
        block, attention = self.block, self.block.attention
        modulation = F.linear(F.silu(condition), block.modulation.linear.weight, block.modulation.linear.bias)
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = modulation.view(len(x), 1, 6, -1).unbind(2)
        inner = F.layer_norm(x, x.shape[-1:], eps=1e-6).mul(scale_a.add(1)).add_(shift_a)
        bias = torch.cat([attention.query_bias, torch.zeros_like(attention.query_bias), attention.value_bias])
        qkv = F.linear(inner, attention.qkv.weight, bias).view(*x.shape[:2], 3, attention.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        factor = attention.log_scale.view(1, -1, 1, 1).clamp_max(math.log(100)).exp()
        query, key = F.normalize(query, dim=-1).mul(factor), F.normalize(key, dim=-1)
        self.keys = key if self.keys is None else torch.cat([self.keys, key], dim=2)
        self.values = value if self.values is None else torch.cat([self.values, value], dim=2)
        attended = F.scaled_dot_product_attention(query, self.keys, self.values, scale=1)
        attended = attended.transpose(1, 2).reshape(x.shape)
        x = x + F.linear(attended, attention.out.weight, attention.out.bias).mul_(gate_a)
        inner = F.layer_norm(x, x.shape[-1:], eps=1e-6).mul(scale_f.add(1)).add_(shift_f)
        inner = F.gelu(F.linear(inner, block.ffn.up.weight, block.ffn.up.bias), approximate="tanh")
        return x + F.linear(inner, block.ffn.down.weight, block.ffn.down.bias).mul(gate_f)


def drawn(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Tokens `(B, N)` of filtered logits `(B, N, K)`, which are changed."""
    logits.masked_fill_(logits < logits.topk(top_k).values.amin(-1, keepdim=True), -torch.inf)
    ordered, places = logits.sort(dim=-1)
    removed = ordered.softmax(-1).cumsum_(-1) <= 1 - top_p
    removed[..., -1:] = False
    logits.masked_fill_(removed.scatter(-1, places, removed), -torch.inf)
    return torch.multinomial(logits.softmax(-1).flatten(0, 1), 1).view(logits.shape[:2])


@torch.inference_mode()
def sample_var(
    model: VAR, decoder: PlainVQGAN, labels: Tensor, guidance: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Tokens `(B, L)` and images, guided by 1 + `guidance` times the share of the scales that are done."""
    quantizer, areas = model.quantizer, model.areas
    codebook, sides = quantizer.units[0].codebook, quantizer.options.scales
    blocks = [OriginalBlock(block) for block in model.transformer.blocks]
    condition = model.condition.table(torch.cat([labels, torch.full_like(labels, model.classes)]))[:, None]
    places = model.inputs.places().split(areas)
    x, total, tokens = condition + model.inputs.start + places[0], None, []
    for scale, side in enumerate(sides):
        for block in blocks:
            x = block.step(x, condition)
        norm = model.norm.modulation.linear
        factor, offset = F.linear(F.silu(condition), norm.weight, norm.bias).chunk(2, -1)
        x = F.layer_norm(x, x.shape[-1:], eps=1e-6).mul(factor.add(1)).add_(offset)
        conditional, null = F.linear(x, model.output.weight, model.output.bias).chunk(2)
        weight = guidance * scale / (len(areas) - 1)
        tokens.append(drawn((1 + weight) * conditional - weight * null, top_k, top_p))
        codes = F.embedding(tokens[-1], codebook).transpose(1, 2).reshape(len(labels), -1, *side)
        if side != sides[-1]:
            codes = F.interpolate(codes, sides[-1], mode="bicubic")
        phi = quantizer.phi[quantizer.phi_of_scale[scale]]
        codes = codes * (1 - phi.ratio) + phi.convolution(codes) * phi.ratio
        total = codes if total is None else total + codes
        if scale + 1 < len(areas):
            reduced = F.interpolate(total, sides[scale + 1], mode="area").flatten(2).transpose(1, 2)
            words = F.linear(reduced, model.inputs.words.weight, model.inputs.words.bias) + places[scale + 1]
            x = torch.cat([words, words])
    return torch.cat(tokens, 1), decoder.decode(total).clamp(-1, 1)
