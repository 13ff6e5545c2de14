"""Training state on disk: everything needed to go on exactly, in one file that is whole or absent."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from smalti.core.errors import UserError
from smalti.core.files import write_bytes


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data to `path`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any] | None:
    """Read what `save_state` wrote, onto the CPU; None where there is nothing."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        first = (str(error).splitlines() or ["empty"])[0]
        raise UserError(f"the checkpoint {path} is damaged ({first}); remove it to train from the start") from None
    assert isinstance(state, dict)
    return state
