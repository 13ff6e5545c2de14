"""Metrics of images and references are components of the kind `metric`."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from smalti.core.errors import UserError
from smalti.core.losses.lpips import LPIPSDistance
from smalti.core.losses.vgg import VGG16
from smalti.core.metrics import pair_metrics
from smalti.core.plugins import registry
from smalti.eval.lpips_distance import ALEXNET_WIDTHS, AlexNet
from smalti.eval.pair_means import PairMean
from smalti.eval.pairwise import psnr, ssim, ssim_reflected, ssim_uniform


def build(name, **options):
    return registry().options("metric", name)(**options).build()


def pairs(side=20):
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noisy = (images.int() + torch.tensor([0, 3, 30])[:, None, None, None]).clamp(0, 255).to(torch.uint8)
    return noisy, images


@pytest.mark.parametrize(
    ("name", "function", "best"),
    [
        ("psnr", psnr, 100.0),
        ("ssim", ssim, 1.0),
        ("ssim-uniform", ssim_uniform, 1.0),
        ("ssim-reflected", ssim_reflected, 1.0),
    ],
)
def test_metrics_by_name(name, function, best):
    metric = build(name)
    noisy, images = pairs()
    values = metric.compute(noisy, images)
    assert torch.equal(values, function(noisy, images))
    assert values[0] == best
    assert values[0] > values[1] > values[2]
    assert "mean over images" in metric.definition


def test_metrics_that_need_more_than_images_are_computed_when_they_are_named():
    assert list(pair_metrics()) == ["psnr", "ssim"]
    assert list(pair_metrics(["ms-ssim", "psnr"])) == ["ms-ssim", "psnr"]


def lpips_file(folder, network, widths, prefix="net.slice1."):
    """Seeded weights, in the layout of LPIPS, with heads that are not negative."""
    torch.manual_seed(0)
    tensors = {prefix + name.removeprefix("features."): tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(widths)}
    save_file(tensors, folder / "lpips.safetensors")
    return folder / "lpips.safetensors", tensors


def plain_alexnet(x, tensors):
    """The features after each convolution, written out."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    found = []
    for index, stride, padding in ((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1)):
        weight, bias = (tensors[f"net.slice1.{index}.{kind}"] for kind in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride, padding).relu()
        found.append(x)
        x = F.max_pool2d(x, 3, 2) if index in (0, 3) else x
    return found


def test_lpips_with_alexnet(tmp_path):
    path, tensors = lpips_file(tmp_path, AlexNet(), ALEXNET_WIDTHS)
    metric = build("lpips", backbone=path, heads=path)
    noisy, images = pairs(64)
    values = metric.compute(noisy, images)
    expected = torch.zeros(3)
    layers = (plain_alexnet(pixels.float() / 127.5 - 1, tensors) for pixels in (noisy, images))
    for number, pair in enumerate(zip(*layers, strict=True)):
        one, other = (features / (features.norm(dim=1, keepdim=True) + 1e-10) for features in pair)
        expected += ((one - other) ** 2 * tensors[f"lin{number}.model.1.weight"]).sum(1).mean((1, 2))
    torch.testing.assert_close(values, expected.double(), rtol=1e-4, atol=1e-7)
    assert values.dtype == torch.float64
    assert values[0] == 0
    torch.testing.assert_close(metric.compute(noisy.float() / 127.5 - 1, images.float() / 127.5 - 1), values)
    grey = metric.compute(noisy[:, :1], images[:, :1])
    torch.testing.assert_close(grey, metric.compute(noisy[:, :1].repeat(1, 3, 1, 1), images[:, :1].repeat(1, 3, 1, 1)))


def test_alexnet_is_torchvisions():
    from torchvision.models import alexnet

    with torch.device("meta"):
        theirs = {name: tensor.shape for name, tensor in alexnet().features.state_dict().items()}
        assert {name: tensor.shape for name, tensor in AlexNet().features.state_dict().items()} == theirs


def test_lpips_with_vgg_is_that_of_the_loss(tmp_path):
    path, _ = lpips_file(tmp_path, VGG16(), (64, 128, 256, 512, 512))
    metric = build("lpips", network="vgg", backbone=path, heads=path)
    noisy, images = pairs(32)
    network = VGG16()
    network.load_state_dict(metric.compute.distance.network.state_dict())
    distance = LPIPSDistance(network).load_heads(path)
    expected = distance(noisy.float() / 127.5 - 1, images.float() / 127.5 - 1)
    torch.testing.assert_close(metric.compute(noisy, images), expected.double(), rtol=1e-5, atol=1e-7)
    assert "VGG16" in metric.definition


@pytest.mark.parametrize(
    ("present", "sentence"),
    [
        (
            False,
            "backbone: {folder}/nothing.pth does not exist; expected the weights of AlexNet there, from {backbone}",
        ),
        (
            True,
            "the weights of LPIPS are missing: download {heads} to {folder}/hub/checkpoints/alex.pth, or give a file "
            "as heads",
        ),
    ],
)
def test_missing_weights(tmp_path, monkeypatch, present, sentence):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("smalti.core.losses.lpips.find_spec", lambda name: None)
    path = lpips_file(tmp_path, AlexNet(), ALEXNET_WIDTHS)[0] if present else tmp_path / "nothing.pth"
    with pytest.raises(UserError) as error:
        build("lpips", backbone=path)
    assert str(error.value) == sentence.format(
        folder=tmp_path,
        backbone="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        heads="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/alex.pth",
    )


def test_missing_weights_of_vgg(tmp_path):
    with pytest.raises(UserError, match=r"^backbone: .*nothing.pth does not exist; expected the weights of VGG16 the"):
        build("lpips", network="vgg", backbone=tmp_path / "nothing.pth")


def test_means_are_gathered_in_any_order():
    noisy, images = pairs()
    metric = build("psnr")
    expected = metric.compute(noisy, images)
    first, second = PairMean(metric), PairMean(metric)
    first.update(noisy[2:], images[2:], torch.tensor([2]))
    second.update(noisy[:2], images[:2], torch.tensor([0, 1]))
    first.merge(second)
    assert torch.equal(first.values, expected)
    assert first.compute() == pytest.approx(float(expected.mean()), rel=1e-12)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.values, expected)
    assert second.definition == metric.definition
    first.reset()
    assert first.update(noisy[1:2], images[1:2]).compute() == float(expected[1])
