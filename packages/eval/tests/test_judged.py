import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
from smalti.eval.judged import Judged, judge, measure_samples


class Brightness(nn.Module):
    """The mean as feature; the class by three bands of it."""

    def forward(self, images):
        mean = images.float().mean((1, 2))
        return {"pool": mean[:, :2], "logits": -(mean[:, :1] - torch.tensor([40.0, 120.0, 200.0])).abs()}


def images(*levels):
    return torch.stack([torch.full((4, 4, 3), level, dtype=torch.uint8) for level in levels])


def test_decisions_and_shares():
    seen = []
    batches = [(images(40, 200), torch.tensor([0, 1])), (images(120), torch.tensor([1]))]
    judged = judge(Brightness(), batches, "samples", "cpu", lambda amount=1, note=None: seen.append(amount))
    assert seen == [2, 1]
    assert judged.decisions.tolist() == [0, 2, 1]
    assert judged.agreement == pytest.approx(2 / 3)
    assert judged.of_class(1).agreement == 0.5
    assert judged.of_class(1).pool.tolist() == [[200.0, 200.0], [120.0, 120.0]]


def test_one_image_is_too_few():
    with pytest.raises(UserError, match=r"^an evaluation needs 2 samples or more, got 1$"):
        judge(Brightness(), [(images(1), torch.tensor([0]))], "samples", "cpu", lambda amount=1, note=None: None)


def test_figures_of_known_features():
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(40, 3, generator=generator)
    labels = torch.arange(40) % 2
    real = Judged(pool, labels, labels)
    moved = Judged(pool + torch.tensor([30.0, 0, 0]), labels, torch.zeros_like(labels))
    figures = {figure.name: figure for figure in measure_samples(moved, real, real, 3, "bands")}
    assert figures["classified_as_intended"].value == 0.5
    assert figures["classifier_accuracy"].value == 1.0
    assert figures["frechet_distance"].value == pytest.approx(900.0, rel=1e-5)
    assert figures["frechet_distance_real"].value == pytest.approx(0.0, abs=1e-9)
    assert figures["precision"].value == 0
    assert figures["recall"].value == 0
    assert all(figure.extractor == "bands" for figure in figures.values())
    assert {figure.better for figure in figures.values() if "distance" in figure.name} == {"lower"}
