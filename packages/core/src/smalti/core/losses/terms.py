"""All losses of a recipe as one module.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.losses.loss import Model, Reconstruction
from smalti.core.options import LossOptions


class LossTerms(nn.Module):
    """The weighted terms of several losses, by name; the second `alignment` is `alignment_2`.

    Attributes:
        of_proxy: whether they look at logits over proxy codes instead of at images.

    Raises:
        UserError: a loss that cannot be had for the model, or one of pixels beside one of proxy codes.
    """

    def __init__(self, options: Sequence[LossOptions], model: Model) -> None:
        super().__init__()
        seen: Counter[str] = Counter()
        self.weights: dict[str, float] = {}
        self.losses = nn.ModuleDict()
        kinds: dict[bool, str] = {}
        for each in options:
            seen[each.name] += 1
            name = each.name if seen[each.name] == 1 else f"{each.name}_{seen[each.name]}"
            loss = each.build()
            loss.attach(model)
            kinds[loss.of_proxy] = name
            self.weights[name] = each.weight
            self.losses[name] = loss
        if len(kinds) > 1:
            raise UserError(f"the loss {kinds[True]} is learned without pixels and goes without {kinds[False]}")
        self.of_proxy = True in kinds

    @property
    def trainable(self) -> bool:
        """Whether any loss has parameters of its own that learn."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> dict[str, Tensor]:
        """The terms for what a model made of images `(B, C, H, W)`, at update `step`."""
        return {name: self.weights[name] * loss(output, images, step) for name, loss in self.losses.items()}
