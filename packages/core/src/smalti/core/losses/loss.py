"""The contract of a loss of tokenizer training.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn

from smalti.core.autoencoder import Autoencoder
from smalti.core.contracts import Tokenizer

Model = Tokenizer | Autoencoder


class Reconstruction(Protocol):
    """What losses read of a `TokenizerOutput` or an `AutoencoderOutput`."""

    @property
    def images(self) -> Tensor:
        """`(B, C, H, W)` with gradients; for losses of proxy codes, logits `(B, K, h, w)`."""

    @property
    def features(self) -> Mapping[str, Tensor]:
        """Whatever further losses need, by name."""


class Loss(nn.Module, ABC):
    """A scalar of what a model made of images, without the weight it has in the objective.

    Parameters of its own (a projection, a head) are trained together with the model.

    Attributes:
        of_proxy: whether it looks at logits over proxy codes, for which no pixels are made.
    """

    of_proxy: ClassVar[bool] = False

    def attach(self, model: Model) -> None:
        """Learn before training what must be known of the model, e.g. widths; most need nothing.

        Raises:
            UserError: the loss cannot be had for this model.
        """
        del model

    @abstractmethod
    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The loss.

        Args:
            output: the model's, in training.
            images: what it was made of, `(B, C, H, W)` in [-1, 1].
            step: updates so far.
        """
