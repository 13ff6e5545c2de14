"""Attention: the one place that chooses a kernel, and what may see what.

Torch's own `scaled_dot_product_attention` runs unless another kernel is asked for, by `SMALTI_ATTENTION=xformers` or
within `attention_kernel("xformers")`. A kernel is a function with the arguments of `attend`; `plain` is the formula
itself, with which the others are compared. The log, which the command line shows, says once for each kernel that it
runs. A compiled model keeps the kernel that was chosen when it was compiled.

Legend: B batch, T query positions, N key positions, H heads, d width of a head.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.errors import UserError

ENVIRONMENT = "SMALTI_ATTENTION"

_asked: ContextVar[str | None] = ContextVar("attention kernel", default=None)
_log = logging.getLogger("smalti.generation")


@dataclass(frozen=True)
class BlockCausal:
    """Blocks in a row, each of which sees itself and all before it (VAR, Tian et al. 2024).

    Args:
        sizes: positions of each block.
    """

    sizes: tuple[int, ...]


Mask = Literal["none", "causal"] | BlockCausal | Tensor
"""What a query sees: everything; itself and what is before; blocks; or a boolean tensor that `(B, H, T, N)` broadcasts
from, true where a query sees a key. The T queries are always the last of the N positions."""


# What is kept must be no inference tensor: training could not use it.


@cache
@torch.inference_mode(mode=False)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of the block of every position, `(sum of sizes,)`."""
    return torch.repeat_interleave(torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device))


def attend(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Mask, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, equation 1).

    Args:
        query: `(B, H, T, d)`.
        key: `(B, H, N, d)`.
        value: `(B, H, N, d)`.
        mask: what each query sees.
        scale: of the products; by default d^-0.5.
        dropout: chance to leave out an entry of the attention matrix.

    Returns:
        `(B, H, T, d)`.

    Raises:
        UserError: a kernel is asked for that is unknown or cannot be imported.
    """
    unmasked = isinstance(mask, str) and mask == "none"
    new, seen = query.shape[2], key.shape[2]
    assert unmasked or new <= seen, f"{new} queries cannot be the last of {seen} positions"
    if isinstance(mask, str) and new == 1:
        mask = "none"  # a single query is the last position and sees all
    name = _chosen(isinstance(mask, BlockCausal) and dropout == 0 and _has_flex(query))
    return KERNELS[name](query, key, value, mask, scale, dropout)


# The environment and the log are nothing that a graph could hold.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen(flex: bool) -> str:
    """The kernel that is asked for; `flex` says whether flex attention, for block masks in training, can run."""
    name = _asked.get() or os.environ.get(ENVIRONMENT) or "sdpa"
    if name not in KERNELS:
        raise UserError(f"unknown attention kernel {name!r}; there are {', '.join(KERNELS)}")
    if name == "flex" and not flex:
        name = "sdpa"
    _say(name)
    return name


def _has_flex(query: Tensor) -> bool:
    return query.is_cuda or not query.requires_grad  # on a CPU it has no backward pass


@contextmanager
def attention_kernel(name: str) -> Iterator[None]:
    """Let `attend` use this kernel within the block."""
    token = _asked.set(name)
    try:
        yield
    finally:
        _asked.reset(token)


@cache
def _say(name: str) -> None:
    _log.info("attention by %s", name)


def visible(mask: Mask, new: int, seen: int, device: torch.device) -> Tensor | None:
    """The mask as a boolean tensor that broadcasts to `(B, H, T, N)`; None where every query sees everything."""
    if isinstance(mask, Tensor):
        return mask
    if isinstance(mask, BlockCausal):
        sees: Tensor | None = _block_causal(mask.sizes, new, seen, device)
        return sees
    return torch.ones(new, seen, dtype=torch.bool, device=device).tril(seen - new) if mask == "causal" else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _block_causal(sizes: tuple[int, ...], new: int, seen: int, device: torch.device) -> Tensor | None:
    return _kept_block_causal(sizes, new, seen, device)


@cache
@torch.inference_mode(mode=False)
def _kept_block_causal(sizes: tuple[int, ...], new: int, seen: int, device: torch.device) -> Tensor | None:
    blocks = _blocks(sizes, device)[:seen]
    sees = blocks[seen - new :, None] >= blocks
    return None if bool(sees.all()) else sees


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None, dropout: float) -> Tensor:
    """The formula, as it is written."""
    scores = query @ key.transpose(2, 3) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    sees = visible(mask, query.shape[2], key.shape[2], query.device)
    if sees is not None:
        scores = scores.masked_fill(~sees, -torch.inf)
    return F.dropout(scores.softmax(-1), dropout) @ value


def _scaled_dot_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None, dropout: float
) -> Tensor:
    """Torch's own kernels."""
    new, seen = query.shape[2], key.shape[2]
    # Torch's own causal mask is aligned at the first position.
    causal = isinstance(mask, str) and mask == "causal" and new == seen
    sees = None if causal else visible(mask, new, seen, query.device)
    return F.scaled_dot_product_attention(query, key, value, sees, dropout, causal, scale=scale)


def _xformers(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None, dropout: float) -> Tensor:
    """Those of xformers, which take `(B, T, H, d)` and biases instead of masks."""
    operators = _xformers_operators()
    bias: Any = None
    if isinstance(mask, str):
        bias = operators.fmha.attn_bias.LowerTriangularFromBottomRightMask() if mask == "causal" else None
    elif (sees := visible(mask, query.shape[2], key.shape[2], query.device)) is not None:
        zeros = torch.zeros(*query.shape[:3], key.shape[2], dtype=query.dtype, device=query.device)
        bias = zeros.masked_fill(~sees, -torch.inf)
    rows = (tensor.transpose(1, 2) for tensor in (query, key, value))
    attended: Tensor = operators.memory_efficient_attention(*rows, attn_bias=bias, p=dropout, scale=scale)
    return attended.transpose(1, 2)


@cache
def _xformers_operators() -> Any:
    try:
        return importlib.import_module("xformers.ops")
    except ImportError as error:
        raise UserError(
            f"{ENVIRONMENT}=xformers needs the package xformers, which cannot be imported ({error})"
        ) from None


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float | None, dropout: float) -> Tensor:
    """Torch's flex attention, compiled on a GPU: blocks that nobody sees are never computed."""
    assert isinstance(mask, BlockCausal)
    assert dropout == 0
    from torch.nn.attention.flex_attention import flex_attention

    attention: Any = flex_attention
    if query.is_cuda:
        attention = _compiled(flex_attention)
    blocks = _flex_mask(mask, query.shape[2], key.shape[2], query.device)
    attended: Tensor = attention(query, key, value, block_mask=blocks, scale=scale)
    return attended


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@cache
@torch.inference_mode(mode=False)
def _flex_mask(mask: BlockCausal, new: int, seen: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = _blocks(mask.sizes, device)

    def sees(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return blocks[row + (seen - new)] >= blocks[column]

    return create_block_mask(sees, None, None, new, seen, device=str(device))


KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Mask, float | None, float], Tensor]] = {
    "sdpa": _scaled_dot_product,
    "xformers": _xformers,
    "flex": _flex,
    "plain": plain,
}
