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
    yield Component(
        "metric",
        "ssim-reflected",
        "smalti.eval.pair_metrics:SSIMReflectedOptions",
        "structural similarity as torchmetrics computes it",
    )
    yield Component(
        "metric",
        "ssim-uniform",
        "smalti.eval.pair_metrics:SSIMUniformOptions",
        "structural similarity with scikit-image's 7x7 window",
    )
    yield Component(
        "metric", "ms-ssim", "smalti.eval.pair_metrics:MSSSIMOptions", "structural similarity at five scales"
    )
    yield Component("metric", "lpips", "smalti.eval.pair_metrics:LPIPSOptions", "LPIPS with AlexNet or VGG16")
    yield Component("features", "inception", "smalti.eval.inception:InceptionOptions", "FID's Inception of 2015")
    transformers = "smalti.eval.transformer_features"
    yield Component("features", "dinov2", f"{transformers}:DINOv2Options", "DINOv2's class token, for FD-DINOv2")
    yield Component("features", "clip", f"{transformers}:CLIPOptions", "CLIP's image embedding, for CMMD")
    commands = "smalti.eval.evaluate_commands"
    yield Component("command", "evaluate images", f"{commands}:images", "Measure images against others, with a report.")
    yield Component(
        "command", "evaluate tokens", f"{commands}:tokens", "Measure the use of codes and bits of an image."
    )
    yield Component("command", "evaluate stats", f"{commands}:stats", "Write the statistics of a reference.")
    yield Component("command", "evaluate compare", f"{commands}:compare", "Set two results side by side.")
