"""The contract of a loss of tokenizer training.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from smalti.core.contracts import Tokenizer, TokenizerOutput


class Loss(nn.Module, ABC):
    """A scalar of what a tokenizer made of images, without the weight it has in the objective.

    Parameters of its own (a projection, a head) are trained together with the tokenizer.
    """

    def attach(self, tokenizer: Tokenizer) -> None:
        """Learn before training what must be known of the tokenizer, e.g. widths; most need nothing.

        Raises:
            UserError: the loss cannot be had for this tokenizer.
        """
        del tokenizer

    @abstractmethod
    def forward(self, output: TokenizerOutput, images: Tensor, step: int) -> Tensor:
        """The loss.

        Args:
            output: the tokenizer's, in training.
            images: what it was made of, `(B, C, H, W)` in [-1, 1].
            step: updates so far.
        """
