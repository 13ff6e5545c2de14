"""Captions as the condition of a generator: what it takes for one, and prompts from a user."""

from __future__ import annotations

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
        UserError: there is no text.
    """
    path = Path(given)
    try:
        lines = path.read_text().splitlines() if len(given) < 256 and path.is_file() else [given]
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"--prompts: {path} cannot be read as text: {error}") from None
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise UserError("--prompts: there is no text; give one, or a file with one on each line")
    return prompts
