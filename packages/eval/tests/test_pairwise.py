import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.eval.pairwise import PSNR_CAP, pooled_psnr, psnr, ssim


def naive_ssim(x, y):
    """Wang et al. 2004, one window at a time; `x`, `y` one plane in [0, 1]."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = x[top : top + 11, left : left + 11], y[top : top + 11, left : left + 11]
            ma, mb = (window * a).sum(), (window * b).sum()
            va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
            cab = (window * (a - ma) * (b - mb)).sum()
            numerator = (2 * ma * mb + 1e-4) * (2 * cab + 9e-4)
            values.append(numerator / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 2, 14, 17, generator=generator) * 2 - 1
    noise = torch.randn(3, 2, 14, 17, generator=generator) * torch.tensor([0.05, 0.2, 0.5])[:, None, None, None]
    return images, (images + noise).clamp(-1, 1)


def test_psnr_is_that_of_each_image_with_data_range_one(pair):
    images, others = pair
    x, y = (images.double().numpy() + 1) / 2, (others.double().numpy() + 1) / 2
    expected = [10 * np.log10(1 / np.mean((x[i] - y[i]) ** 2)) for i in range(3)]
    np.testing.assert_allclose(psnr(images, others).numpy(), expected, rtol=1e-12)


def test_ssim_is_that_of_a_loop_over_windows(pair):
    images, others = pair
    x, y = (images.double().numpy() + 1) / 2, (others.double().numpy() + 1) / 2
    expected = [np.mean([naive_ssim(x[i, c], y[i, c]) for c in range(2)]) for i in range(3)]
    np.testing.assert_allclose(ssim(images, others).numpy(), expected, rtol=1e-9)


def test_pooled_psnr_is_that_of_one_large_image(pair):
    images, others = pair
    side_by_side = [torch.cat([*pixels], dim=-1)[None] for pixels in pair]
    torch.testing.assert_close(pooled_psnr(images, others), psnr(*side_by_side)[0])
    assert pooled_psnr(images, others) < psnr(images, others).mean()


def test_ssim_with_a_uniform_window_has_unbiased_moments(pair):
    images, others = pair
    x, y = ((pixels[0, 0].double().numpy() + 1) / 2 for pixels in pair)
    found = []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            a, b = (plane[top : top + 7, left : left + 7].ravel() for plane in (x, y))
            moments = np.cov(a, b)  # divided by n - 1
            numerator = (2 * a.mean() * b.mean() + 1e-4) * (2 * moments[0, 1] + 9e-4)
            found.append(numerator / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (moments.trace() + 9e-4)))
    assert ssim(images[:1, :1], others[:1, :1], window="uniform").item() == pytest.approx(np.mean(found), rel=1e-9)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_bytes_and_floats_agree(metric):
    generator = torch.Generator().manual_seed(1)
    images, others = (torch.randint(0, 256, (2, 3, 12, 12), generator=generator).to(torch.uint8) for _ in range(2))
    floats = [pixels.double() / 127.5 - 1 for pixels in (images, others)]
    torch.testing.assert_close(metric(images, others), metric(*floats), rtol=1e-12, atol=0)


def test_equal_images_get_the_cap_and_one(pair):
    images, others = pair
    assert psnr(images, images).tolist() == [PSNR_CAP] * 3
    torch.testing.assert_close(ssim(images, images), torch.ones(3, dtype=torch.float64))
    mixed = torch.stack([images[0], others[1]])
    assert psnr(mixed, images[:2]).isfinite().all()


@pytest.mark.parametrize(
    ("images", "references", "sentence"),
    [
        (
            torch.zeros(2, 3, 16, 16),
            torch.zeros(2, 1, 16, 16),
            "images and references must both be (B, C, H, W), got (2, 3, 16, 16) and (2, 1, 16, 16)",
        ),
        (
            torch.zeros(2, 3, 16, 16),
            torch.zeros(2, 3, 16, 16, dtype=torch.uint8),
            "images are torch.float32 and references torch.uint8: bring both to one type",
        ),
        (
            torch.zeros(1, 1, 16, 16, dtype=torch.int64),
            torch.zeros(1, 1, 16, 16, dtype=torch.int64),
            "images must be float in [-1, 1] or uint8, got torch.int64",
        ),
    ],
)
@pytest.mark.parametrize("metric", [psnr, ssim])
def test_wrong_tensors_are_refused(metric, images, references, sentence):
    with pytest.raises(UserError) as error:
        metric(images, references)
    assert str(error.value) == sentence


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(UserError, match=r"^SSIM needs images of 11 x 11 pixels or more, got 8 x 20$"):
        ssim(torch.zeros(1, 1, 8, 20), torch.zeros(1, 1, 8, 20))
