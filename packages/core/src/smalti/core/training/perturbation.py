"""Latent perturbation in training (RobustTok, Qiu et al. 2025): a decoder that bears wrong tokens.

Legend: B batch, N tokens of the perturbed samples, D latent width, K codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer, Tokenizer
from smalti.core.errors import UserError
from smalti.core.training.options import Perturbation


def perturbed(quantized: Tensor, latent: Tensor, codes: Tensor, rank: Tensor) -> Tensor:
    """The codes that come in place `rank` of a latent's nearest ones, instead of the nearest.

    Args:
        quantized: `(N, D)`, with the quantizer's gradient, which stays.
        latent: `(N, D)`, before quantization.
        codes: `(K, D)`, as the quantizer's `decode` gives them.
        rank: int64 `(N,)`, 0 for the nearest code.
    """
    with torch.no_grad():
        # Where codes have unit length, the order of distances is that of cosines.
        distances = torch.cdist(latent.float(), codes.float())
        nearest = distances.topk(int(rank.max()) + 1, dim=1, largest=False).indices
        chosen = codes[nearest.gather(1, rank[:, None])[:, 0]].to(quantized.dtype)
    return quantized + (chosen - quantized).detach()


class LatentPerturbation:
    """Perturbs what a tokenizer's quantizer gives, in training, after its losses; tokens stay what they were.

    Args:
        options: of the perturbation.
        tokenizer: with a `quantizer` of one stream and a token at every position of the latent.

    Raises:
        UserError: another tokenizer.
    """

    def __init__(self, options: Perturbation, tokenizer: Tokenizer) -> None:
        self.options = options
        self.step = 0
        quantizer = getattr(tokenizer, "quantizer", None)
        if not isinstance(quantizer, Quantizer) or len(quantizer.vocab) != 1 or tokenizer.layout().kind == "scales":
            raise UserError(
                f"perturbation needs a tokenizer with a quantizer of one stream and one scale, not one whose tokens "
                f"are {tokenizer.layout()}"
            )
        if options.neighbours > quantizer.vocab[0]:
            raise UserError(
                f"perturbation: {options.neighbours} neighbours are more than the {quantizer.vocab[0]} codes there are"
            )
        quantizer.register_forward_hook(self._hook)

    @property
    def ratio(self) -> float:
        """What the number of neighbours and the probability are multiplied by at this update."""
        options = self.options
        if self.step < options.anneal_from:
            return 1.0
        length = max(options.anneal_to - options.anneal_from, 1)
        return 1.0 + min((self.step - options.anneal_from) / length, 1.0) * (options.final_ratio - 1.0)

    def _hook(self, quantizer: nn.Module, inputs: tuple[Any, ...], output: Quantized) -> Quantized | None:
        count = int(len(output.latent) * self.options.share)
        if not quantizer.training or count == 0:
            return None
        assert isinstance(quantizer, Quantizer)
        latent, quantized = inputs[0][:count], output.latent[:count]
        neighbours = max(int(self.ratio * self.options.neighbours), 1)
        tokens = math.prod(quantized.shape[:-1])
        rank = torch.randint(neighbours, (tokens,), device=quantized.device)
        kept = torch.rand(tokens, device=quantized.device) > self.ratio * self.options.probability
        size = quantizer.vocab[0]
        with torch.no_grad():
            codes = quantizer.decode(torch.arange(size, device=quantized.device).view(1, -1, 1), (size,))[0]
        changed = perturbed(quantized.flatten(0, -2), latent.flatten(0, -2), codes, rank.masked_fill(kept, 0))
        return output._replace(latent=torch.cat([changed.view_as(quantized), output.latent[count:]]))
