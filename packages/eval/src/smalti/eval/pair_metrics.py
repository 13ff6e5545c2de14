"""Metrics of images and their references as components, which `smalti reconstruct` and validation take."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from smalti.core.contracts import PairMetric
from smalti.core.options import MetricOptions
from smalti.eval.lpips_distance import LPIPS, Network
from smalti.eval.ms_ssim import MS_SSIM_DEFINITION, ms_ssim
from smalti.eval.pairwise import (
    PSNR_DEFINITION,
    SSIM_DEFINITION,
    SSIM_REFLECTED_DEFINITION,
    SSIM_UNIFORM_DEFINITION,
    psnr,
    ssim,
    ssim_reflected,
    ssim_uniform,
)


class PSNROptions(MetricOptions):
    """Peak signal-to-noise ratio, see `smalti.eval.pairwise.psnr`."""

    name: Literal["psnr"] = "psnr"

    def build(self) -> PairMetric:
        """The metric."""
        return PairMetric("dB", PSNR_DEFINITION, psnr)


class SSIMOptions(MetricOptions):
    """Structural similarity, see `smalti.eval.pairwise.ssim`."""

    name: Literal["ssim"] = "ssim"

    def build(self) -> PairMetric:
        """The metric."""
        return PairMetric("1", SSIM_DEFINITION, ssim)


class SSIMUniformOptions(MetricOptions):
    """Structural similarity with scikit-image's window, see `smalti.eval.pairwise.ssim_uniform`."""

    routine: ClassVar[bool] = False
    name: Literal["ssim-uniform"] = "ssim-uniform"

    def build(self) -> PairMetric:
        """The metric."""
        return PairMetric("1", SSIM_UNIFORM_DEFINITION, ssim_uniform)


class SSIMReflectedOptions(MetricOptions):
    """Structural similarity of mirrored images, see `smalti.eval.pairwise.ssim_reflected`."""

    routine: ClassVar[bool] = False
    name: Literal["ssim-reflected"] = "ssim-reflected"

    def build(self) -> PairMetric:
        """The metric."""
        return PairMetric("1", SSIM_REFLECTED_DEFINITION, ssim_reflected)


class MSSSIMOptions(MetricOptions):
    """Structural similarity at five scales, see `smalti.eval.ms_ssim.ms_ssim`."""

    routine: ClassVar[bool] = False
    name: Literal["ms-ssim"] = "ms-ssim"

    def build(self) -> PairMetric:
        """The metric."""
        return PairMetric("1", MS_SSIM_DEFINITION, ms_ssim)


class LPIPSOptions(MetricOptions):
    """LPIPS, see `smalti.eval.lpips_distance.LPIPS`.

    Args:
        network: whose features are compared.
        backbone: file with the network's weights; null looks in torch hub's cache.
        heads: file with the five linear layers; null looks there, then in an installed package `lpips`.
    """

    routine: ClassVar[bool] = False
    name: Literal["lpips"] = "lpips"
    network: Network = "alex"
    backbone: Path | None = None
    heads: Path | None = None

    def build(self) -> PairMetric:
        """The metric.

        Raises:
            UserError: weights are missing.
        """
        distance = LPIPS(self.network, self.backbone, self.heads)
        return PairMetric("1", distance.definition, distance)
