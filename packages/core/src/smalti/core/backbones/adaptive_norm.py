"""Group normalisation whose scale and shift come from a latent's statistics.

Legend: B batch, h w positions, D latent width.
"""

from __future__ import annotations

from torch import Tensor, nn

from smalti.core.errors import UserError


class AdaptiveGroupNorm(nn.Module):
    """`gamma(std) * norm(x) + beta(mean)` with the latent's deviation and mean over its positions (Open-MAGVIT2).

    The output depends on statistics of the whole latent: crops and tiles of an image do not decode to crops of it.

    Args:
        width: channels of what is normalised.
        latent_width: D.
        groups: of the normalisation.
        eps: of the normalisation, and added to the variance (of `h w - 1` degrees of freedom) of the latent.
    """

    def __init__(self, width: int, latent_width: int, *, groups: int = 32, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.norm = nn.GroupNorm(groups, width, eps, affine=False)
        self.gamma = nn.Linear(latent_width, width)
        self.beta = nn.Linear(latent_width, width)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """`x` `(B, width, h, w)` and the latent `(B, D, h', w')` to the shape of `x`.

        Raises:
            UserError: a latent of one position, which has no deviation.
        """
        positions = latent.flatten(2)
        if positions.shape[2] < 2:
            raise UserError("adaptive normalisation needs a latent of two positions or more: give larger images")
        gamma = self.gamma((positions.var(dim=2) + self.eps).sqrt())
        beta = self.beta(positions.mean(dim=2))
        result: Tensor = self.norm(x) * gamma[..., None, None] + beta[..., None, None]
        return result
