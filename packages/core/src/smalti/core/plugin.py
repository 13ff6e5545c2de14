"""What smalti.core brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    here = "smalti.core"
    yield Component("encoder", "cnn", f"{here}.backbones.cnn:CNNEncoderOptions", "residual CNN, halving per level")
    yield Component("decoder", "cnn", f"{here}.backbones.cnn:CNNDecoderOptions", "residual CNN, doubling per level")
    yield Component("tokenizer", "composed", f"{here}.tokenizer:ComposedOptions", "encoder + quantizer + decoder")
    yield Component("loss", "l1", f"{here}.training.losses:L1Options", "mean absolute difference")
    yield Component("loss", "l2", f"{here}.training.losses:L2Options", "mean squared difference")
    yield Component("discriminator", "patchgan", f"{here}.training.patchgan:PatchGANOptions", "logits per image patch")
    yield Component("dataset", "webdataset", f"{here}.data.webdataset:WebDatasetOptions", "WebDataset tar shards")
    yield Component("recipes", "smalti", f"{here}.recipes", "the recipes that come with smalti")
