"""Training state on disk: everything needed to go on exactly, in one file that is whole or absent."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from smalti.core.data.position import merged
from smalti.core.errors import UserError
from smalti.core.files import write_bytes
from smalti.core.training.token_health import redistributed


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
        with zipfile.ZipFile(path) as archive:
            if (wrong := archive.testzip()) is not None:  # torch does not look at checksums
                raise zipfile.BadZipFile(f"{wrong} is not what was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # broken pickles raise errors of all types
        first = (str(error).splitlines() or ["empty"])[0][:200]
        raise UserError(f"the checkpoint {path} is damaged ({first}); remove it to train from the start") from None
    if not isinstance(state, dict):
        raise UserError(f"{path} is no checkpoint of a training; remove it to train from the start")
    return state


def own_state(states: Sequence[dict[str, Any]], rank: int, processes: int) -> dict[str, Any]:
    """What a process goes on with, out of what each process of an earlier run wrote, by rank.

    As many processes as before take over one state each. Others share the stream of records from where all of them
    were; sums go to the first; the tokens that were looked at are dealt out.

    Args:
        states: each with `batches`, `sums`, `summed`, and perhaps `health`.
        rank: of this process.
        processes: how many there are now.
    """
    if len(states) == processes:
        return states[rank]
    sums: Counter[str] = Counter()
    for state in states:
        sums.update(state["sums"])
    own: dict[str, Any] = {
        "batches": merged([state["batches"] for state in states]),
        "sums": dict(sums) if rank == 0 else dict.fromkeys(sums, 0.0),
        "summed": sum(state["summed"] for state in states) if rank == 0 else 0,
    }
    if "health" in states[0]:
        own["health"] = redistributed([state["health"] for state in states], rank, processes)
    return own
