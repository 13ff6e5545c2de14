"""On a CUDA device: the same pipeline, and the same noise."""

import json

import pytest
import torch

from smalti.core.contracts import Generator
from smalti.core.noise import uniform
from smalti.core.sampling_settings import SamplingSettings

pytestmark = pytest.mark.gpu


def test_noise_is_the_same_on_both():
    samples = torch.arange(1000)
    assert torch.equal(uniform(7, samples.cuda(), 3, lanes=2).cpu(), uniform(7, samples, 3, lanes=2))


def test_the_quickstart_runs(smalti, shrunk):
    smalti("quickstart", *shrunk, "--device", "cuda", "--out", "run")
    summary = json.loads((smalti.folder / "run" / "summary.json").read_text())
    assert 5 < summary["psnr"] < 50
    generator = Generator.from_pretrained(smalti.folder / "run" / "generator")
    labels, settings = torch.arange(10), SamplingSettings(guidance_scale=2.0, top_p=0.95, seed=1)
    on_cpu = generator.sample(labels, settings)
    on_gpu = generator.cuda().sample(labels.cuda(), settings).cpu()
    assert (on_cpu == on_gpu).double().mean() > 0.95  # a rounding error may tip a draw, and all that follow it
