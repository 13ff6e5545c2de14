"""What training tells about the tokens of a tokenizer: usage of its codebooks, and a warning when it falls.

Legend: B batch, L token positions, S streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.core.codebook_health import QUEUE, CodebookHealth, CollapseWatch, code_distances
from smalti.core.contracts import Quantizer, Tokenizer


class TokenHealth:
    """Codebook health over the latest tokens of a tokenizer in training.

    Args:
        tokenizer: its layout says which streams and scales there are. Where it has a `quantizer` with one
            latent position for each token position, distances between codes are told as well.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        layout = tokenizer.layout()
        scales = [math.prod(grid) for grid in layout.shape] if layout.kind == "scales" else []
        self.health = CodebookHealth(layout.vocab, QUEUE, scales)
        self.watch = CollapseWatch(layout.streams)
        quantizer = getattr(tokenizer, "quantizer", None)
        self.quantizer = quantizer if isinstance(quantizer, Quantizer) and layout.kind != "scales" else None

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens `(B, L, S)` of a batch."""
        self.health.update(tokens)

    def findings(self) -> dict[str, Any]:
        """Figures over the queues of all processes, which must all call it.

        Returns:
            `usage`, `perplexity`, `dead_codes`: a value per stream; `usage_of_scales`, per scale, where there
            are scales; `distances`, the quantiles of `code_distances` per stream, where they are known;
            `collapsed`, the streams whose usage has newly fallen below half of its best, if there are any.
        """
        found: dict[str, Any] = dict(self.health.result())
        if self.health.scales:
            found["usage_of_scales"] = [scale.result()["usage"] for scale in self.health.scales]
        if self.quantizer is not None:
            found["distances"] = code_distances(self.quantizer)
        collapsed = self.watch.check(found["usage"])
        return found | ({"collapsed": collapsed} if collapsed else {})

    def warning(self, findings: Mapping[str, Any], stage: str, step: int) -> str | None:
        """A sentence about the streams that collapsed at this step, None without any."""
        if "collapsed" not in findings:
            return None
        falls = ", ".join(
            f"stream {stream} from {self.watch.best[stream]:.1%} to {findings['usage'][stream]:.1%}"
            for stream in findings["collapsed"]
        )
        return f"{stage}: codebook collapse at step {step}: usage fell to less than half of its best ({falls})"

    def state_dict(self) -> dict[str, Any]:
        """What this process has seen."""
        return {"health": self.health.state_dict(), "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.health.load_state_dict(state["health"])
        self.watch.load_state_dict(state["watch"])
