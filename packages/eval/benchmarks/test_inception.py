"""Our Inception beside torch-fidelity's, with the same weights on the same images, one after the other in turns."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as published

from smalti.eval.inception_network import InceptionNetwork
from smalti.eval.resize_for_inception import resized_for_inception

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
def test_inception(benchmark: Any, networks: tuple[Any, InceptionNetwork]) -> None:
    theirs, ours = networks
    images = torch.randint(0, 256, (IMAGES, 256, 256, 3), dtype=torch.uint8)
    planes = images.movedim(-1, 1).contiguous()
    seconds = []

    def peer() -> None:
        started = time.perf_counter()
        theirs(planes)
        seconds.append(time.perf_counter() - started)

    found = benchmark.pedantic(
        lambda: ours(resized_for_inception(images, "tensorflow")), setup=peer, rounds=4, warmup_rounds=1
    )
    expected = theirs(planes)[0]
    assert float((found[0] - expected).abs().max() / expected.abs().max()) < 1e-6
    benchmark.extra_info.update(peer="torch-fidelity", images=IMAGES, peer_seconds=min(seconds))
    benchmark.extra_info["ratio"] = min(seconds) / benchmark.stats.stats.min
    benchmark.extra_info["images_per_second"] = IMAGES / benchmark.stats.stats.min
