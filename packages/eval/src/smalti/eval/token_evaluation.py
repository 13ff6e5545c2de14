"""From the tokens of images to figures of codes: how they are used, and how many bits an image takes.

Legend: N images, V views of an image, L token positions, S streams, K codes of a stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core import distributed
from smalti.core.codebook_health import PERPLEXITY_DEFINITION, USAGE_DEFINITION
from smalti.core.contracts import Tokenizer
from smalti.core.data.token_shards import read_token_shards
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.progress import Reporter
from smalti.core.weights import fingerprint
from smalti.eval.evaluation_sides import TOKENIZER
from smalti.eval.figures import Figure, library_versions
from smalti.eval.image_evaluation import Evaluation
from smalti.eval.image_source import share_of, stored_images
from smalti.eval.made_images import taken_pixels
from smalti.eval.metric import merged_over_processes
from smalti.eval.tokens import (
    BITS_DEFINITION,
    ENTROPY_BITS_DEFINITION,
    ENTROPY_DEFINITION,
    CodeFigures,
    TokenFigures,
    TokenStatistics,
)


@dataclass(frozen=True)
class AskedOfTokens:
    """What an evaluation of tokens is asked for.

    Args:
        tokens: a run folder, a folder of token shards, or `tokenizer:NAME`.
        images: what `tokenizer:NAME` encodes: a folder, tar shards, or an `.npz` file.
        side_bits: bits of an image that a decoder needs beside the tokens.
        count: take only so many images, the first ones.
        batch_size: images taken at once.
        device: of the tokenizer.
    """

    tokens: str
    images: str | None = None
    side_bits: float = 0.0
    count: int | None = None
    batch_size: int = 32
    device: str = "cpu"


class _Source(NamedTuple):
    """Batches of tokens `(B, V, L, S)` of this process, in all of `share` images, with what they are.

    `codebooks` is as of a `Tokenizer`.
    """

    title: str
    tokenizer: str
    layout: TokenLayout
    codebooks: int
    images: int
    share: int
    batches: Iterable[Tensor]


@torch.inference_mode()
def evaluate_tokens(asked: AskedOfTokens, reporter: Reporter) -> Evaluation:
    """Count codes; all processes must call it, the first one gets the figures.

    Raises:
        UserError: a tokenizer, tokens or images that are missing or damaged, or do not go together.
    """
    source = _encoded(asked) if asked.tokens.startswith(TOKENIZER) else _stored(asked)
    statistics = TokenStatistics(source.layout, asked.side_bits)
    with reporter.progress("tokens", source.share, unit="image") as advance:
        for tokens in source.batches:
            statistics.update(tokens.flatten(0, 1))
            advance(len(tokens))
    found = merged_over_processes(statistics).compute()
    if distributed.rank() != 0:
        return Evaluation([], {})
    record = {
        "protocol": {"name": "tokens"},
        "extractor": {},
        "images": {"source": source.title, "made_by": "tokenizer", "count": source.images, "sha256": ""},
        "reference": {},
        "tokens": {"tokenizer": source.tokenizer, "layout": source.layout.model_dump(mode="json")},
        "processes": distributed.world_size(),
        "device": asked.device,
        "libraries": library_versions(),
    }
    title, summary = f"Tokens of {source.images} images", f"{source.title}: {source.layout}."
    measured = f"tokens of {source.images} images: {source.title}, {source.layout}"
    figures = token_figures(found, source.codebooks, measured)
    return Evaluation(figures, record, title, summary, code_counts=found.counts)


def token_figures(found: TokenFigures, codebooks: int, measured: str) -> list[Figure]:
    """Figures of tokens, with their values by stream and scale.

    Args:
        found: of all tokens.
        codebooks: of how many of the first streams the means are; others are numbers, as of geometry.
        measured: which tokens.
    """
    side = f"; {found.side_bits:g} bits of side information"
    figure = partial(Figure, measured=measured)

    def mean(name: str, title: str, unit: str, definition: str) -> Figure:
        values: list[float] = getattr(found, name)
        value, parts = fmean(values[:codebooks]), _parts(found, name)
        return figure(name=name, title=title, value=value, unit=unit, definition=definition, parts=parts)

    bits = partial(figure, unit="bits", better="lower")
    return [
        mean("usage", "Codebook usage", "share", USAGE_DEFINITION),
        mean("perplexity", "Codebook perplexity", "codes", PERPLEXITY_DEFINITION),
        mean("entropy", "Entropy of a code", "bits", f"{ENTROPY_DEFINITION}; mean over streams"),
        bits(name="bits", title="Bits of an image", value=found.bits, definition=BITS_DEFINITION + side),
        bits(
            name="entropy_bits",
            title="Bits by entropy",
            value=found.entropy_bits,
            definition=ENTROPY_BITS_DEFINITION + side,
        ),
    ]


def _parts(found: TokenFigures, name: str) -> dict[str, float]:
    """By stream where there are several, and by scale and stream where there are scales."""
    places: list[tuple[str, CodeFigures]] = [("", found)] if len(found.usage) > 1 else []
    places += [(f"scale {place} ", scale) for place, scale in enumerate(found.by_scale, 1)]
    parts = {}
    for prefix, figures in places:
        values: Sequence[float] = getattr(figures, name)
        for stream, value in enumerate(values, 1):
            parts[f"{prefix}stream {stream}" if len(values) > 1 else prefix.strip()] = value
    return parts


def _encoded(asked: AskedOfTokens) -> _Source:
    """What a tokenizer makes of images."""
    name = asked.tokens.removeprefix(TOKENIZER)
    if asked.images is None:
        raise UserError(f"evaluate tokens: {asked.tokens} needs images to encode: give them second")
    tokenizer = Tokenizer.from_pretrained(name).to(asked.device)
    images = stored_images(asked.images, tokenizer.preprocessing, asked.count)
    rank, world_size = distributed.rank(), distributed.world_size()

    def batches() -> Iterable[Tensor]:
        for batch in images.batches(asked.batch_size, rank, world_size):
            yield tokenizer.encode(taken_pixels(batch.images, tokenizer, images.title, asked.device))[:, None]

    identity = fingerprint(tokenizer, tokenizer.config())
    title = f"{asked.images} by {name}, {identity}"
    share = images.share(asked.batch_size, rank, world_size)
    return _Source(title, identity, tokenizer.layout(), tokenizer.codebooks, len(images), share, batches())


def _stored(asked: AskedOfTokens) -> _Source:
    """The tokens of shards, all views of every image."""
    if asked.images is not None:
        raise UserError(f"evaluate tokens: only {TOKENIZER}NAME takes images, {asked.tokens} holds tokens")
    folder = Path(asked.tokens)
    folder = folder / "tokens" if (folder / "tokens").is_dir() else folder
    found = read_token_shards(folder)
    tokens = found.tokens[: asked.count]
    if not len(tokens):
        raise UserError(f"{folder} holds no tokens: its shards are empty")
    made_by = folder.parent / "tokenizer"
    codebooks = Tokenizer.from_pretrained(made_by).codebooks if made_by.is_dir() else found.layout.streams
    rank, world_size = distributed.rank(), distributed.world_size()
    starts = range(0, len(tokens), asked.batch_size)[rank::world_size]
    batches = (torch.from_numpy(tokens[start : start + asked.batch_size].astype("int64")) for start in starts)
    share = share_of(len(tokens), asked.batch_size, rank, world_size)
    title = f"{folder}, views {', '.join(found.views)}"
    return _Source(title, found.tokenizer, found.layout, codebooks, len(tokens), share, batches)
