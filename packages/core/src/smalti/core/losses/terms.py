"""All losses of a recipe as one module.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from smalti.core.contracts import Tokenizer, TokenizerOutput
from smalti.core.options import LossOptions


class LossTerms(nn.Module):
    """The weighted terms of several losses, by name; the second `alignment` is `alignment_2`."""

    def __init__(self, options: Sequence[LossOptions], tokenizer: Tokenizer) -> None:
        super().__init__()
        seen: Counter[str] = Counter()
        self.weights: dict[str, float] = {}
        self.losses = nn.ModuleDict()
        for each in options:
            seen[each.name] += 1
            name = each.name if seen[each.name] == 1 else f"{each.name}_{seen[each.name]}"
            loss = each.build()
            loss.attach(tokenizer)
            self.weights[name] = each.weight
            self.losses[name] = loss

    @property
    def trainable(self) -> bool:
        """Whether any loss has parameters of its own that learn."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, output: TokenizerOutput, images: Tensor, step: int) -> dict[str, Tensor]:
        """The terms for what a tokenizer made of images `(B, C, H, W)`, at update `step`."""
        return {name: self.weights[name] * loss(output, images, step) for name, loss in self.losses.items()}
