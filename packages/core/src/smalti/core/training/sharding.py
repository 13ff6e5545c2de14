"""Sharded training (FSDP2): the processes divide a model's weights, gradients, averages and optimizer states.

Each block, and what is left of the model, is gathered when its forward or backward pass needs it. What a forward pass
changes by itself stays whole on every process: buffers, and the weights of quantizers, which initialise and revive
codes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import register_dataclass, tree_map_only

from smalti.core import distributed
from smalti.core.autoencoder import Autoencoder, AutoencoderOutput
from smalti.core.contracts import Generator, Quantizer, Tokenizer, TokenizerOutput
from smalti.core.training.activations import blocks

Tree = TypeVar("Tree")
# FSDP looks for tensors in what a forward pass returns.
register_dataclass(TokenizerOutput)
register_dataclass(AutoencoderOutput)


def shard(model: nn.Module, device: torch.device, kept: Iterable[nn.Parameter] = ()) -> None:
    """Divide a model over all processes, in place.

    Args:
        model: with the same weights on all processes.
        device: of this process.
        kept: parameters that stay whole, beside those of quantizers.
    """
    model.to(device)
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    whole_ones = {*kept, *(weight for quantizer in quantizers for weight in quantizer.parameters())}
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh, ignored_params=whole_ones)
    fully_shard(model, mesh=mesh, ignored_params=whole_ones)
    called_by_validation = {
        Tokenizer: ("encode", "decode"),
        Autoencoder: ("encode", "decode"),
        Generator: ("logits",),
    }
    for kind, methods in called_by_validation.items():
        for method in methods:
            if isinstance(model, kind) and hasattr(model, method):
                register_fsdp_forward_method(model, method)


def is_sharded(model: nn.Module) -> bool:
    """Whether its weights are divided over processes."""
    return isinstance(model, FSDPModule)


def average_whole(gradients: Iterable[Tensor]) -> None:
    """Average over the processes those gradients that are not sharded, for which FSDP does not do it."""
    for gradient in gradients:
        if not isinstance(gradient, DTensor):
            dist.all_reduce(gradient)
            gradient.div_(distributed.world_size())


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, of which some may be sharded."""
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    if not parts:
        return nn.utils.get_total_norm(gradients)
    squared = distributed.all_reduce_sum(nn.utils.get_total_norm(parts).square())
    rest = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    return torch.sqrt(squared + nn.utils.get_total_norm(rest).square() if rest else squared)


def clip(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of norm `norm` together down to `limit` in place, as `torch.nn.utils.clip_grad_norm_` does."""
    torch._foreach_mul_([local(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1.0))


def whole(tree: Tree) -> Tree:
    """Tensors in containers, with sharded ones gathered on the CPU of the first process; to be called by all.

    On the other processes nothing of those is kept: empty tensors take their places.
    """

    def gathered(tensor: DTensor) -> Tensor:
        full: Tensor = tensor.full_tensor().detach()
        return full.cpu() if distributed.rank() == 0 else full.new_empty(0)

    joined: Tree = tree_map_only(DTensor, gathered, tree)
    return joined


def divided(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, sharded as `like` is if that is."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill a model, sharded or not, from whole tensors."""
    own = model.state_dict()
    model.load_state_dict({name: divided(tensor, own[name]) for name, tensor in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Fill the optimizer of a model, sharded or not, from whole tensors."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        number: {
            name: divided(value, weights[number]) if value.shape == weights[number].shape else value
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
