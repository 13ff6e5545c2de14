"""The residual block of the convolutional backbones.

Legend: B batch, h w positions.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["input", "output"]


class ResidualBlock(nn.Module):
    """`shortcut(x) + conv2(act(norm2(conv1(act(norm1(x))))))`, 3 x 3 convolutions, group normalisation and SiLU.

    The block of VQGAN (Esser et al. 2021) and of what descends from it. Where the widths differ, the shortcut is a
    1 x 1 convolution, else the identity.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
        groups: of the normalisations; both widths are multiples of it.
        eps: of the normalisations.
        bias: whether the convolutions have one.
        shortcut: what the shortcut is applied to. `output` is a defect of MaskGIT's VQGAN that its weights were
            trained with: where the widths differ, the block's own output goes through the convolution and is added to
            itself, and the input is lost.
        dropout: probability, before the second convolution.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        bias: bool = True,
        shortcut: Shortcut = "input",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        last = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)  # drawn first, as seeded runs have always had it
        self.norm1 = nn.GroupNorm(groups, inputs, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
        self.norm2 = nn.GroupNorm(groups, outputs, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = last
        self.shortcut: nn.Module = nn.Identity()
        self.adds_output = shortcut == "output" and inputs != outputs
        if inputs != outputs:
            self.shortcut = nn.Conv2d(outputs if self.adds_output else inputs, outputs, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, inputs, h, w)` to `(B, outputs, h, w)`."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(self.dropout(F.silu(self.norm2(y))))
        result: Tensor = self.shortcut(y if self.adds_output else x) + y
        return result
