"""Linear layers packed for decoding on a CPU, where reading the weights is what a token costs.

torch multiplies float32 matrices by MKL, which is slow where one of them has few rows. oneDNN with the weights in its
own order is faster, and as exact; bfloat16 and int8 weights are fewer bytes, and change the result.

Legend: R rows of the input, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from smalti.core.matmul import has_packed_products
from smalti.generation.huge_pages import COLLAPSE, ask_for_huge_pages

Precision = Literal["full", "bfloat16", "int8"]
Product = Callable[[Tensor], Tensor]

_INT8_INPUTS = 16

# The packed form of a layer, with what tells whether its weights are still the same, and the weights themselves: their
# memory must not become that of others meanwhile.
_packed: WeakKeyDictionary[nn.Linear, tuple[object, Product, Tensor]] = WeakKeyDictionary()


@contextmanager
def packed_weights(module: nn.Module, precision: Precision = "full") -> Iterator[None]:
    """Let the linear layers below `module` compute with packed weights within the block, without gradients.

    Nothing happens to layers that are not float32 on a CPU. What was packed is kept for the next time, and packed
    again when weights have changed. In float32 the results differ in rounding only.

    Args:
        module: a generator, or a part of it.
        precision: of the weights, and for `bfloat16` of the products: `full` is float32.
    """
    layers = [part for part in module.modules() if type(part) is nn.Linear and _can_be_packed(part)]
    if not layers or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        yield
        return
    for layer in layers:
        layer.forward = _product(layer, precision)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _can_be_packed(layer: nn.Linear) -> bool:
    return (
        "forward" not in vars(layer)  # of a block around this one
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and has_packed_products()
    )


def _product(layer: nn.Linear, precision: Precision) -> Product:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if layer.weight.is_inference():  # such a tensor does not count its changes
        return _PACKERS[precision](weight, bias)
    parts = [layer.weight] if bias is None else [layer.weight, layer.bias]
    state = (precision, *((part.data_ptr(), part._version) for part in parts))
    known = _packed.get(layer)
    if known is None or known[0] != state:
        known = (state, _PACKERS[precision](weight, bias), weight)
        _packed[layer] = known
    return known[1]


def _reordered(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    ask_for_huge_pages(torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed), COLLAPSE)
    return packed


def _full(weight: Tensor, bias: Tensor | None) -> Product:
    packed = _reordered(weight.contiguous())
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _bfloat16(weight: Tensor, bias: Tensor | None) -> Product:
    packed = _reordered(weight.bfloat16())
    rounded = None if bias is None else bias.bfloat16()

    def product(x: Tensor) -> Tensor:
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, rounded, "none", [], "")
        return outputs.float()

    return product


def _int8(weight: Tensor, bias: Tensor | None) -> Product:
    """One scale per output: weight is about scale * integer, the largest of a row 127.

    Layers whose inputs are no multiple of 16 stay in float32: torch's operator reads beyond the end of their weights.
    """
    if weight.shape[1] % _INT8_INPUTS:
        return _full(weight, bias)
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    integers = (weight / scale[:, None]).round().to(torch.int8)
    scale = scale.bfloat16()

    def product(x: Tensor) -> Tensor:
        rows = x.bfloat16().reshape(-1, x.shape[-1])
        outputs = torch._weight_int8pack_mm(rows, integers, scale).float().view(*x.shape[:-1], len(integers))
        return outputs if bias is None else outputs + bias

    return product


_PACKERS: dict[Precision, Callable[[Tensor, Tensor | None], Product]] = {
    "full": _full,
    "bfloat16": _bfloat16,
    "int8": _int8,
}
