"""What smalti.eval brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    yield Component(
        "features",
        "classifier",
        "smalti.eval.classifier:ClassifierOptions",
        "pooled features and logits of a classifier that `smalti evaluate` trained",
    )
    yield Component(
        "stage",
        "evaluate",
        "smalti.eval.evaluate:EvaluateOptions",
        "PSNR, SSIM and codebook use; Frechet distance, precision, recall and classes of samples; a report",
    )
    yield Component("metric", "psnr", "smalti.eval.pair_metrics:PSNROptions", "peak signal-to-noise ratio")
    yield Component("metric", "ssim", "smalti.eval.pair_metrics:SSIMOptions", "structural similarity")
