"""PSNR and SSIM are components of the kind `metric`."""

import pytest
import torch

from smalti.core.plugins import registry
from smalti.eval.pairwise import psnr, ssim


@pytest.mark.parametrize(("name", "function", "best"), [("psnr", psnr, 100.0), ("ssim", ssim, 1.0)])
def test_metrics_by_name(name, function, best):
    metric = registry().options("metric", name)().build()
    images = torch.randint(0, 256, (3, 3, 16, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noisy = (images.int() + torch.tensor([0, 3, 30])[:, None, None, None]).clamp(0, 255).to(torch.uint8)
    values = metric.compute(noisy, images)
    assert torch.equal(values, function(noisy, images))
    assert values[0] == best
    assert values[0] > values[1] > values[2]
    assert "mean over images" in metric.definition
