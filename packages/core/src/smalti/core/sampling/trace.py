"""An animation of sampling: the order in which the tokens of images appear.

Over a grid, positions whose tokens are still to come are grey. A sequence has no place in the image and is decoded
with code 0 for what is to come; of scales, each frame is the latent up to one of them, decoded.

Legend: B images, L positions, S streams, H W pixels, h w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from smalti.core.data.images import VISIBLE_OF_MANY, enlargement, gif_bytes, grid, to_uint8
from smalti.core.errors import UserError
from smalti.core.files import write_bytes
from smalti.core.sampling.run import SamplingRun
from smalti.core.tokenizer import ComposedTokenizer

IMAGES = 8
COLUMNS = 4
FRAMES = 64  # the most of them: longer samplings are shown every few steps
SECONDS = 5.0
LAST_SECONDS = 2.0
GREY = 128

Picture = NDArray[np.uint8]


@torch.inference_mode()
def save_trace(run: SamplingRun, path: Path) -> None:
    """Write a GIF of how the first images of a run come about; they are those of the run itself.

    Raises:
        UserError: a generator of captions without any; scales of a tokenizer whose latent cannot be decoded scale by
            scale.
    """
    run.check_condition()
    indices = torch.arange(min(IMAGES, run.count), device=run.device)
    tokens, steps = run.generator.sample_traced(run.conditions_of(indices), run.settings, indices)
    shown = pictures(run, tokens, steps)
    columns, scale = min(COLUMNS, len(indices)), enlargement(shown[0].shape[1:3], VISIBLE_OF_MANY)
    frames = [Image.fromarray(grid(images, columns, scale)) for images in shown]
    each = max(20, round(1000 * SECONDS / len(frames)))
    write_bytes(path, gif_bytes(frames, each, round(1000 * LAST_SECONDS)))


def pictures(run: SamplingRun, tokens: Tensor, steps: Tensor) -> list[Picture]:
    """Frames, each uint8 `(B, H, W, 3)`, for tokens `(B, L, S)` that appeared at `steps` `(B, L)`."""
    kind = run.generator.token_layout.kind
    frame = {"grid": _over_grid, "sequence": _of_sequence, "scales": _of_scales}[kind](run, tokens, steps)
    return [frame(step).cpu().numpy() for step in shown_steps(int(steps.max()) + 1)]


def shown_steps(total: int) -> list[int]:
    """At most `FRAMES` steps of `total`, evenly spread, with the last."""
    return [(shown + 1) * total // min(total, FRAMES) - 1 for shown in range(min(total, FRAMES))]


def _over_grid(run: SamplingRun, tokens: Tensor, steps: Tensor) -> Callable[[int], Tensor]:
    layout = run.generator.token_layout
    images = to_uint8(run.tokenizer.decode(tokens, layout))
    (rows, columns), (height, width) = layout.shape[0], images.shape[1:3]
    row = torch.arange(height, device=tokens.device) * rows // height
    column = torch.arange(width, device=tokens.device) * columns // width
    appears = steps.unflatten(1, (rows, columns))[:, row][:, :, column, None]
    grey = torch.full_like(images, GREY)
    return lambda step: torch.where(appears <= step, images, grey)


def _of_sequence(run: SamplingRun, tokens: Tensor, steps: Tensor) -> Callable[[int], Tensor]:
    def frame(step: int) -> Tensor:
        there = torch.where(steps[..., None] <= step, tokens, 0)
        return to_uint8(run.tokenizer.decode(there, run.generator.token_layout))

    return frame


def _of_scales(run: SamplingRun, tokens: Tensor, steps: Tensor) -> Callable[[int], Tensor]:
    tokenizer = run.tokenizer
    if not isinstance(tokenizer, ComposedTokenizer):
        raise UserError(
            f"--trace of scales needs a composed tokenizer, whose latent grows from scale to scale; this is "
            f"{tokenizer.options.name!r}"
        )
    latents, total = [], None
    for scale in range(int(steps.max()) + 1):
        codes = tokenizer.quantizer.codes(tokens[:, steps[0] == scale], scale)
        total, _ = tokenizer.quantizer.advance(total, codes, scale)
        latents.append(total.clone())
    return lambda step: to_uint8(tokenizer.decode_latent(latents[step]))
