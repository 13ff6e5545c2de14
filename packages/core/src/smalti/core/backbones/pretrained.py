"""Weights of pretrained vision transformers, by timm name, hub name or file, under the names of our own blocks.

Legend: W width, p patch size, h w patch grid, R registers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.backbones.positions import resampled
from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.checkpoints.rules import Fused, Rename, Rule, to_ours
from smalti.core.errors import UserError
from smalti.core.weights import other_shapes

MISSING = "pretrained backbones need further packages: pip install 'smalti-core[pretrained]'"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# What stands before a backbone's names in files that hold more than it, e.g. Depth-Anything's.
PREFIXES = ("pretrained.", "visual.trunk.", "backbone.", "dinov2.", "encoder.")
# Heads that features do not need, and the token that only masked training needs.
HEADS = ("head.", "head_dist.", "fc_norm.", "attn_pool.", "pre_logits.", "decoder", "mask_token")

Statistics = tuple[float, float, float]
IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_DINOV2 = "encoder.layer.{i}"
DINOV2_OF_TRANSFORMERS: tuple[Rule, ...] = (
    Rename("embeddings.cls_token", "cls_token"),
    Rename("embeddings.mask_token", "mask_token"),
    Rename("embeddings.register_tokens", "register_tokens"),
    Rename("embeddings.position_embeddings", "pos_embed"),
    Rename("embeddings.patch_embeddings.projection.{entry}", "patch_embed.proj.{entry}"),
    Fused(
        tuple(f"{_DINOV2}.attention.attention.{part}.{{entry}}" for part in ("query", "key", "value")),
        "blocks.{i}.attn.qkv.{entry}",
    ),
    Rename(f"{_DINOV2}.attention.output.dense.{{entry}}", "blocks.{i}.attn.proj.{entry}"),
    *(Rename(f"{_DINOV2}.layer_scale{n}.lambda1", f"blocks.{{i}}.ls{n}.gamma") for n in (1, 2)),
    *(Rename(f"{_DINOV2}.norm{n}.{{entry}}", f"blocks.{{i}}.norm{n}.{{entry}}") for n in (1, 2)),
    *(Rename(f"{_DINOV2}.mlp.fc{n}.{{entry}}", f"blocks.{{i}}.mlp.fc{n}.{{entry}}") for n in (1, 2)),
    Rename("layernorm.{entry}", "norm.{entry}"),
)
TIMM: tuple[Rename, ...] = (
    Rename("cls_token", "class_token"),
    Rename("reg_token", "registers"),
    Rename("register_tokens", "registers"),
    Rename("pos_embed", "positions"),
    Rename("patch_embed.proj.{entry}", "patch.{entry}"),
    Rename("norm_pre.{entry}", "norm_pre.{entry}"),
    Rename("norm.{entry}", "norm.{entry}"),
    Rename("blocks.{i}.attn.qkv.{entry}", "blocks.{i}.attention.qkv.{entry}"),
    Rename("blocks.{i}.attn.proj.{entry}", "blocks.{i}.attention.out.{entry}"),
    Rename("blocks.{i}.mlp.fc1.{entry}", "blocks.{i}.mlp.0.{entry}"),
    Rename("blocks.{i}.mlp.fc2.{entry}", "blocks.{i}.mlp.2.{entry}"),
    *(Rename(f"blocks.{{i}}.norm{n}.{{entry}}", f"blocks.{{i}}.norm{n}.{{entry}}") for n in (1, 2)),
    *(Rename(f"blocks.{{i}}.ls{n}.gamma", f"blocks.{{i}}.scale{n}") for n in (1, 2)),
)


def load_vit(source: str, *, width: int, depth: int, patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """Weights of a pretrained ViT for a transformer of `ViTBlock`s.

    The patch kernel is resampled to the patch size by the pseudo-inverse of the resize (FlexiViT, Beyer et al. 2023),
    positions to the grid, bicubic with antialiasing. Normalisation eps, activation, and the mean and standard
    deviation of the images are not part of the weights: the caller builds its blocks as the backbone had them.

    Args:
        source: a timm name (`vit_base_patch14_dinov2.lvd142m`), a hub repository (`owner/name`) or a path.
        width: W of the receiving transformer.
        depth: its number of blocks.
        patch_size: p.
        grid: h and w.

    Returns:
        `patch.weight (W, 3, p, p)`, `positions (1, 1 + h w, W)` with the class token's first (zeros where there is
        none), `blocks.{i}.*` with the names of `ViTBlock`, `norm.*`; and where the source has them `patch.bias`,
        `class_token (1, 1, W)`, `registers (1, R, W)`, `norm_pre.*`, `blocks.{i}.scale1` and `scale2`.

    Raises:
        UserError: the source cannot be had, holds no plain ViT, or one of another width or depth.
    """
    found, foreign = to_ours(TIMM, vit_tensors(source))
    foreign = [name for name in foreign if not name.startswith(HEADS)]
    missing = [name for name in ("patch.weight", "positions", "norm.weight") if name not in found]
    if foreign or missing:
        problem = f"it has {foreign[0]}" if foreign else f"it lacks {missing[0]}"
        raise UserError(f"{source} cannot start a transformer of plain ViT blocks: {problem}")
    blocks = {name.split(".")[1] for name in found if name.startswith("blocks.")}
    if (found["patch.weight"].shape[0], len(blocks)) != (width, depth):
        raise UserError(
            f"{source} has {len(blocks)} blocks of width {found['patch.weight'].shape[0]}, "
            f"but {depth} blocks of width {width} shall start from it"
        )
    found["patch.weight"] = _resampled_patch(found["patch.weight"], patch_size)
    return _placed(found, grid, source)


def part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors under `name.`, without it: `part(weights, "blocks")`."""
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def fill(module: nn.Module, loaded: Mapping[str, Tensor], source: str, kind: str, fresh: Collection[str] = ()) -> None:
    """Start `module` from the weights of a pretrained source.

    Args:
        module: part of an encoder or a decoder.
        loaded: the weights, under its names.
        source: where they are from, for sentences.
        kind: the name of the component, for sentences.
        fresh: entries of the module that no source has.

    Raises:
        UserError: an entry that is missing, that the module does not have, or of another shape.
    """
    state = module.state_dict()
    misplaced = sorted((state.keys() - set(fresh)) ^ loaded.keys())
    wrong = [f"it {'has' if name in loaded else 'lacks'} {name}" for name in misplaced]
    wrong += [f"its {problem}" for problem in other_shapes(loaded, state)]
    if wrong:
        raise UserError(f"{source} cannot start a {kind}: {wrong[0]}")
    module.load_state_dict({**state, **loaded})


def image_statistics(source: str) -> tuple[Statistics, Statistics]:
    """Mean and standard deviation of the images in [0, 1] that a backbone was trained on, per channel.

    They are timm's for a name that timm knows; of anything else they are taken to be ImageNet's, which is right for
    MAE, DINO, DINOv2 and Depth-Anything v2, and wrong for CLIP.
    """
    if _local(source) is None and "/" not in source:
        published = _published(source)
        return published.mean, published.std
    return IMAGENET


def vit_tensors(source: str) -> dict[str, Tensor]:
    """A pretrained ViT's state dict in timm's names, from a path, a timm name or a hub repository.

    Files of MAE, DINO, DINOv2 and Depth-Anything v2 have these names, perhaps with a prefix; DINOv2 as `transformers`
    has it is renamed.

    Raises:
        UserError: it cannot be had, or is damaged.
    """
    path = _local(source)
    tensors = read_checkpoint(path if path is not None else _downloaded(source))
    for prefix in PREFIXES:
        inner = part(tensors, prefix.removesuffix("."))
        if "cls_token" in inner or "patch_embed.proj.weight" in inner or "embeddings.cls_token" in inner:
            tensors = inner
            break
    if "embeddings.cls_token" in tensors:
        tensors, foreign = to_ours(DINOV2_OF_TRANSFORMERS, tensors)
        if foreign:
            raise UserError(f"{source} is no DINOv2 of plain ViT blocks: it has {foreign[0]}")
    return tensors


def _local(source: str) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return next((path / name for name in WEIGHT_FILES if (path / name).exists()), path / WEIGHT_FILES[0])
    if path.exists():
        return path
    if path.is_absolute() or path.suffix in SUFFIXES or source.startswith((".", "~")):
        raise UserError(f"{source} does not exist; expected the weights of a pretrained ViT there")
    return None


def _downloaded(source: str) -> Path:
    """The weights' file in the hub's cache, fetched where the network allows it."""
    if source.count("/") == 1:
        return download(source, WEIGHT_FILES)
    published = _published(source)
    if not published.hf_hub_id:
        raise UserError(
            f"the weights of {source} are not on the hub: download {published.url} and give the path of that file "
            "instead of the name"
        )
    return download(str(published.hf_hub_id), (published.hf_hub_filename or WEIGHT_FILES[0], WEIGHT_FILES[1]))


def _published(name: str) -> Any:
    """What timm knows of its pretrained weights `name`."""
    timm = import_extra("timm")
    try:
        published = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # the architecture is known, the tag is not
        published = None
    if published is None or not published.has_weights:
        near = get_close_matches(name, timm.list_pretrained(), 1)
        hint = f"; the nearest name is {near[0]}" if near else ""
        raise UserError(f"timm has no pretrained weights called {name}{hint}")
    return published


def import_extra(module: str) -> Any:
    """A module of the extra `pretrained`; a `UserError` where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(MISSING) from None


def download(repository: str, files: tuple[str, ...]) -> Path:
    """The first of `files` that a hub repository has, in the cache or fetched into it.

    Raises:
        UserError: it is in no cache and cannot be fetched; says what to download and what to do with it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # What is in the cache needs no network; without one, the first file that is asked for tells it.
    for name, cached in [*((name, True) for name in files), *((name, False) for name in files)]:
        try:
            return Path(hf_hub_download(repository, name, local_files_only=cached))
        except HFValidationError:
            raise UserError(f"{repository} is neither a path here nor a hub name of the form owner/name") from None
        except LocalEntryNotFoundError:
            if not cached:
                break
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError):
            break
    raise UserError(
        f"{repository} is not in the hub's cache and could not be fetched: download "
        f"https://huggingface.co/{repository}/resolve/main/{files[0]} and give the path of that file "
        "instead of the name"
    )


def _resampled_patch(kernel: Tensor, patch_size: int) -> Tensor:
    if kernel.shape[-2:] == (patch_size, patch_size):
        return kernel
    resized: Tensor = import_extra("timm.layers").resample_patch_embed(kernel, [patch_size, patch_size])
    return resized


def _placed(found: dict[str, Tensor], grid: tuple[int, int], source: str) -> dict[str, Tensor]:
    """With a position of the class token, none of registers (it is added to them), and the others on the grid."""
    positions, found = found["positions"], dict(found)
    class_tokens = int("class_token" in found)
    registers = found["registers"].shape[1] if "registers" in found else 0
    # Which tokens in front have positions of their own differs; what remains has to be a square.
    prefixes = [n for n in (0, class_tokens, class_tokens + registers) if _is_square(positions.shape[1] - n)]
    if not prefixes:
        raise UserError(f"{source} cannot start ViT blocks: its {positions.shape[1]} positions are of no square grid")
    prefix = prefixes[0]
    if prefix > class_tokens:
        found["registers"] = found["registers"] + positions[:, class_tokens:prefix]
    front = positions[:, :class_tokens] if prefix else positions.new_zeros(1, 1, positions.shape[2])
    found["positions"] = resampled(torch.cat([front, positions[:, prefix:]], dim=1), grid, prefix=1)
    return found


def _is_square(number: int) -> bool:
    return number > 0 and math.isqrt(number) ** 2 == number
