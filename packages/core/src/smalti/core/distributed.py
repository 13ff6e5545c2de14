"""Which of how many processes this is; one process needs no setup, `torchrun` sets the rest."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def initialise(device: str) -> None:
    """Make `device` the current one, and join the process group that `torchrun` describes in the environment, if any.

    Collectives are NCCL's on CUDA, gloo's on the CPU.
    """
    if device.startswith("cuda:"):  # what names no index goes there: accelerate, NCCL, Triton
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


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


def device_name(requested: str) -> str:
    """`auto` becomes this process's CUDA device, or the CPU; anything else stays."""
    if requested != "auto":
        return requested
    if torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "cpu"
