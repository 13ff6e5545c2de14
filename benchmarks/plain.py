"""Published tokenizers as one would write them down: eager, contiguous, scores as a matrix. The peers of benchmarks.

They run on a state dict under the publisher's names. Legend: B batch, C channels, h w grid, N positions, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def _conv(x: Tensor, state: State, name: str, **options: int) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)


def _norm(x: Tensor, state: State, name: str) -> Tensor:
    return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)


def _swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _residual(x: Tensor, state: State, name: str) -> Tensor:
    y = _conv(_swish(_norm(x, state, f"{name}.norm1")), state, f"{name}.conv1", padding=1)
    y = _conv(_swish(_norm(y, state, f"{name}.norm2")), state, f"{name}.conv2", padding=1)
    return (_conv(x, state, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in state else x) + y


def _attention(x: Tensor, state: State, name: str) -> Tensor:
    y = _norm(x, state, f"{name}.norm")
    if f"{name}.qkv.weight" in state:
        query, key, value = _conv(y, state, f"{name}.qkv").flatten(2).chunk(3, dim=1)
    else:
        query, key, value = (_conv(y, state, f"{name}.{part}").flatten(2) for part in "qkv")
    scores = torch.bmm(query.transpose(1, 2), key) * x.shape[1] ** -0.5
    mixed = torch.bmm(value, scores.softmax(2).transpose(1, 2))
    return x + _conv(mixed.view(x.shape), state, f"{name}.proj_out")


class PlainVQGAN:
    """LlamaGen's tokenizer (`names="llamagen"`) or the networks of VAR's (`names="var"`)."""

    def __init__(self, state: State, names: str) -> None:
        self.state = state
        llamagen = names == "llamagen"
        self.level = "{side}.conv_blocks.{index}" if llamagen else "{side}.{way}.{index}"
        self.block, self.middle = ("res", ("0", "1", "2")) if llamagen else ("block", ("block_1", "attn_1", "block_2"))
        self.fine_first = not llamagen  # how VAR counts the decoder's levels
        self.padding = state["quant_conv.weight"].shape[-1] // 2

    def _levels(self, x: Tensor, side: str, way: str) -> Tensor:
        state = self.state
        order = range(5) if side == "encoder" or not self.fine_first else reversed(range(5))
        for index in order:
            name = self.level.format(side=side, way=way, index=index)
            for block in range(2 if side == "encoder" else 3):
                x = _residual(x, state, f"{name}.{self.block}.{block}")
                if f"{name}.attn.{block}.norm.weight" in state:
                    x = _attention(x, state, f"{name}.attn.{block}")
            if f"{name}.downsample.conv.weight" in state:
                x = _conv(F.pad(x, (0, 1, 0, 1)), state, f"{name}.downsample.conv", stride=2)
            if f"{name}.upsample.conv.weight" in state:
                x = _conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), state, f"{name}.upsample.conv", padding=1)
        return x

    def _middle(self, x: Tensor, side: str) -> Tensor:
        first, attention, last = (f"{side}.mid.{name}" for name in self.middle)
        return _residual(_attention(_residual(x, self.state, first), self.state, attention), self.state, last)

    def encode(self, images: Tensor) -> Tensor:
        """Images to the latent before quantization, `(B, C, h, w)`."""
        x = self._levels(_conv(images, self.state, "encoder.conv_in", padding=1), "encoder", "down")
        x = _swish(_norm(self._middle(x, "encoder"), self.state, "encoder.norm_out"))
        x = _conv(x, self.state, "encoder.conv_out", padding=1)
        return _conv(x, self.state, "quant_conv", padding=self.padding)

    def tokens(self, latent: Tensor) -> Tensor:
        """LlamaGen's search: all distances at once, `(B, h, w)`."""
        rows = F.normalize(latent.permute(0, 2, 3, 1).reshape(-1, latent.shape[1]), dim=-1)
        codes = F.normalize(self.state["quantize.embedding.weight"], dim=-1)
        distances = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.T
        return distances.argmin(1).view(latent.shape[0], *latent.shape[2:])

    def decode(self, latent: Tensor) -> Tensor:
        """The quantized latent `(B, C, h, w)` to images."""
        x = _conv(latent, self.state, "post_quant_conv", padding=self.padding)
        x = self._levels(self._middle(_conv(x, self.state, "decoder.conv_in", padding=1), "decoder"), "decoder", "up")
        return _conv(_swish(_norm(x, self.state, "decoder.norm_out")), self.state, "decoder.conv_out", padding=1)


class PlainTiTok:
    """The transformers of TiTok's first models: images to the latent, and the latent to proxy logits."""

    def __init__(self, state: State, heads: int) -> None:
        self.state, self.heads = state, heads

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"].flatten(1), self.state[f"{name}.bias"])

    def _layer_norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def _blocks(self, x: Tensor, side: str) -> Tensor:
        layers = 1 + max(int(name.split(".")[2]) for name in self.state if name.startswith(f"{side}.transformer."))
        for name in (f"{side}.transformer.{layer}" for layer in range(layers)):
            y = self._layer_norm(x, f"{name}.ln_1")
            projected = F.linear(y, self.state[f"{name}.attn.in_proj_weight"], self.state[f"{name}.attn.in_proj_bias"])
            query, key, value = (
                part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)
            )
            scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
            x = x + self._linear((scores.softmax(-1) @ value).transpose(1, 2).flatten(2), f"{name}.attn.out_proj")
            hidden = F.gelu(self._linear(self._layer_norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"))
            x = x + self._linear(hidden, f"{name}.mlp.c_proj")
        return x

    def _sequence(self, grid: Tensor, latents: Tensor, side: str) -> Tensor:
        token = self.state[f"{side}.class_embedding"].expand(len(grid), 1, -1)
        x = torch.cat([token, grid], dim=1) + self.state[f"{side}.positional_embedding"]
        latents = latents + self.state[f"{side}.latent_token_positional_embedding"]
        return self._blocks(self._layer_norm(torch.cat([x, latents], dim=1), f"{side}.ln_pre"), side)

    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to the latent `(B, c, N)`."""
        patches = _conv((images + 1) / 2, self.state, "encoder.patch_embed", stride=16).flatten(2).transpose(1, 2)
        queries = self.state["latent_tokens"].expand(len(images), -1, -1)
        latents = self._layer_norm(self._sequence(patches, queries, "encoder")[:, 257:], "encoder.ln_post")
        batch, count, width = latents.shape
        return _conv(latents.reshape(batch, width, count, 1), self.state, "encoder.conv_out").squeeze(3)

    def logits(self, latent: Tensor) -> Tensor:
        """The quantized latent `(B, N, c)` to logits `(B, K, 16, 16)`."""
        masks = self.state["decoder.mask_token"].expand(len(latent), 256, -1)
        x = self._sequence(masks, self._linear(latent, "decoder.decoder_embed"), "decoder")[:, 1:257]
        grid = self._layer_norm(x, "decoder.ln_post").transpose(1, 2).unflatten(2, (16, 16))
        hidden = torch.tanh(_conv(grid, self.state, "decoder.ffn.0"))
        return _conv(hidden, self.state, "decoder.ffn.2")
