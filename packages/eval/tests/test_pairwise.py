import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.eval.ms_ssim import ms_ssim
from smalti.eval.pairwise import PSNR_CAP, pooled_psnr, psnr, ssim, ssim_reflected, ssim_uniform


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


def naive_uniform(x, y):
    """scikit-image's default windows, one at a time."""
    values = []
    for top in range(x.shape[0] - 6):
        for left in range(x.shape[1] - 6):
            a, b = x[top : top + 7, left : left + 7].ravel(), y[top : top + 7, left : left + 7].ravel()
            (va, cab), (_, vb) = np.cov(a, b)
            numerator = (2 * a.mean() * b.mean() + 1e-4) * (2 * cab + 9e-4)
            values.append(numerator / ((a.mean() ** 2 + b.mean() ** 2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_uniform_windows(pair):
    images, references = pair
    found = ssim_uniform(images, references)
    for image, reference, value in zip((images + 1) / 2, (references + 1) / 2, found, strict=True):
        planes = zip(image.double().numpy(), reference.double().numpy(), strict=True)
        assert float(value) == pytest.approx(np.mean([naive_uniform(*pair) for pair in planes]), rel=1e-9)


def test_mirrored_borders(pair):
    images, references = pair
    found = ssim_reflected(images, references)
    for image, reference, value in zip((images + 1) / 2, (references + 1) / 2, found, strict=True):
        mirrored = (np.pad(x.double().numpy(), ((0, 0), (5, 5), (5, 5)), mode="reflect") for x in (image, reference))
        planes = zip(*mirrored, strict=True)
        assert float(value) == pytest.approx(np.mean([naive_ssim(*pair) for pair in planes]), rel=1e-9)


def test_pooled_noise_is_that_of_the_batch(pair):
    images, references = pair
    error = ((images - references).double() / 2).square().mean()
    assert float(pooled_psnr(images, references)) == pytest.approx(float(-10 * error.log10()), rel=1e-12)
    assert float(pooled_psnr(images, images)) == PSNR_CAP
    assert float(pooled_psnr(images, references)) < float(psnr(images, references).mean())  # the log is convex


def smooth(seed, side):
    """Images in [-1, 1] that look alike at several scales."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(2, 3, side // 16, side // 16, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(side, side + 3), mode="bicubic").tanh()


def naive_ms_ssim(x, y):
    """Wang et al. 2003 for one image `(C, H, W)` in [0, 1], with SciPy's filters."""
    gauss = np.exp(-((np.arange(11) - 5) ** 2) / 4.5)
    gauss /= gauss.sum()

    def blurred(values):
        for axis in (1, 2):
            values = np.apply_along_axis(np.convolve, axis, values, gauss, mode="valid")
        return values

    product = 1.0
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        mx, my = blurred(x), blurred(y)
        vx, vy, cxy = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
        structure = (2 * cxy + 9e-4) / (vx + vy + 9e-4)
        if scale == 4:
            structure = structure * (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
        product *= max(structure.mean(), 0) ** exponent
        height, width = (size // 2 * 2 for size in x.shape[1:])
        x, y = (v[:, :height, :width].reshape(3, height // 2, 2, width // 2, 2).mean((2, 4)) for v in (x, y))
    return product


def test_five_scales():
    references = smooth(0, 176)
    images = (references + 0.3 * smooth(1, 176)).clamp(-1, 1)
    found = ms_ssim(images, references)
    for image, reference, value in zip((images + 1) / 2, (references + 1) / 2, found, strict=True):
        assert float(value) == pytest.approx(naive_ms_ssim(image.double().numpy(), reference.double().numpy()))
    assert ms_ssim(references, references).tolist() == [1, 1]
    assert ms_ssim(-references, references).tolist() == [0, 0]


def test_images_too_small_for_a_window():
    images = torch.zeros(1, 3, 6, 200)
    for metric, sentence in (
        (ssim_reflected, "SSIM needs images of 11 x 11 pixels or more, got 6 x 200"),
        (ssim_uniform, "SSIM needs images of 7 x 7 pixels or more, got 6 x 200"),
        (ms_ssim, "MS-SSIM needs images of 176 x 176 pixels or more, got 6 x 200"),
    ):
        with pytest.raises(UserError) as error:
            metric(images, images)
        assert str(error.value) == sentence
