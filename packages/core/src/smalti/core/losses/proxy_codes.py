"""Proxy codes: the first stage of TiTok's training (Yu et al. 2024).

Legend: B batch, L = h w positions, K codes of the proxy.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.losses.loss import Loss, Model, Reconstruction
from smalti.core.options import LossOptions
from smalti.core.tokenizer import CodePredictor
from smalti.core.training.frozen import Frozen


class ProxyCodesOptions(LossOptions):
    """Options of `ProxyCodes`.

    Args:
        tokenizer: whose tokens are predicted: a folder, a name of the zoo or a hub repository with a tokenizer of one
            stream.
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

    The tokenizer in training has a decoder that predicts codes, and decodes no further: in the place of images it
    gives logits `(B, K, h, w)`.
    """

    of_proxy: ClassVar[bool] = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        layout = tokenizer.layout()
        if layout.streams != 1:
            raise UserError(f"proxy codes are those of one stream, but the tokenizer gives {layout}")
        self.codes = layout.vocab[0]
        self.tokenizer = Frozen(tokenizer)

    def attach(self, model: Model) -> None:
        """Check that the decoder predicts as many codes as there are.

        Raises:
            UserError: it does not.
        """
        decoder = getattr(model, "decoder", None)
        found = decoder.proxy_codes if isinstance(decoder, CodePredictor) else None
        if found is None:
            raise UserError(
                "the loss proxy-codes needs a decoder with a head of logits over codes: titok with head: {name: proxy}"
            )
        if found != self.codes:
            raise UserError(f"proxy-codes: the decoder predicts {found} codes, but the proxy has {self.codes}")

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean over batch and positions."""
        tokenizer, logits = self.tokenizer.network, output.images.flatten(2)
        assert isinstance(tokenizer, Tokenizer)
        with torch.no_grad():
            tokens = tokenizer.encode(images)[..., 0]
        if logits.shape[2] != tokens.shape[1]:
            raise UserError(
                f"proxy-codes: the decoder has {logits.shape[2]} positions, but the proxy {tokens.shape[1]} tokens"
            )
        return proxy_cross_entropy(logits.transpose(1, 2), tokens)


def proxy_cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of logits `(B, L, K)` against tokens `(B, L)`."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
