"""Captions as the condition of a generator: what it takes for one, and prompts from a user."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from smalti.core.errors import UserError
from smalti.core.options import Options


class CaptionOptions(Options):
    """Captions as features of a text encoder (LlamaGen: FLAN-T5-XL).

    Args:
        length: positions of a caption; a shorter one stands at their end, and the rows before it are zero.
        width: of the features.
        encoder: the T5 of transformers that makes them, a folder or a hub repository; None where that is not known.
    """

    length: Annotated[int, Field(ge=1)] = 120
    width: Annotated[int, Field(ge=1)] = 2048
    encoder: str | None = None


def read_prompts(given: str) -> tuple[str, ...]:
    """The lines of a text file that are not empty; of what is no file, the text itself.

    Raises:
        UserError: there is no text, or the file cannot be read.
    """
    lines = [given]
    if os.path.isfile(given):  # noqa: PTH113  # of a text too long for a name, a Path would raise an error
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, OSError) as error:
            raise UserError(f"--prompts: {given} cannot be read as text: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError("--prompts: there is no text; give one, or a file with one on each line")
    return prompts
