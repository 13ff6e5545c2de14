"""Fitting one picture with Gaussians: quality, files, resuming, rounding, mistakes."""

import math

import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.gaussian.fitting.fit import FitOptions, Fitting, decibels, fit_image, psnr
from smalti.gaussian.fitting.picture import GaussianPicture, read_file, write_file
from smalti.gaussian.fitting.quantized import Bits, Levels, Tuning, load_quantized, parsed_bits, save_quantized
from smalti.gaussian.fitting.start import starting_picture

SIDE, COUNT, STEPS = 32, 50, 40


@pytest.fixture(scope="module")
def image():
    """A disc with an edge, on a slope of colours, [3, 32, 32]."""
    y, x = torch.meshgrid(torch.linspace(0, 1, SIDE), torch.linspace(0, 1, SIDE), indexing="ij")
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.06).float()
    return torch.stack((x * (1 - disc) + disc, y * (1 - disc), 0.3 + 0.5 * disc))


@pytest.fixture(scope="module")
def fitted(image):
    return fit_image(image, COUNT, steps=STEPS)


def test_the_picture_gets_better_and_the_last_number_is_that_of_the_file(image, fitted):
    numbers = []
    again = fit_image(image, COUNT, steps=STEPS, told=lambda step: numbers.append(step.psnr))
    assert len(numbers) == STEPS
    assert numbers[-1] > numbers[0] + 10
    assert fitted.psnr > 25
    rendering = (fitted.picture.render().clamp(0, 1) * 255).round()
    assert fitted.psnr == pytest.approx(decibels(((rendering / 255 - image) ** 2).mean().item()))
    for name, tensor in fitted.picture.tensors().items():
        assert torch.equal(tensor, again.picture.tensors()[name]), name


def test_centres_are_dense_where_the_picture_changes(image):
    picture = starting_picture(image, 400, seed=0)
    offsets = (picture.means + 1) / 2 - torch.tensor([0.6, 0.4])
    near = (offsets.norm(dim=1) - 0.06**0.5).abs() < 0.1
    ring = torch.pi * 4 * 0.06**0.5 * 0.1  # the share of the picture
    assert near.float().mean() > 1.5 * ring
    assert picture.scales[near].mean() < 0.8 * picture.scales[~near].mean()


def test_a_flat_picture_begins_evenly_and_about_right():
    image = torch.full((1, 48, 48), 0.5)
    picture = starting_picture(image, 200, seed=0)
    middle = picture.render()[0, 8:-8, 8:-8]
    assert middle.mean().item() == pytest.approx(0.5, abs=0.1)
    assert (picture.means > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_a_rendering_at_another_scale_is_the_same_picture(image, fitted):
    small, large = fitted.picture.render(), fitted.picture.render(3)
    assert large.shape == (3, 96, 96)
    # The middle of a block of 3 x 3 pixels is the middle of the pixel it stands for.
    difference = (large[:, 1::3, 1::3] - small).abs()
    assert difference.max() < 0.05
    assert difference.mean() < 0.005
    for scale in (0.001, math.inf, math.nan):
        with pytest.raises(UserError, match=rf"^scale {scale:g} leaves nothing of a picture of 32 x 32 pixels$"):
            fitted.picture.render(scale)


def test_a_stopped_fit_goes_on_to_the_same_bits(image, fitted):
    options = FitOptions(gaussians=COUNT, steps=STEPS)
    first = Fitting(image, options)
    for step in first.steps():
        if step.number == 15:
            break
    second = Fitting(image, options)
    second.load_state(first.state())
    assert [step.number for step in second.steps()] == list(range(16, STEPS + 1))
    for name, tensor in second.picture().detached().tensors().items():
        assert torch.equal(tensor, fitted.picture.tensors()[name]), name


def test_a_file_read_back_draws_the_same(fitted, tmp_path):
    path = tmp_path / "gaussians.safetensors"
    fitted.picture.save(path)
    back = GaussianPicture.load(path)
    assert torch.equal(back.render(), fitted.picture.render())
    assert path.stat().st_size < COUNT * 8 * 4 + 700
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"gaussians.safetensors is damaged or not a safetensors file: "):
        GaussianPicture.load(path)
    with pytest.raises(UserError, match=r"none.safetensors does not exist; expected a file of the format smalti-"):
        GaussianPicture.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("bits", [Bits(), Bits(means=16, scales=9, rotations=1, colours=16)])
def test_a_quantized_file_draws_what_was_measured(image, fitted, tmp_path, bits):
    levels = Levels.of(fitted.picture, bits)
    rounded = levels.rounded(fitted.picture)
    path = tmp_path / "quantized.safetensors"
    size = save_quantized(path, rounded, levels)
    assert size == path.stat().st_size
    back = load_quantized(path)
    assert (back.render() - rounded.render()).abs().max() < 1e-4
    assert psnr(back, image) == pytest.approx(psnr(rounded, image), abs=1e-3)
    assert torch.equal(levels.codes(back).sort(0).values, levels.codes(fitted.picture).sort(0).values)
    with pytest.raises(UserError, match=r"has the format 'smalti-gaussian-quantized-1', expected 'smalti-"):
        GaussianPicture.load(path)


@pytest.mark.parametrize(
    "change",
    [{"codes": torch.zeros(9, dtype=torch.uint8)}, {"low": None}],
)
def test_a_quantized_file_that_lacks_something_is_told(fitted, tmp_path, change):
    path = tmp_path / "quantized.safetensors"
    save_quantized(path, fitted.picture, Levels.of(fitted.picture, Bits()))
    kind = "smalti-gaussian-quantized-1"
    tensors, facts = read_file(path, kind)
    changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
    write_file(path, kind, changed, facts)
    with pytest.raises(UserError, match=r"quantized.safetensors is damaged: "):
        load_quantized(path)


def test_a_file_of_other_tensors_is_told(tmp_path):
    path = tmp_path / "gaussians.safetensors"
    write_file(path, "smalti-gaussian-picture-1", {"points": torch.zeros(2)}, {"height": 4, "width": 5})
    with pytest.raises(UserError, match=r"gaussians.safetensors is damaged: .*points"):
        GaussianPicture.load(path)


@pytest.mark.gpu
def test_on_a_gpu_rounded_pictures_are_tuned(image, fitted):
    there = fitted.picture.replaced({name: tensor.cuda() for name, tensor in fitted.picture.tensors().items()})
    for picture in (fitted.picture, there):
        tuning = Tuning(picture, image.cuda(), Bits(scales=4), 3)
        assert len(list(tuning.steps())) == 3
        assert tuning.picture().means.device.type == "cpu"


def test_more_gaussians_cost_no_more_than_their_bits(tmp_path):
    torch.manual_seed(0)
    count = 3000
    random = GaussianPicture(
        2 * torch.rand(count, 2) - 1, torch.rand(count, 2).exp(), torch.rand(count) * 3.1, torch.rand(count, 3), 99, 99
    )
    bits = Bits()
    size = save_quantized(tmp_path / "q", random, Levels.of(random, bits))
    # Numbers without any order cost what they have, less what the order of the Gaussians would: log2 of N!.
    whole = count * sum(bits.of_columns(3))
    order = sum(np.log2(np.arange(1, count + 1)))
    assert (whole - order) / 8 < size < (whole - 0.8 * order) / 8 * 1.05 + 700


def test_levels_are_within_half_a_step(fitted):
    levels = Levels.of(fitted.picture, Bits(means=8, scales=8, rotations=8, colours=8))
    codes = levels.codes(fitted.picture)
    assert codes.min() >= 0
    assert codes.max() <= 255
    rounded = levels.rounded(fitted.picture)
    turns = (rounded.rotations - fitted.picture.rotations).remainder(torch.pi)
    assert torch.minimum(turns, torch.pi - turns).max() <= torch.pi / 512 + 1e-5
    inner = (codes[:, :2] > 0) & (codes[:, :2] < 255)
    assert (
        (rounded.means - fitted.picture.means).abs()[inner]
        <= (levels.width[:2] / 2 + 1e-6).expand_as(codes[:, :2])[inner]
    ).all()


def test_fine_tuning_wins_back(image, fitted):
    tuning = Tuning(fitted.picture, image, Bits(means=8, scales=4, rotations=4, colours=5), 30)
    before = psnr(tuning.picture(), image)
    assert [step.number for step in tuning.steps()] == list(range(1, 31))
    assert psnr(tuning.picture(), image) > before + 0.3


@pytest.mark.parametrize("text", ["12", "12,6,6,x", "12,6,6,0", "17,6,6,6", "1,2,3,4,5"])
def test_bits_that_are_none(text):
    with pytest.raises(UserError, match=f"^bits must be four numbers from 1 to 16, .*, got '{text}'$"):
        parsed_bits(text)
    assert parsed_bits("12,6,5,4") == Bits(means=12, scales=6, rotations=5, colours=4)


@pytest.mark.parametrize(
    ("picture", "count", "sentence"),
    [
        (torch.zeros(3, 4, 5), 21, "gaussians must be at most one per pixel, 20 for 5 x 4 pixels, got 21"),
        (torch.zeros(3, 4, 5), 0, "fit: gaussians: Input should be greater than or equal to 1"),
        (torch.zeros(4, 5), 3, r"image must be float \[channels, height, width\], got torch.float32 \[4, 5\]"),
        (torch.full((1, 4, 5), 2.0), 3, r"image must have values in \[0, 1\], but some lie outside"),
        (torch.full((1, 4, 5), torch.nan), 3, r"image must have values in \[0, 1\], but some lie outside"),
    ],
)
def test_mistakes_are_sentences(picture, count, sentence):
    with pytest.raises(UserError, match=sentence):
        fit_image(picture, count, steps=1)
