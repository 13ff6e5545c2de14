"""PSNR and SSIM as components, which `smalti reconstruct` takes."""

from __future__ import annotations

from typing import Literal

from smalti.core.contracts import PairMetric
from smalti.core.options import MetricOptions
from smalti.eval.pairwise import PSNR_DEFINITION, SSIM_DEFINITION, psnr, ssim


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
