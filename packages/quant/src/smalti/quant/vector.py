"""Vector quantization: every token is the nearest code of a learned codebook (VQ-VAE, van den Oord et al. 2017).

Legend: B batch, L token positions, D latent width, K codes, N = B * L.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.entropy import affinity_entropy, distance_affinities
from smalti.quant.estimators import diveq, gradient_of, rotation_trick, straight_through
from smalti.quant.inputs import as_tokens, check_token_space, checked_latent, float32_or_wider, full_precision
from smalti.quant.learning import CodebookLearning, Seen
from smalti.quant.lookup import nearest_code
from smalti.quant.orthogonal import orthogonal_loss
from smalti.quant.softmax import best_code, expected_code

Weight = Annotated[float, Field(ge=0)]


class VectorQuantizerOptions(QuantizerOptions):
    """Options of vector quantization.

    Args:
        dim: D, width of the latent and of the codes.
        codebook_size: K.
        cosine: search by the largest cosine instead of the smallest distance (ViT-VQGAN section 3.2).
        unit_length: what else than the search takes unit length, with `cosine`: `all`, tokens and codes at every use
            (LlamaGen); `codes`, only the codes, so that losses and averages see tokens of any length
            (visual-tokenizer-pytorch); `search`, nothing (taming, VAR).
        update: who moves the codes: `loss`, the optimizer (VQ-VAE equation 3); `ema`, moving averages of the tokens
            (VQ-VAE appendix A.1); `none`, nobody, they stay as they are initialised or loaded.
        estimator: of the gradient: `straight-through`; `rotation`, the rotation trick; `diveq`, whose codes learn
            from the task, so that both weights below can be 0; `gumbel`, Gumbel-softmax straight-through.
        commitment_weight: of the mean squared distance that pulls tokens to their codes. Taming's models of 2021
            ("legacy") have 1 here and 0.25 for the codes.
        codebook_weight: of the one that pulls codes to their tokens, where `update` is `loss`.
        ema_decay: weight of the past, where `update` is `ema`.
        ema_smoothing: Laplace smoothing of the counts, and all codes are rewritten; without it only those that the
            batch uses.
        affine: codes follow the mean and spread of all tokens (Huh et al. 2023); not with `cosine`.
        initialise: `uniform` in [-1/K, 1/K]; `normal`, of variance 1; `data`, by k-means over the first training batch.
        revive_after: replace a code that nothing was assigned to for this many training batches in a row by
            a random token; null leaves it alone.
        revive_below: replace a code as soon as its moving count is below this, where `update` is `ema`.
        anchor_decay: pull codes that are rarely used to the token nearest to them (CVQ-VAE, Zheng and Vedaldi 2023), by
            a running usage of this decay; null does not.
        stochastic_temperature: in training, draw codes from softmax(-distance^2 / temperature) (RQ-VAE, Lee et al.
            2022).
        diveq_variance: of the noise of `diveq`, in training.
        entropy_weight: of the entropy term, sample_weight H(token) - batch_weight H(mean of tokens).
        sample_weight: of the tokens' own entropy within it.
        batch_weight: of the entropy of their mean within it.
        entropy_temperature: T in the distribution of a token over the codes, softmax(-distance^2 / T).
        orthogonal_weight: of the mean squared cosine of two codes, where `update` is `loss`.
    """

    name: Literal["vq"] = "vq"
    dim: Annotated[int, Field(ge=1)]
    codebook_size: Annotated[int, Field(ge=2)]
    cosine: bool = False
    unit_length: Literal["all", "codes", "search"] = "all"
    update: Literal["loss", "ema", "none"] = "loss"
    estimator: Literal["straight-through", "rotation", "diveq", "gumbel"] = "straight-through"
    commitment_weight: Weight = 0.25
    codebook_weight: Weight = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    ema_smoothing: bool = True
    affine: bool = False
    initialise: Literal["uniform", "normal", "data"] = "uniform"
    revive_after: Annotated[int, Field(ge=1)] | None = None
    revive_below: Annotated[float, Field(gt=0)] | None = None
    anchor_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    stochastic_temperature: Annotated[float, Field(gt=0)] | None = None
    diveq_variance: Weight = 5e-3
    entropy_weight: Weight = 0.0
    sample_weight: Weight = 1.0
    batch_weight: Weight = 1.0
    entropy_temperature: Annotated[float, Field(gt=0)] = 0.01
    orthogonal_weight: Weight = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.unit_length != "all" and not self.cosine:
            raise ValueError(f"unit_length {self.unit_length!r} needs cosine: true")
        if self.affine and self.cosine:
            raise ValueError("an affine codebook has no unit length: choose affine or cosine")
        if self.revive_below is not None and (self.update != "ema" or self.revive_after is not None):
            raise ValueError("revive_below needs update: ema, whose counts it looks at, and no revive_after")
        if self.revive_after is not None and self.update == "none":
            raise ValueError("revive_after changes codes that update: none keeps")
        if self.anchor_decay is not None and (self.update == "none" or self.affine):
            raise ValueError("anchor_decay changes codes: it needs update: loss or ema, and no affine")
        if self.orthogonal_weight > 0 and self.update != "loss":
            raise ValueError("orthogonal_weight needs update: loss, nothing else follows its gradient")
        if self.estimator == "gumbel" and self.stochastic_temperature is None:
            raise ValueError("the estimator gumbel needs a stochastic_temperature")
        return self

    def build(self) -> VectorQuantizer:
        """Build it."""
        return VectorQuantizer(self)


class VectorQuantizer(Quantizer):
    """Vector quantization.

    The losses in training are `commitment`, mean (sg(e) - z)^2, and, where the optimizer moves the codes,
    `codebook`, mean (e - sg(z))^2, over all elements, weighted; z and e are of unit length with `cosine`, as far as
    `unit_length` says. With a weight there are `entropy` and `orthogonal`.

    Attributes:
        codebook: `(K, D)`; a parameter where `update` is `loss`, else a buffer.
        learning: what moves the codes besides the optimizer.
    """

    options: VectorQuantizerOptions
    codebook: Tensor

    def __init__(self, options: VectorQuantizerOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = options.dim
        size = options.codebook_size
        self.vocab = (size,)
        self._unit_latent = options.cosine and options.unit_length == "all"
        self._unit_codes = options.cosine and options.unit_length != "search"
        codebook = torch.empty(size, options.dim)
        codebook = codebook.normal_() if options.initialise == "normal" else codebook.uniform_(-1 / size, 1 / size)
        codebook = _unit(codebook) if self._unit_latent else codebook
        if options.update == "loss":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.learning = CodebookLearning(options, codebook, unit=self._unit_latent)
        self._deferred: list[Seen] | None = None

    def forward(self, latent: Tensor, tokens: Tensor | None = None) -> Quantized:
        """Quantize `(B, *space, D)`.

        Args:
            latent: float `(B, *space, D)`.
            tokens: int64 `(B, L, 1)`, codes to take instead of the nearest ones.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch; tokens that `decode`
                would not take.
        """
        with checked_latent(latent, self.dim, training=self.training) as channels:
            if tokens is not None:
                check_token_space(tokens, tuple(latent.shape[1:-1]), self.vocab)
            vectors = self._vectors(channels)
            flat = vectors.detach().reshape(-1, self.dim)
            if self.training:
                self.learning.prepare(self.codebook, flat)
            sampling = self.training and self.options.stochastic_temperature is not None
            # Drawn from the global generator, as dropout is.
            noise_seed = torch.randint(2**62, ()) if sampling else None
            chosen = self._search(flat, noise_seed) if tokens is None else tokens.flatten()
            codes = self._codes(chosen).view(vectors.shape)
            quantized = self._estimate(vectors, codes, noise_seed).to(self.codebook.dtype)
            losses = {}
            if self.training:
                losses = self._losses(vectors, codes)
                seen = Seen(flat, channels.detach().reshape(-1, self.dim), chosen)
                if self._deferred is None:
                    self.learning.learn(self.codebook, [seen])
                else:
                    self._deferred.append(seen)
            return Quantized(quantized, as_tokens(chosen, latent), losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        with full_precision(tokens):
            return self._codes(tokens).to(self.codebook.dtype).view(len(tokens), *space, self.dim)

    def distances(self, latent: Tensor) -> Tensor:
        """Squared distances `(B, L, K)` of tokens to all codes, as the search sees them, with gradients to both.

        For cosines, 1 - distance / 2, where the search goes by them. Whole, so for codebooks of moderate size.

        Args:
            latent: float `(B, *space, D)`.
        """
        with checked_latent(latent, self.dim, training=False) as channels:
            vectors = self._searched(self._vectors(channels)).reshape(len(latent), -1, self.dim)
            affinities = distance_affinities(self._kept_table())(vectors.flatten(0, 1)).view(*vectors.shape[:2], -1)
            return (vectors.square().sum(-1, keepdim=True) - affinities).clamp(min=0)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A context in which forward passes learn nothing.

        At its end, what they saw is averaged in, one after the other, and the codes are written once. Within another
        such context that is the end of the outer one.
        """
        if self._deferred is not None:
            yield
            return
        seen: list[Seen] = []
        self._deferred = seen
        try:
            yield
        finally:
            self._deferred = None
        if seen:
            self.learning.learn(self.codebook, seen)

    def _vectors(self, latent: Tensor) -> Tensor:
        return _unit(latent) if self._unit_latent else latent

    def _searched(self, vectors: Tensor) -> Tensor:
        return _unit(vectors) if self.options.cosine and not self._unit_latent else vectors

    def _table(self, codebook: Tensor) -> Tensor:
        """All codes `(K, D)` as the search sees them."""
        codes = self._as_used(float32_or_wider(codebook))
        return _unit(codes) if self.options.cosine and not self._unit_codes else codes

    def _kept_table(self) -> Tensor:
        """The same, for a backward pass: averages and revival may write to the codebook before it comes."""
        return self._table(self.codebook.clone())

    def _as_used(self, codes: Tensor) -> Tensor:
        if self.learning.affine is not None:
            moved: Tensor = self.learning.affine(codes)
            return moved
        return _unit(codes) if self._unit_codes else codes

    def _codes(self, tokens: Tensor) -> Tensor:
        # Rows first, then their scale: the backward pass keeps the rows and not the table, so that revival
        # may write to the table between a forward pass and its backward pass.
        return self._as_used(float32_or_wider(F.embedding(tokens, self.codebook)))

    def _search(self, vectors: Tensor, noise_seed: Tensor | None) -> Tensor:
        searched, table = self._searched(vectors), self._table(self.codebook.detach())
        if noise_seed is None:
            return nearest_code(searched, table)
        return best_code(
            searched,
            distance_affinities(table),
            len(table),
            temperature=self.options.stochastic_temperature or 1.0,
            noise_seed=noise_seed,
        )

    def _estimate(self, vectors: Tensor, codes: Tensor, noise_seed: Tensor | None) -> Tensor:
        match self.options.estimator:
            case "rotation":
                return rotation_trick(vectors, codes)
            case "diveq":
                return diveq(vectors, codes, self.options.diveq_variance if self.training else 0.0)
            case "gumbel" if self.training:
                table = self._kept_table()
                mean = expected_code(
                    self._searched(vectors).reshape(-1, self.dim),
                    self._as_used(float32_or_wider(self.codebook).detach().clone()),
                    distance_affinities(table),
                    temperature=self.options.stochastic_temperature or 1.0,
                    noise_seed=noise_seed,
                ).view(codes.shape)
                return codes + gradient_of(mean, codes.dtype)
            case _:
                return straight_through(vectors, codes)

    def _losses(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        options = self.options
        losses = {"commitment": options.commitment_weight * F.mse_loss(vectors, codes.detach())}
        if options.update == "loss":
            losses["codebook"] = options.codebook_weight * F.mse_loss(codes, vectors.detach())
        if options.entropy_weight > 0:
            searched = self._searched(vectors).reshape(-1, self.dim)
            entropies = affinity_entropy(searched, distance_affinities(self._kept_table()), options.entropy_temperature)
            losses["entropy"] = options.entropy_weight * entropies.loss(options.sample_weight, options.batch_weight)
        if options.orthogonal_weight > 0:
            losses["orthogonal"] = options.orthogonal_weight * orthogonal_loss(self._kept_table())
        return losses


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=-1, eps=1e-12)
