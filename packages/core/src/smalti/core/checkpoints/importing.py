"""Importing a published checkpoint as a module of ours, and exporting one back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.checkpoints.layout import CheckpointLayout, Shapes
from smalti.core.checkpoints.rules import to_ours, to_published
from smalti.core.errors import UserError, few
from smalti.core.files import atomic_write, read_json
from smalti.core.options import sentences
from smalti.core.overrides import apply_override, differences
from smalti.core.plugins import registry
from smalti.core.weights import CONFIG, Pretrained, other_shapes, save_tensors

MOST = 8  # names in a sentence
# The options that decide what a network computes with its weights, and those among them that only training sees.
NETWORKS = ("encoder", "decoder", "embed")
TRAINING_ONLY = ("dropout", "last_dropout", "drop_path", "share", "learn_anchors", "learn_features", "final_scale")
BESIDE_OPTIONS = ("layout", "classes")
# What looking into shapes raises where they are others than a layout's, and building modules from them.
MISSHAPEN = (IndexError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def layouts() -> list[CheckpointLayout]:
    """Every published layout that is installed."""
    return [registry().load("checkpoint", name)() for name in registry().names("checkpoint")]


def recognised(shapes: Shapes, where: str = "the state dict") -> CheckpointLayout:
    """The one layout that these names and shapes belong to; `where` says in errors whose they are.

    Raises:
        UserError: they belong to none, or to several.
    """
    found = [layout for layout in layouts() if _recognises(layout, shapes)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(layout.name for layout in found)
        raise UserError(f"{where} may be of any of the layouts {names}: say which one")
    raise UserError(
        f"{where} is of no known layout, it has {len(shapes)} entries ({few(sorted(shapes), MOST)}); "
        f"known: {', '.join(registry().names('checkpoint')) or 'none'}"
    )


def _recognises(layout: CheckpointLayout, shapes: Shapes) -> bool:
    try:
        return layout.recognises(shapes)
    except MISSHAPEN:
        return False


class Imported(NamedTuple):
    """A module in evaluation mode, and the name of the layout that its file was read as."""

    module: nn.Module
    layout: str


def import_checkpoint(
    source: str | Path | Mapping[str, Tensor],
    layout: str | None = None,
    overrides: Sequence[str] = (),
    *,
    ema: bool = True,
) -> nn.Module:
    """A module of ours with the weights of a published checkpoint.

    Args:
        source: a published file, a folder with `model.safetensors`, or its state dict.
        layout: name of the layout; recognised from the names and shapes where it is not given.
        overrides: options that names and shapes cannot tell, by dotted path, e.g. `quantizer.commitment_weight=0.25`;
            of a generator also `layout.shape=[[24, 24]]` and `classes=10`.
        ema: take averaged weights where there are any.

    Returns:
        A `Tokenizer`, `Generator` or `Autoencoder` in evaluation mode.

    Raises:
        UserError: an unreadable file, an unknown layout, entries that are missing, of another shape or unexpected.
    """
    return import_recognised(source, layout, overrides, ema=ema).module


def import_recognised(
    source: str | Path | Mapping[str, Tensor],
    layout: str | None = None,
    overrides: Sequence[str] = (),
    *,
    ema: bool = True,
) -> Imported:
    """As `import_checkpoint`, telling the layout as well."""
    if isinstance(source, str | Path):
        where, tensors = str(source), read_checkpoint(source, ema=ema)
    else:
        where, tensors = "the state dict", dict(source)
    chosen = recognised(_shapes(tensors), where) if layout is None else _layout(layout)
    selected = chosen.select(tensors, ema=ema)
    published = _published_overrides(chosen, Path(source)) if isinstance(source, str | Path) else []
    config = configured(chosen, _shapes(selected), [*published, *overrides])
    module = _built(config, chosen.name, where)
    found = translated(chosen, config, selected, module.state_dict(), where)
    module.load_state_dict(found)
    return Imported(module.eval(), chosen.name)


def _built(config: Mapping[str, Any], layout: str, where: str) -> nn.Module:
    try:
        module = module_class(config["kind"]).from_config(config)
    except UserError:
        raise
    except MISSHAPEN as error:
        raise UserError(f"no {config['kind']} can be built from {where}, read as {layout}: {error}") from error
    assert isinstance(module, nn.Module)
    return module


def _published_overrides(layout: CheckpointLayout, source: Path) -> list[str]:
    """What the publisher's own `config.json` in a folder tells, where there is one."""
    path = source / CONFIG
    content = read_json(path, "the publisher's configuration") if path.is_file() else {}
    try:
        return layout.overrides(content)
    except (AttributeError, *MISSHAPEN):
        raise UserError(f"{path} is not the configuration that belongs to the layout {layout.name}") from None


def configured(layout: CheckpointLayout, shapes: Shapes, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration that a layout finds in names and shapes, with `overrides` of its options by dotted path.

    Raises:
        UserError: an entry from which the configuration follows is missing, or has a shape that cannot be.
    """
    try:
        config = layout.config(shapes)
    except KeyError as error:
        raise UserError(f"the weights lack {error.args[0]}, without which the layout {layout.name} cannot be") from None
    except UserError:
        raise
    except MISSHAPEN as error:
        raise UserError(f"these shapes cannot be those of weights of the layout {layout.name}") from error
    for override in overrides:
        # What a generator knows beside its options, its layout and the number of classes, is named as it is.
        own = override.partition("=")[0].partition(".")[0]
        apply_override(config if own in BESIDE_OPTIONS and own in config else config["options"], override)
    return config


def translated(
    layout: CheckpointLayout,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    where: str,
) -> dict[str, Tensor]:
    """Published tensors under our names, in our dtypes; exactly the entries of `wanted`.

    Raises:
        UserError: an entry that is missing, of another shape, or that the layout does not know.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not layout.is_ignored(name)}
    try:
        ours, unknown = to_ours(layout.rules(config), kept)
    except UserError:
        raise
    except MISSHAPEN as error:
        reason = "shapes of entries that belong together do not fit"
        raise UserError(f"{where} is not a whole checkpoint of the layout {layout.name}: {reason}") from error
    foreign = [*unknown, *sorted(ours.keys() - wanted.keys())]
    missing = sorted(wanted.keys() - ours.keys())
    problems = [
        *([f"unexpected {few(foreign, MOST)}"] if foreign else []),
        *([f"missing {few(missing, MOST)}"] if missing else []),
        *other_shapes(ours, wanted)[:3],
    ]
    if problems:
        raise UserError(f"{where} is not a whole checkpoint of the layout {layout.name}: {'; '.join(problems)}")
    return {name: tensor.to(wanted[name].dtype) for name, tensor in ours.items()}


def export_checkpoint(module: nn.Module | Pretrained, layout: str) -> dict[str, Tensor]:
    """The state dict of a module under the names of a published layout.

    Raises:
        UserError: the module is not one that the layout can hold.
    """
    assert isinstance(module, Pretrained)
    assert isinstance(module, nn.Module)
    chosen = _layout(layout)
    config = module.config()
    try:
        rules = chosen.rules(config)
    except (KeyError, TypeError) as error:
        detail = f"its options have no {error.args[0]}" if isinstance(error, KeyError) else "it is made of other parts"
        raise UserError(f"this {module.kind} cannot be written in the layout {layout}: {detail}") from None
    published, unknown = to_published(rules, module.state_dict())
    shapes = _shapes(published)
    detail = (
        f"it has no place for {few(unknown, MOST)}" if unknown
        else "its names and shapes are others" if not _recognises(chosen, shapes)
        else _lost(chosen, shapes, config["options"])
    )  # fmt: skip
    if detail:
        raise UserError(f"this {module.kind} cannot be written in the layout {layout}: {detail}")
    return published


def _lost(layout: CheckpointLayout, shapes: Shapes, options: Mapping[str, Any]) -> str:
    """What an import of `shapes` would stumble over, or take otherwise in the networks; empty where nothing."""
    try:
        config = configured(layout, shapes)
        chosen = registry().options(config["kind"], config["options"]["name"])
        taken = chosen.model_validate(config["options"]).model_dump(mode="json")
    except ValidationError as error:
        return f"an import would be refused, {sentences(error)}"
    except UserError as error:
        return str(error)
    for part in NETWORKS:
        if isinstance(taken.get(part), dict):
            for line in differences(options.get(part), taken[part], part):
                if line.partition(":")[0].rpartition(".")[2] not in TRAINING_ONLY:
                    return f"no file of it tells {line.partition(':')[0]}, and an import would take another value"
    return ""


def export_file(module: nn.Module | Pretrained, layout: str, path: Path) -> int:
    """Write a module as a file of a published layout, whole or not at all; returns the number of entries.

    Args:
        module: one that the layout can hold.
        layout: its name.
        path: `.safetensors`, or one of `PICKLES`, which then has the publisher's container.

    Raises:
        UserError: as `export_checkpoint`, another suffix, or a file that cannot be written.
    """
    if path.suffix not in (".safetensors", *PICKLES):
        raise UserError(f"{path} must end in .safetensors, {', '.join(PICKLES[:-1])} or {PICKLES[-1]}")
    tensors = export_checkpoint(module, layout)
    if path.suffix == ".safetensors":
        save_tensors(path, tensors)
        return len(tensors)
    whole = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    container = _layout(layout).container
    with atomic_write(path) as file:
        torch.save(whole if container is None else {container: whole}, file)
    return len(tensors)


def _layout(name: str) -> CheckpointLayout:
    layout: CheckpointLayout = registry().load("checkpoint", name)()
    return layout


def module_class(kind: str | None) -> type[Pretrained]:
    """The class of ours for a `kind`, e.g. `Tokenizer`."""
    from smalti.core.autoencoder import Autoencoder
    from smalti.core.contracts import Generator, Tokenizer

    classes: dict[str, Any] = {"tokenizer": Tokenizer, "generator": Generator, "autoencoder": Autoencoder}
    if kind not in classes:
        raise UserError(f"{kind!r} is no kind of model; there are {', '.join(classes)}")
    found: type[Pretrained] = classes[kind]
    return found


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
