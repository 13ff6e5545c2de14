"""Beginning a training with the weights of others: a run's, a saved model's, the zoo's, or a published file's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from smalti.core.autoencoder import Autoencoder
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError, few
from smalti.core.files import read_json
from smalti.core.training.options import Start
from smalti.core.weights import CONFIG, Pretrained, other_shapes

# Low-rank adapters begin as no change; a layer that has one keeps its own weight under this name (peft's).
ADAPTER, ADAPTED = ".lora_", ".base_layer."


def load_start(model: Tokenizer | Autoencoder, start: str | Sequence[Start]) -> None:
    """Give `model` the weights of others, averaged ones where there are any, in place.

    Args:
        model: as the recipe describes it, before optimizer and averaged weights are made.
        start: where all weights come from, or those of parts.

    Raises:
        UserError: nothing usable there, a part that is not there, or weights that do not fit the model.
    """
    starts = (Start(source=start),) if isinstance(start, str) else start
    option = f"train.{model.kind}.start"
    state = {name.replace(ADAPTED, "."): tensor for name, tensor in model.state_dict().items()}
    for each in starts:
        try:
            found = _part(_module(each.source, model).state_dict(), each.part, each.source)
            wanted = _part(state, each.into, f"the recipe's {model.kind}")
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
        # What another start fills more closely is its own.
        others = [other.into for other in starts if other is not each and below(other.into, each.into)]
        found, wanted = (_placed(tensors, each.into, others) for tensors in (found, wanted))
        if not any(ADAPTER in name for name in found):
            wanted = {name: tensor for name, tensor in wanted.items() if ADAPTER not in name}
        problems = _problems(found, wanted)
        if problems:
            raise UserError(f"{option}: {each.source} does not fit the recipe's {model.kind}: {'; '.join(problems)}")
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def below(name: str, part: str) -> str | None:
    """What a dotted `name` is called within `part`: empty for the part itself, None for what is elsewhere."""
    if not part or name == part:
        return "" if name == part else name
    return name.removeprefix(f"{part}.") if name.startswith(f"{part}.") else None


def no_such_part(names: Iterable[str], part: str, where: str) -> UserError:
    """The sentence about a `part` that none of the dotted names begins with; it lists what there is in its place."""
    names = list(names)
    *parents, _ = part.split(".")
    while parents and not any(below(name, ".".join(parents)) for name in names):
        parents.pop()
    parent = ".".join(parents)
    there = sorted({inner.split(".")[0] for name in names if (inner := below(name, parent))})
    listed = ", ".join(f"{parent}.{name}" if parent else name for name in there)
    return UserError(f"{where} has no part {part!r}, there are {listed}")


def _part(state: dict[str, Tensor], part: str, where: str) -> dict[str, Tensor]:
    """The tensors of a part under their names within it."""
    inner = {name.replace(ADAPTED, "."): tensor for name, tensor in state.items()}
    found = {rest: tensor for name, tensor in inner.items() if (rest := below(name, part)) is not None}
    if not found:
        raise no_such_part(inner, part, where)
    return found


def _placed(tensors: dict[str, Tensor], into: str, others: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a part under the model's names, without those of other parts."""
    names = {name: ".".join(filter(None, (into, name))) for name in tensors}
    return {
        name: tensors[inner] for inner, name in names.items() if all(below(name, other) is None for other in others)
    }


def _module(source: str, model: Tokenizer | Autoencoder) -> nn.Module:
    path = Path(source)
    if path.is_file():
        from smalti.core.checkpoints.importing import import_checkpoint

        module = import_checkpoint(path)
        if not isinstance(module, Tokenizer | Autoencoder):
            raise UserError(f"{source} holds a {type(module).__name__}, not a tokenizer or an autoencoder")
        return module
    for kind in (Tokenizer.kind, Autoencoder.kind):
        if (path / kind / CONFIG).is_file():
            path = path / kind
    found = _kind(path, model).from_pretrained(path if path.is_dir() else source)
    assert isinstance(found, nn.Module)
    return found


def _kind(path: Path, model: Tokenizer | Autoencoder) -> type[Pretrained]:
    """What a folder holds, or a name of the zoo is; a name of the hub is taken for what the model is."""
    from smalti.core.checkpoints.zoo import zoo

    config = read_json(path / CONFIG, "the configuration of a model") if (path / CONFIG).is_file() else {}
    known = zoo().get(str(path))
    kind = config.get("kind") if isinstance(config, dict) and config else known.kind if known else model.kind
    return Autoencoder if kind == Autoencoder.kind else Tokenizer


def _problems(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    return [
        *([f"it lacks {few(missing)}"] if missing else []),
        *([f"it has {few(foreign)} too many"] if foreign else []),
        *other_shapes(found, wanted)[:3],
    ]
