"""Our Inception beside torch-fidelity's, with the same weights on the same images, one after the other in turns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import Comparison, Ours
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as published

from smalti.eval.inception_network import InceptionNetwork
from smalti.eval.resize_for_inception import resized_for_inception

pytestmark = pytest.mark.benchmark(group="Inception features")
IMAGES = 16


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, InceptionNetwork]:
    """Theirs with seeded weights, and ours made of it."""
    monkeypatch.setattr(published, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    theirs = published.FeatureExtractorInceptionV3("seeded", ["2048", "logits_unbiased"])
    for module in theirs.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return theirs, InceptionNetwork(theirs)


@torch.inference_mode()
def test_inception(compare: Comparison, networks: tuple[Any, InceptionNetwork]) -> None:
    theirs, ours = networks
    images = torch.randint(0, 256, (IMAGES, 256, 256, 3), dtype=torch.uint8)
    planes = images.movedim(-1, 1).contiguous()

    def action() -> Any:
        return ours(resized_for_inception(images, "tensorflow"))

    expected = theirs(planes)[0]
    assert float((action()[0] - expected).abs().max() / expected.abs().max()) < 1e-6
    work = Ours(f"{IMAGES} images of 256 x 256", action, amounts={"images": IMAGES}, bars={"torch-fidelity": 1.8})
    compare([work], {"torch-fidelity": lambda: theirs(planes)})
