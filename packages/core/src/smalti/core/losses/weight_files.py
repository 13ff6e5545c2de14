"""Where the weights of the networks inside losses are looked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError

COUNTER = "num_batches_tracked"


def weight_file(given: Path | None, *, option: str, what: str, url: str, elsewhere: tuple[Path, ...] = ()) -> Path:
    """The file with a network's weights: the given one, or that of torch hub's cache.

    Args:
        given: a path from the options.
        option: the option that takes such a path, for the error.
        what: whose weights these are, for the error.
        url: where they are published; its last part is the name in the cache.
        elsewhere: more files to look for, after the cache.

    Raises:
        UserError: there is none; it says what to download and where to put it.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.exists():
            raise UserError(f"{option}: {path} does not exist; expected the weights of {what} there, from {url}")
        return path
    cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    for path in (cached, *elsewhere):
        if path.exists():
            return path
    raise UserError(f"the weights of {what} are missing: download {url} to {cached}, or give a file as {option}")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load all of `module` from `tensors`, which may hold more; `path` is named where they do not fit.

    Old files have no counters of batch normalisation, which nothing reads: they become 0.

    Raises:
        UserError: something is missing or has another shape.
    """
    state = module.state_dict()
    tensors = {**{name: torch.zeros_like(state[name]) for name in state if name.endswith(COUNTER)}, **tensors}
    for name, wanted in state.items():
        if name not in tensors:
            raise UserError(f"{path} does not hold the weights of {type(module).__name__}: it lacks {name}")
        if tensors[name].shape != wanted.shape:
            raise UserError(
                f"{path} does not hold the weights of {type(module).__name__}: {name} is "
                f"{tuple(tensors[name].shape)}, should be {tuple(wanted.shape)}"
            )
    module.load_state_dict({name: tensors[name] for name in state})
