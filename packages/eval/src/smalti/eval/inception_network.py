"""The Inception network of FID, arranged to run fast: torch-fidelity's weights, the same features.

Batch normalisation is folded into the convolutions, the 1 x 1 convolutions that read the same input are one, the
average pool comes after the 1 x 1 convolution beside it (both are linear: they may change places, and there are then
a quarter of the channels to average), memory is channels last.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

SIDE = 299
SPATIAL_CHANNELS = 7  # of the block `mixed_6` in TensorFlow's graph, what ADM's sFID looks at
SPATIAL_BLOCK = "Mixed_6d"

Pool = Literal["average", "max", "shrinking"]
Step = str | tuple[str, str]  # a convolution, or two that read the same and are joined

_A: Sequence[Sequence[Step]] = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
)
_B: Sequence[Sequence[Step]] = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
_C: Sequence[Sequence[Step]] = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
)
_D: Sequence[Sequence[Step]] = (
    ("branch3x3_1", "branch3x3_2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
)
_E: Sequence[Sequence[Step]] = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
)
BLOCKS: Mapping[str, tuple[Sequence[Sequence[Step]], Pool]] = {
    "Mixed_5b": (_A, "average"),
    "Mixed_5c": (_A, "average"),
    "Mixed_5d": (_A, "average"),
    "Mixed_6a": (_B, "shrinking"),
    "Mixed_6b": (_C, "average"),
    "Mixed_6c": (_C, "average"),
    "Mixed_6d": (_C, "average"),
    "Mixed_6e": (_C, "average"),
    "Mixed_7a": (_D, "shrinking"),
    "Mixed_7b": (_E, "average"),
    "Mixed_7c": (_E, "max"),  # as in TensorFlow's graph, where all other blocks average
}
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3")
STEM_AFTER_POOL = ("Conv2d_3b_1x1", "Conv2d_4a_3x3")


class InceptionNetwork(nn.Module):
    """From normalised images to the features of FID, sFID and the Inception Score.

    Args:
        published: torch-fidelity's `FeatureExtractorInceptionV3` with its weights; it is not changed.
    """

    def __init__(self, published: nn.Module) -> None:
        super().__init__()
        self.stem = nn.ModuleList(_folded(published.get_submodule(name)) for name in STEM)
        self.stem_after_pool = nn.ModuleList(_folded(published.get_submodule(name)) for name in STEM_AFTER_POOL)
        self.blocks = nn.ModuleDict(
            {name: _Block(published.get_submodule(name), *arrangement) for name, arrangement in BLOCKS.items()}
        )
        head: Any = published.get_submodule("fc")
        self.register_buffer("class_weights", head.weight.detach().clone())
        self.class_weights: Tensor
        self.requires_grad_(requires_grad=False).eval()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images `(B, 3, 299, 299)`, about [-1, 1], to `pool (B, 2048)`, `spatial (B, 2023)`, `logits (B, 1008)`.

        `spatial` is laid out like ADM's, rows, columns, channels; `logits` are without bias, as in ADM and
        torch-fidelity's `logits_unbiased`.
        """
        x = images.contiguous(memory_format=torch.channels_last)
        for convolution in self.stem:
            x = F.relu(convolution(x), inplace=True)
        x = F.max_pool2d(x, 3, 2)
        for convolution in self.stem_after_pool:
            x = F.relu(convolution(x), inplace=True)
        x = F.max_pool2d(x, 3, 2)
        spatial = x
        for name, block in self.blocks.items():
            x = block(x)
            if name == SPATIAL_BLOCK:
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool = x.mean((2, 3))
        return pool, spatial, pool @ self.class_weights.T


class _Block(nn.Module):
    """Branches side by side, and a pool."""

    def __init__(self, published: nn.Module, branches: Sequence[Sequence[Step]], pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        chains = [[_step(published, step) for step in branch] for branch in branches]
        first = [chain[0] for chain in chains]
        # All of these read the block's input: one convolution instead of up to four.
        self.pointwise = [place for place, step in enumerate(first) if _is_pointwise(step)]
        shared = [first[place] for place in self.pointwise]
        self.pooled = _folded(published.get_submodule("branch_pool")) if pool == "max" else None
        if pool == "average":
            shared.append(_folded(published.get_submodule("branch_pool")))
        self.widths = [step.out_channels for step in shared]
        self.shared = _joined(shared)
        self.chains = nn.ModuleList(
            nn.ModuleList(chain[1:] if place in self.pointwise else chain) for place, chain in enumerate(chains)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of all branches, joined."""
        parts = self.shared(x).split(self.widths, 1)
        starts = dict(zip(self.pointwise, parts, strict=False))
        outputs = []
        chain: Any  # a list of modules
        for place, chain in enumerate(self.chains):
            y = F.relu(starts[place]) if place in starts else x
            for step in chain:
                y = F.relu(step(y), inplace=True)
            outputs.append(y)
        if self.pool == "average":
            y = F.relu(F.avg_pool2d(parts[-1], 3, 1, 1, count_include_pad=False))
        elif self.pooled is not None:
            y = F.relu(self.pooled(F.max_pool2d(x, 3, 1, 1)))
        else:
            y = F.max_pool2d(x, 3, 2)
        return torch.cat([*outputs, y], 1)


class _Fork(nn.Module):
    """Two convolutions of the same input, joined."""

    def __init__(self, one: nn.Conv2d, other: nn.Conv2d) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.other(x)], 1)


def _step(published: nn.Module, step: Step) -> Any:
    if isinstance(step, str):
        return _folded(published.get_submodule(step))
    return _Fork(*(_folded(published.get_submodule(name)) for name in step))


def _is_pointwise(step: Any) -> bool:
    return isinstance(step, nn.Conv2d) and step.kernel_size == (1, 1)


def _folded(block: Any) -> nn.Conv2d:
    """The convolution with the batch normalisation after it inside; folded in float64, so that it rounds once."""
    folded: nn.Conv2d = fuse_conv_bn_eval(copy.deepcopy(block.conv).double(), copy.deepcopy(block.bn).double())
    return folded.to(block.conv.weight.dtype)


def _joined(convolutions: Sequence[nn.Conv2d]) -> nn.Conv2d:
    """One convolution with the outputs of several 1 x 1 convolutions one after the other."""
    weights = torch.cat([convolution.weight.detach() for convolution in convolutions])
    biases = [convolution.bias.detach() for convolution in convolutions if convolution.bias is not None]
    joined = nn.Conv2d(weights.shape[1], len(weights), 1, dtype=weights.dtype)
    joined.weight.data, joined.bias = weights, nn.Parameter(torch.cat(biases))
    return joined
