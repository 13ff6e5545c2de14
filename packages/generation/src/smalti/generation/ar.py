"""AR: class-conditional next-token prediction over one stream of tokens (LlamaGen, Sun et al. 2024).

Legend: B batch, L token positions, K codes, D width of the model, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Generator, check_labels
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.cache import LayerCache
from smalti.generation.checks import check_batch
from smalti.generation.rotary import rotary_table
from smalti.generation.sampling import guided, next_tokens
from smalti.generation.transformer import RMSNorm, Transformer, TransformerOptions, initialise


class AROptions(TransformerOptions):
    """Options of `AR`; the defaults are LlamaGen's GPT-B.

    Args:
        label_dropout: chance to train a sample under the null class, which guidance needs.
    """

    name: Literal["ar"] = "ar"
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1

    def supports(self, layout: TokenLayout) -> str | None:
        """Grids and sequences of one stream."""
        if layout.kind == "scales":
            return "it predicts one token after the other over a grid or a sequence, not scale by scale"
        if layout.streams != 1:
            return f"it models one stream of codes, not {layout.streams}"
        return None

    def build(self, layout: TokenLayout, classes: int) -> AR:
        """Build it for the tokens of `layout` and labels in `[0, classes)`."""
        return AR(self, layout, classes)


class AR(Generator):
    """A causal transformer over `[class, token 0, ..., token L-2]`; its output at position n predicts token n.

    Labels are `[0, classes)`; the class table has one row more, the null class.
    """

    options: AROptions

    def __init__(self, options: AROptions, layout: TokenLayout, classes: int) -> None:
        super().__init__(options, layout, classes)
        (codes,) = layout.vocab
        self.class_embedding = nn.Embedding(classes + 1, options.dim)
        self.token_embedding = nn.Embedding(codes, options.dim)
        self.transformer = Transformer(options, options.layers)
        self.norm = RMSNorm(options.dim)
        self.output = nn.Linear(options.dim, codes, bias=False)
        initialise(self)
        nn.init.zeros_(self.output.weight)

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over all L positions.

        In training mode labels are dropped at random, by torch's global generator.

        Raises:
            UserError: tokens or labels of a wrong shape or out of range.
        """
        check_batch(tokens, labels, self.token_layout, self.classes)
        if self.training:
            dropped = torch.rand(labels.shape, device=labels.device) < self.options.label_dropout
            labels = labels.masked_fill(dropped, self.classes)
        logits = self.logits(tokens, labels)
        return {"cross_entropy": F.cross_entropy(logits.flatten(0, 1), tokens.flatten())}

    def logits(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Logits of every token given those before it (teacher forcing).

        Args:
            tokens: `(B, L, 1)`, or the first N of the L; the last one is not read.
            labels: `(B,)` in `[0, classes]`, where `classes` is the null class.

        Returns:
            `(B, L, K)` float32, or `(B, N, K)`.
        """
        inputs = torch.cat([self.class_embedding(labels)[:, None], self.token_embedding(tokens[:, :-1, 0])], dim=1)
        inputs = F.dropout(inputs, self.options.dropout, self.training)
        return self.predict(inputs, self._rotary(inputs.device)[: inputs.shape[1]])

    def predict(self, inputs: Tensor, rotary: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """Logits that follow on embedded inputs.

        Args:
            inputs: `(B, T, D)`, embedded classes and tokens.
            rotary: `(T, d/2)`, the rotations of their positions.
            cache: of the positions before; without one, the inputs are the beginning.

        Returns:
            `(B, T, K)` float32.
        """
        logits: Tensor = self.output(self.norm(self.transformer(inputs, rotary, cache)))
        return logits.float()

    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, 1)` for labels `(B,)`, one position after the other with a cache.

        Guidance doubles the batch. Sample i takes one uniform number per position, of `(seed, i, position)`.

        Args:
            labels: `(B,)` in `[0, classes)`, on the device of the model.
            settings: guidance, temperature, filters and seed.
            indices: `(B,)`, the numbers of the samples within the run; by default 0, 1, ...

        Raises:
            UserError: a label out of range; guidance for a model that was trained without label dropout.
        """
        check_labels(labels, self.classes)
        if settings.guidance_scale != 1 and self.options.label_dropout == 0:
            raise UserError("guidance needs a generator trained with label_dropout above 0; take guidance_scale=1")
        if indices is None:
            indices = torch.arange(len(labels), device=labels.device)
        training = self.training
        self.eval()
        try:
            # A tensor made in inference mode could not be trained on.
            return self._decode(labels, settings, indices).clone()
        finally:
            self.train(training)

    @torch.inference_mode()
    def _decode(self, labels: Tensor, settings: SamplingSettings, indices: Tensor) -> Tensor:
        batch, positions = len(labels), self.token_layout.positions
        guidance = settings.guidance_scale != 1
        if guidance:
            labels = torch.cat([labels, torch.full_like(labels, self.classes)])
        cache = self.transformer.new_cache(len(labels), positions)
        rotary = self._rotary(labels.device)
        tokens = torch.empty(batch, positions, 1, dtype=torch.int64, device=labels.device)
        inputs = self.class_embedding(labels)
        for step in range(positions):
            logits = self.predict(inputs[:, None], rotary[step : step + 1], cache)[:, 0]
            if guidance:
                logits = guided(logits, settings.guidance_scale)
            drawn = next_tokens(logits, settings, indices, step)
            tokens[:, step, 0] = drawn
            inputs = self.token_embedding(drawn)
            if guidance:
                inputs = torch.cat([inputs, inputs])
        return tokens

    def _rotary(self, device: torch.device) -> Tensor:
        return rotary_table(self.token_layout, self.options.head_dim, device)
