"""The features that a T5 makes of captions.

Legend: N captions, P positions of a caption, E width of its features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalti.core.backbones.pretrained import import_extra
from smalti.core.captions import CaptionOptions
from smalti.core.errors import UserError


def caption_features(texts: Sequence[str], options: CaptionOptions, encoder: str | None, device: str) -> Tensor:
    """Features of texts, as a generator of captions takes them.

    Every text is encoded alone, so that its features do not depend on the others; it is cut after P tokens of the
    encoder, the last of which is then the end token.

    Args:
        texts: N of them.
        options: what the generator takes.
        encoder: in the place of the one that `options` name.
        device: cpu or cuda; the encoder is there only for as long as this takes.

    Returns:
        Float32 `(N, P, E)`, left-padded with zero rows.

    Raises:
        UserError: no encoder is named; transformers is not installed; there is no T5 at that place, or one with
            features of another width.
    """
    source = encoder or options.encoder
    if source is None:
        raise UserError("the generator does not name the text encoder of its captions: give it with --text-encoder")
    tokens, tower = text_model(source, "T5EncoderModel", "T5", "--text-encoder")
    if tower.config.d_model != options.width:
        raise UserError(
            f"the text encoder {source} makes features {tower.config.d_model} wide, the generator takes {options.width}"
        )
    tower = tower.to(device).eval()
    features = torch.zeros(len(texts), options.length, options.width, device=device)
    with torch.inference_mode(False), torch.no_grad():
        for row, text in zip(features, texts, strict=True):
            words = tokens(text, truncation=True, max_length=options.length, return_tensors="pt")["input_ids"]
            found = tower(input_ids=words.to(device)).last_hidden_state[0]
            row[-len(found) :] = found
    return features


def text_model(source: str, model: str, kind: str, option: str) -> tuple[Any, Any]:
    """The splitter of texts and the encoder, in float32, of a text model of transformers.

    Args:
        source: a folder or a hub repository.
        model: its class in transformers.
        kind: what it is called.
        option: where it was given.

    Raises:
        UserError: transformers is not installed, or there is no such model.
    """
    transformers = import_extra("transformers")
    try:
        tower = getattr(transformers, model).from_pretrained(source, dtype=torch.float32)
        return transformers.AutoTokenizer.from_pretrained(source), tower
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = "a folder" if Path(source).is_dir() else "neither a folder nor a hub repository that can be reached"
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the text encoder {source} is {what}, without a {kind} of transformers ({first}): download it from the "
            f"hub, and give its folder with {option}"
        ) from None
