"""Index backpropagation: the gradient reaches all codes through a softmax over them (IBQ, Shi et al. 2024).

Legend: B batch, L token positions, D latent width, K codes, N = B * L.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.entropy import affinity_entropy, dot_affinities
from smalti.quant.estimators import gradient_of
from smalti.quant.inputs import as_tokens, check_token_space, checked_latent, float32_or_wider
from smalti.quant.softmax import best_code, expected_code

Weight = Annotated[float, Field(ge=0)]


class IndexBackpropagationOptions(QuantizerOptions):
    """Options of index backpropagation; the defaults are those of the published tokenizers.

    Args:
        dim: D, width of the latent and of the codes.
        codebook_size: K.
        double_weight: of mean (q - z)^2, q with its gradient to all codes.
        commitment_weight: of mean (sg(e) - z)^2, e the chosen code. visual-tokenizer-pytorch has 0.25 here and 1 below.
        codebook_weight: of mean (e - sg(z))^2.
        entropy_weight: of the entropy term, sample_weight H(token) - batch_weight H(mean of tokens).
        sample_weight: of the tokens' own entropy within it.
        batch_weight: of the entropy of their mean within it.
        entropy_temperature: T in the distribution of a token over the codes, softmax(z.e / T).
    """

    name: Literal["ibq"] = "ibq"
    dim: Annotated[int, Field(ge=1)]
    codebook_size: Annotated[int, Field(ge=2)]
    double_weight: Weight = 1.0
    commitment_weight: Weight = 1.0
    codebook_weight: Weight = 0.25
    entropy_weight: Weight = 0.05
    sample_weight: Weight = 1.0
    batch_weight: Weight = 1.0
    entropy_temperature: Annotated[float, Field(gt=0)] = 0.01

    def build(self) -> IndexBackpropagation:
        """Build it."""
        return IndexBackpropagation(self)


class IndexBackpropagation(Quantizer):
    """The code of the largest inner product with the token, with the gradient of a softmax over all of them.

    With p = softmax(z E^T), k its largest entry and h = onehot(k) - sg(p) + p, the output is q = h E: the value of
    code k, and gradients to the token and to every code. The losses in training are `double`, `commitment` and
    `codebook`, see the options, and `entropy` where it has a weight.

    Attributes:
        codebook: `(K, D)`, a parameter.
    """

    options: IndexBackpropagationOptions

    def __init__(self, options: IndexBackpropagationOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = options.dim
        self.vocab = (options.codebook_size,)
        self.codebook = nn.Parameter(torch.randn(options.codebook_size, options.dim))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as vectors:
            codebook = float32_or_wider(self.codebook)
            flat = vectors.reshape(-1, self.dim)
            tokens = best_code(flat, dot_affinities(codebook), len(codebook))
            codes = F.embedding(tokens, codebook).view(vectors.shape)
            quantized = codes
            if torch.is_grad_enabled() and len(flat):
                mean = expected_code(flat, codebook, dot_affinities(codebook)).view(vectors.shape)
                quantized = codes + gradient_of(mean, codes.dtype)
            losses = self._losses(vectors, codes, quantized) if self.training else {}
            return Quantized(quantized.to(self.codebook.dtype), as_tokens(tokens, latent), losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        return F.embedding(tokens, self.codebook).view(len(tokens), *space, self.dim)

    def _losses(self, vectors: Tensor, codes: Tensor, quantized: Tensor) -> dict[str, Tensor]:
        options = self.options
        losses = {
            "double": options.double_weight * F.mse_loss(quantized, vectors),
            "commitment": options.commitment_weight * F.mse_loss(vectors, codes.detach()),
            "codebook": options.codebook_weight * F.mse_loss(codes, vectors.detach()),
        }
        if options.entropy_weight > 0:
            affinities = dot_affinities(float32_or_wider(self.codebook))
            entropies = affinity_entropy(vectors.reshape(-1, self.dim), affinities, options.entropy_temperature)
            losses["entropy"] = options.entropy_weight * entropies.loss(options.sample_weight, options.batch_weight)
        return losses
