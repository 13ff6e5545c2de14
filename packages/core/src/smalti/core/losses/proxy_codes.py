"""Proxy codes: the first stage of TiTok's training (Yu et al. 2024).

Legend: B batch, L positions, K codes of the proxy.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.contracts import Tokenizer, TokenizerOutput
from smalti.core.errors import UserError
from smalti.core.losses.loss import Loss
from smalti.core.options import LossOptions
from smalti.core.training.frozen import Frozen


class ProxyCodesOptions(LossOptions):
    """Options of `ProxyCodes`.

    Args:
        tokenizer: whose tokens are predicted: a folder or a hub repository with a tokenizer of one stream.
    """

    name: Literal["proxy-codes"] = "proxy-codes"
    tokenizer: str

    def build(self) -> ProxyCodes:
        """Build it.

        Raises:
            UserError: the tokenizer cannot be had, or has several streams.
        """
        return ProxyCodes(Tokenizer.from_pretrained(self.tokenizer))


class ProxyCodes(Loss):
    """Cross entropy of the decoder's logits over codes against the tokens that a frozen tokenizer makes of the image.

    The tokenizer in training has a decoder whose `head` has `logits`, a module that ends in `(B, h, w, K)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        layout = tokenizer.layout()
        if layout.streams != 1:
            raise UserError(f"proxy codes are those of one stream, but the tokenizer gives {layout}")
        self.codes = layout.vocab[0]
        self.tokenizer = Frozen(tokenizer)
        self._logits: Tensor | None = None

    def attach(self, tokenizer: Tokenizer) -> None:
        """Listen to the decoder's logits, which are no part of what a tokenizer gives.

        Raises:
            UserError: the decoder has none.
        """
        logits = getattr(getattr(getattr(tokenizer, "decoder", None), "head", None), "logits", None)
        if not isinstance(logits, nn.Module):
            raise UserError(
                "the loss proxy-codes needs a decoder with a head of logits over codes: titok with head: {name: proxy}"
            )
        logits.register_forward_hook(self._keep)

    def forward(self, output: TokenizerOutput, images: Tensor, step: int) -> Tensor:
        """The mean over batch and positions."""
        logits, self._logits = self._logits, None
        assert logits is not None, "the tokenizer was not run in training, or the loss is not attached to it"
        tokenizer = self.tokenizer.network
        assert isinstance(tokenizer, Tokenizer)
        with torch.no_grad():
            tokens = tokenizer.encode(images)[..., 0]
        if logits.shape != (*tokens.shape, self.codes):
            raise UserError(
                f"proxy-codes: the logits are {tuple(logits.shape)}, but the proxy has {tokens.shape[1]} positions of "
                f"{self.codes} codes"
            )
        return proxy_cross_entropy(logits, tokens)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        del inputs
        if module.training:
            self._logits = logits.flatten(1, -2)


def proxy_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of logits `(B, L, K)` against tokens `(B, L)`."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
