"""Texts as features, which a text-aware decoder reads beside the latent.

Legend: B batch, M tokens of a text, T width of the features of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smalti.core.data.loader import Batch, IndexedBatch
from smalti.core.errors import UserError
from smalti.core.text_encoder import text_model
from smalti.core.training.frozen import Frozen
from smalti.core.training.options import Text


class TextFeatures(nn.Module):
    """Features of the texts of a batch; `options` say where they come from."""

    def __init__(self, options: Text) -> None:
        super().__init__()
        self.options = options
        self.encoder = Frozen(ClipText(options.encoder)) if options.encoder is not None else None

    @torch.no_grad()
    def forward(self, batch: Batch | IndexedBatch, classes: Sequence[str]) -> Tensor:
        """`(B, M, T)`, on the device of the images; `classes` are names, for images that have no text.

        Raises:
            UserError: an image without a text, a caption without an encoder, features of different shapes.
        """
        device = batch.images.device
        texts = [self._text(batch, index, classes) for index in range(len(batch.images))]
        captions = [text for text in texts if isinstance(text, str)]
        made = iter(self._encoded(captions).to(device) if captions else ())
        rows = [next(made) if isinstance(text, str) else torch.from_numpy(text).to(device) for text in texts]
        shapes = sorted({tuple(row.shape) for row in rows})
        if len(shapes) > 1:
            raise UserError(f"the texts of one batch have features of the shapes {', '.join(map(str, shapes))}")
        return torch.stack(rows)

    def _text(self, batch: Batch | IndexedBatch, index: int, classes: Sequence[str]) -> Any:
        text = batch.texts[index] if batch.texts else None
        if text is not None:
            return text
        if self.options.of_class is None:
            raise UserError(
                f"image {batch.keys[index]!r} has no text: give the data set's option text, or text.of_class, a "
                "sentence with {} for the name of its class"
            )
        return self.options.of_class.replace("{}", classes[int(batch.labels[index])])

    def _encoded(self, captions: list[str]) -> Tensor:
        if self.encoder is None:
            raise UserError(
                f"the text {captions[0]!r} is no features of one: give text.encoder, e.g. "
                "openai/clip-vit-large-patch14-336"
            )
        features: Tensor = self.encoder(captions)
        return features


class ClipText(nn.Module):
    """The text half of a CLIP: features of tokens after the last normalisation (Radford et al. 2021).

    Texts are cut at M tokens, the last of which is then the end token, and filled up with token 0, as OpenAI's and
    open_clip do; no token is masked but by the order of reading.

    Args:
        source: a folder or a hub repository of transformers.

    Raises:
        UserError: transformers is not installed, or there is no CLIP with a tokenizer of texts.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tokens, self.tower = text_model(source, "CLIPTextModel", "CLIP", "text.encoder")
        self.length = int(self.tower.config.max_position_embeddings)

    def forward(self, texts: list[str]) -> Tensor:
        """B texts to `(B, M, T)`, in float32."""
        device = self.tower.device
        rows = self.tokens(texts, truncation=True, max_length=self.length)["input_ids"]
        tokens = np.zeros((len(rows), self.length), np.int64)
        for row, found in zip(tokens, rows, strict=True):
            row[: len(found)] = found
        with torch.autocast(device.type, enabled=False):
            features: Tensor = self.tower(input_ids=torch.from_numpy(tokens).to(device)).last_hidden_state
        return features
