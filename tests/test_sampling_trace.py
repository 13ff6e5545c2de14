"""Traces of generators whose tokens have no fixed place in the image."""

import numpy as np
import torch

from smalti.core.backbones.cnn import CNNDecoderOptions, CNNEncoderOptions
from smalti.core.options import Preprocessing
from smalti.core.recipe import SampleSection
from smalti.core.sampling.run import SamplingRun
from smalti.core.sampling.trace import pictures
from smalti.core.tokenizer import ComposedOptions
from smalti.generation.var import VAROptions
from smalti.quant.multi_scale import MultiScaleOptions

VQ = {"name": "vq", "dim": 6, "codebook_size": 16}
NETWORK = {"widths": [8, 8], "blocks": 1, "groups": 2}


def test_scales_sharpen_one_after_the_other(tmp_path):
    torch.manual_seed(0)
    tokenizer = ComposedOptions(
        preprocessing=Preprocessing(image_size=8),
        encoder=CNNEncoderOptions(**NETWORK),
        quantizer=MultiScaleOptions(quantizer=VQ, scales=(1, 2), phi=2),
        decoder=CNNDecoderOptions(**NETWORK),
    ).build()
    generator = VAROptions(layers=1, dim=16, heads=2).build(tokenizer.layout(), 3)
    generator.attach(tokenizer)
    run = SamplingRun(tokenizer.eval(), generator.eval(), SampleSection(count=3), (0, 1, 2), tmp_path, "cpu")
    tokens, steps = generator.sample_traced(torch.arange(3), run.settings)
    frames = pictures(run, tokens, steps)
    assert len(frames) == 2
    np.testing.assert_array_equal(frames[1], run.images(torch.arange(3)).numpy())
    assert (frames[0] != frames[1]).any()
    other = tokens.clone()
    other[:, 1:] = (other[:, 1:] + 1) % 16  # the first frame knows nothing of the second scale
    np.testing.assert_array_equal(pictures(run, other, steps)[0], frames[0])
