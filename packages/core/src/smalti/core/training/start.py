"""Beginning a training with the weights of another: a run's, a saved tokenizer's, the zoo's, or a published file's."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.weights import CONFIG

OPTION = "train.tokenizer.start"
# Low-rank adapters begin as no change; a layer that has one keeps its own weight under this name (peft's).
ADAPTER, ADAPTED = ".lora_", ".base_layer."


def load_start(tokenizer: Tokenizer, source: str) -> None:
    """Give `tokenizer` the weights of `source`, averaged ones where there are any, in place.

    Args:
        tokenizer: as the recipe describes it, before optimizer and averaged weights are made.
        source: a folder (a run, or what `save_pretrained` wrote), a published file, or a name of the zoo or the hub.

    Raises:
        UserError: nothing usable there, or weights that do not fit the tokenizer.
    """
    found = _module(source).state_dict()
    wanted = {name.replace(ADAPTED, "."): tensor for name, tensor in tokenizer.state_dict().items()}
    if not any(ADAPTER in name for name in found):
        wanted = {name: tensor for name, tensor in wanted.items() if ADAPTER not in name}
    found = {name.replace(ADAPTED, "."): tensor for name, tensor in found.items()}
    problems = _problems(found, wanted)
    if problems:
        raise UserError(f"{OPTION}: {source} does not fit the recipe's tokenizer: {'; '.join(problems)}")
    for name, tensor in wanted.items():
        tensor.copy_(found[name])


def _module(source: str) -> nn.Module:
    path = Path(source)
    if path.is_file():
        from smalti.core.checkpoints.importing import import_checkpoint

        module = import_checkpoint(path)
        if not isinstance(module, Tokenizer):
            raise UserError(f"{OPTION}: {source} holds a {type(module).__name__}, not a tokenizer")
        return module
    if (path / "tokenizer" / CONFIG).is_file():
        path = path / "tokenizer"
    try:
        return Tokenizer.from_pretrained(path if path.is_dir() else source)
    except UserError as error:
        raise UserError(f"{OPTION}: {error}") from None


def _problems(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, should be {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    return [
        *([f"it lacks {_few(missing)}"] if missing else []),
        *([f"it has {_few(foreign)} too many"] if foreign else []),
        *shapes[:3],
    ]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
