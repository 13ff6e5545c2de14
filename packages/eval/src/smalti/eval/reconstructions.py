"""What a tokenizer does to images: PSNR, SSIM, and how it uses its codes.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from smalti.core.codebook_health import PERPLEXITY_DEFINITION, USAGE_DEFINITION, CodebookHealth, figures_of
from smalti.core.contracts import Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.errors import UserError
from smalti.core.progress import Advance
from smalti.eval.figures import Figure
from smalti.eval.pairwise import PSNR_DEFINITION, SSIM_DEFINITION, psnr, ssim


@dataclass(frozen=True)
class Reconstructions:
    """The figures, int64 code counts `(K,)` by stream, and pairs `(original, reconstruction)` of uint8 `(H, W, 3)`."""

    figures: list[Figure]
    code_counts: list[Tensor]
    pairs: list[tuple[Tensor, Tensor]]


def measure_reconstructions(
    tokenizer: Tokenizer, batches: Iterable[Tensor], shown: Collection[int], advance: Advance
) -> Reconstructions:
    """Encode and decode every image, and compare both at 8 bits.

    Args:
        tokenizer: in evaluation mode.
        batches: of images float `(B, C, H, W)` in [-1, 1], on the tokenizer's device.
        shown: which images to keep, by their place among all.
        advance: told about every batch.

    Raises:
        UserError: no image, or images too small for SSIM.
    """
    health = CodebookHealth(tokenizer.layout().vocab[: tokenizer.codebooks])
    noise: list[Tensor] = []
    similarity: list[Tensor] = []
    pairs: list[tuple[Tensor, Tensor]] = []
    channels, seen = tokenizer.preprocessing.channels, 0
    for images in batches:
        tokens = tokenizer.encode(images)
        health.update(tokens[..., : tokenizer.codebooks])
        originals, copies = to_uint8(images), to_uint8(tokenizer.decode(tokens))
        # Grey is repeated in these; one channel tells the same.
        planes = [pixels[..., :channels].movedim(-1, 1) for pixels in (copies, originals)]
        noise.append(psnr(*planes).cpu())
        similarity.append(ssim(*planes).cpu())
        chosen = [index - seen for index in shown if seen <= index < seen + len(images)]
        pairs += [(originals[place].cpu(), copies[place].cpu()) for place in sorted(chosen)]
        seen += len(images)
        advance(len(images))
    if not seen:
        raise UserError("there is no validation image to reconstruct")
    found = figures_of(health.counts)  # of this process: the others do not measure
    compared = partial(
        Figure,
        measured=f"reconstructions of the {seen} validation images, 8 bits",
        reference="the same images after the tokenizer's preprocessing, 8 bits",
    )
    counted = partial(Figure, measured=f"tokens of the {seen} validation images, {tokenizer.layout()}")
    usage, perplexity = fmean(found["usage"]), fmean(found["perplexity"])
    figures = [
        compared(
            name="psnr", title="PSNR", value=float(torch.cat(noise).mean()), unit="dB", definition=PSNR_DEFINITION
        ),
        compared(name="ssim", title="SSIM", value=float(torch.cat(similarity).mean()), definition=SSIM_DEFINITION),
        counted(name="codebook_usage", title="Codebook usage", value=usage, unit="share", definition=USAGE_DEFINITION),
        counted(
            name="codebook_perplexity",
            title="Codebook perplexity",
            value=perplexity,
            unit="codes",
            definition=PERPLEXITY_DEFINITION,
        ),
    ]
    return Reconstructions(figures, [counts.cpu() for counts in health.counts], pairs)
