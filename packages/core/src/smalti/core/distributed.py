"""Which of how many processes this is; one process needs no setup, `torchrun` sets the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from smalti.core.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process, 0 to `world_size() - 1`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over all processes, written into `tensor` and returned."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gather_cat(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` of all processes, joined along the first axis in the order of ranks; equal shapes."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def gather_objects(item: T) -> list[T]:
    """`item` of every process, in the order of ranks, on all of them."""
    if not dist.is_initialized():
        return [item]
    items: list[T] = [item] * world_size()
    dist.all_gather_object(items, item)
    return items


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the group of the processes that `torchrun` started, if it did, and leave it at the end.

    Collectives are NCCL's on CUDA, gloo's on the CPU.

    Yields:
        The device of this process, see `chosen_device`.
    """
    name = chosen_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    try:
        yield name
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def chosen_device(requested: str) -> str:
    """The device of this process, which becomes the current one.

    Args:
        requested: `auto` is CUDA where there is some, else the CPU; `cuda` is that of the process's local rank.

    Raises:
        UserError: there is no such device, or none that can be used here.
    """
    name = requested
    if requested == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"there is no device {requested!r}: give cpu, cuda or auto") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second where PyTorch was built without it
        reason = str(error).partition("\n")[0]
        raise UserError(f"device {requested!r} cannot be used ({reason}): give cpu, cuda or auto") from None
    if device.type == "cuda":  # what names no device goes to the current one: accelerate, NCCL, Triton
        torch.cuda.set_device(device)
    return name
