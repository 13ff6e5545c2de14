import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "toy"))

from toy_training import lecam_of

from smalti.core.errors import UserError
from smalti.core.testing.processes import run_in_processes
from smalti.core.training.adversarial import (
    Adversary,
    LeCamRegularization,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    last_weight,
)
from smalti.core.training.augmentation import augmented, blur_strength, blurred, coloured, cut_out, translated
from smalti.core.training.options import Adversarial, Augmentation, LeCam

LOGITS = st.lists(st.floats(-5, 5), min_size=1, max_size=6).map(torch.tensor)


@settings(deadline=None, max_examples=20)
@given(LOGITS, LOGITS)
def test_objectives_are_their_formulas(real, generated):
    real, generated = real.double(), generated.double()
    hinge = ((1 - real).clamp(min=0).mean() + (1 + generated).clamp(min=0).mean()) / 2
    vanilla = (-real.sigmoid().log().mean() - (1 - generated.sigmoid()).log().mean()) / 2
    torch.testing.assert_close(discriminator_loss(real, generated, "hinge"), hinge)
    torch.testing.assert_close(discriminator_loss(real, generated, "vanilla"), vanilla)
    torch.testing.assert_close(generator_loss(generated, "hinge"), -generated.mean())
    torch.testing.assert_close(generator_loss(generated, "non-saturating"), -generated.sigmoid().log().mean())


def test_a_losing_generator_has_the_gradient_of_the_right_way_round():
    """The exchanged cross entropy of some trainers has a gradient that does not depend on the logit."""
    logits = torch.tensor([-6.0, 0.0, 6.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(3 * generator_loss(logits, "non-saturating"), logits)
    torch.testing.assert_close(gradient, -torch.sigmoid(-logits.detach()))
    assert gradient[0] < gradient[1] < gradient[2] < 0


def test_the_gradient_penalty_is_half_the_squared_norm():
    weight = torch.randn(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    images = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    penalty = gradient_penalty(F.conv2d(images.sin(), weight), images)
    expected = 0.5 * ((images.cos() * weight) ** 2).sum((1, 2, 3)).mean()
    torch.testing.assert_close(penalty.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0], rtol=1e-6, atol=0)


def test_the_adaptive_weight_is_the_ratio_of_gradients():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    ratio = adaptive_weight(3 * weight.sum(), (weight * torch.tensor([3.0, 4.0])).sum(), weight, 1e4)
    torch.testing.assert_close(ratio, torch.tensor(3 * 2**0.5 / (5 + 1e-4)))
    assert not ratio.requires_grad
    assert adaptive_weight(weight.sum(), 0 * weight.sum(), weight, 1e4) == 1e4
    assert adaptive_weight(weight.sum(), 0 * weight.sum(), weight, 7.0) == 7.0


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_out_of_range_switches_the_term_off_for_one_update(bad):
    weight = torch.ones(2, requires_grad=True)
    assert adaptive_weight(weight.sum() * bad, weight.sum(), weight, 1e4) == 0
    assert adaptive_weight(weight.sum(), weight.sum() * float("nan"), weight, 1e4) == 0


def test_large_gradients_of_half_precision_have_their_norm():
    weight = torch.ones(64, dtype=torch.float16, requires_grad=True)
    value = (weight * torch.full((64,), 3e4, dtype=torch.float16)).sum()  # their norm is beyond float16
    torch.testing.assert_close(adaptive_weight(value, value, weight, 1e4), torch.tensor(1.0))


def test_the_last_layer_is_found(tokenizer):
    student = tokenizer()
    found = last_weight(student)
    assert found is list(student.decoder.layers)[-2].weight
    student.decoder.last_weight = student.decoder.layers[0].weight
    assert last_weight(student) is student.decoder.layers[0].weight
    student.decoder.last_weight.requires_grad_(False)
    assert last_weight(student) is found
    del student.decoder.last_weight
    student.decoder.requires_grad_(False)
    with pytest.raises(UserError, match=r"^adaptive: no layer of the decoder learns"):
        last_weight(student)
    foreign, other = torch.ones(1, requires_grad=True), torch.ones(2, requires_grad=True)
    with pytest.raises(UserError, match=r"^adaptive: the losses do not depend on .*, of shape \(2,\); give the dec"):
        adaptive_weight(foreign.sum(), foreign.sum(), other, 1.0)


@pytest.mark.parametrize("of", ["patches", "mean"])
@pytest.mark.parametrize("update", ["before", "after"])
def test_lecam_follows_its_formula(of, update):
    lecam = LeCamRegularization(LeCam(decay=0.9, of=of, update=update))
    averages = [0.0, 0.0]
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        real, fake = torch.randn(2, 3, 1, 4, 4, generator=generator) + 0.5
        moved = [0.9 * averages[0] + 0.1 * real.mean().item(), 0.9 * averages[1] + 0.1 * fake.mean().item()]
        used = moved if update == "before" else averages
        r, f = (real.mean(), fake.mean()) if of == "mean" else (real, fake)
        expected = F.relu(r - used[1]).square().mean() + F.relu(used[0] - f).square().mean()
        torch.testing.assert_close(lecam(real, fake), expected)
        averages = moved
        torch.testing.assert_close(lecam.averages, torch.tensor(averages))


def test_lecam_averages_over_processes():
    for averages in run_in_processes(lecam_of):
        torch.testing.assert_close(averages, torch.tensor([1.0, -1.0]))


class Judge(nn.Module):
    """One logit per pixel."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return self.weight * images


def adversary(layer=None, **options):
    options = Adversarial.model_validate({"discriminator": {"name": "patchgan"}, **options})
    judge = Judge()
    return Adversary(options, judge, layer), judge


def test_the_generators_term_leaves_no_gradient_in_the_discriminator():
    part, judge = adversary(weight=0.5)
    images = torch.randn(2, 1, 4, 4, requires_grad=True)
    term = part.generator_term(images, images.sum(), 0)
    torch.testing.assert_close(term, -0.5 * 2 * images.mean())
    term.backward()
    assert judge.weight.grad is None
    assert bool(images.grad.any())


def test_logits_are_averaged_over_images_for_whom_it_is_asked():
    images = torch.randn(3, 1, 4, 4)
    per_image = 2 * images.flatten(1).mean(1)
    for chosen, generator, judge in (("none", False, False), ("generator", True, False), ("all", True, True)):
        part, network = adversary(
            image_logits=chosen, generator_objective="non-saturating", objective="vanilla", weight=1.0
        )
        expected = F.softplus(-(per_image if generator else 2 * images)).mean()
        torch.testing.assert_close(part.generator_term(images, torch.zeros(()), 0), expected)
        terms = part.discriminator_terms(network, images, -images, 0)
        logits = per_image if judge else 2 * images
        torch.testing.assert_close(terms["discriminator"].detach(), F.softplus(-logits).mean())


def test_the_discriminators_terms_are_named_and_weighted():
    part, judge = adversary(r1=10.0, lecam={"weight": 0.5}, discriminator_weight=0.5)
    real, fake = torch.randn(2, 3, 1, 4, 4)
    terms = part.discriminator_terms(judge, real, fake, 0)
    assert list(terms) == ["discriminator", "lecam", "r1"]
    torch.testing.assert_close(terms["discriminator"], 0.5 * discriminator_loss(2 * real, 2 * fake, "hinge"))
    torch.testing.assert_close(terms["r1"], torch.tensor(0.5 * 10.0 * 0.5 * 4.0 * 16))
    terms["r1"].backward()
    torch.testing.assert_close(judge.weight.grad, torch.tensor(0.5 * 10.0 * 2.0 * 16))
    again, _ = adversary(lecam={"weight": 0.5})
    again.load_state_dict(part.state_dict())
    torch.testing.assert_close(again.lecam.averages, part.lecam.averages)


def test_the_adaptive_weight_multiplies():
    layer = nn.Parameter(torch.tensor([[[[0.7]]]]))
    part, _ = adversary(layer, weight=0.8, adaptive=True)
    inputs, target = torch.randn(2, 2, 1, 4, 4)
    images = F.conv2d(inputs, layer)
    reference = (images - target).square().mean()
    term = part.generator_term(images, reference, 0)
    gradients = [
        torch.autograd.grad(value, layer, retain_graph=True)[0].abs() for value in (reference, 2 * images.mean())
    ]
    ratio = (gradients[0] / (gradients[1] + 1e-4)).squeeze()
    torch.testing.assert_close(term, -0.8 * ratio * 2 * images.mean())


def test_augmentation_is_differentiable_and_seeded():
    images = torch.rand(3, 3, 16, 16).requires_grad_()
    options = Augmentation(probability=1.0)
    torch.manual_seed(1)
    first = augmented(images, options, 0)
    first.sum().backward()
    assert bool(images.grad.any())
    torch.manual_seed(1)
    assert torch.equal(augmented(images, options, 0), first)
    assert augmented(images, Augmentation(probability=0.0), 0) is images


def test_translation_moves_and_fills_with_zeros():
    torch.manual_seed(0)
    images = torch.rand(40, 2, 16, 16) + 1
    moved = translated(images)
    seen = set()
    for image, result in zip(images, moved, strict=True):
        shifts = [
            (down, across)
            for down in range(-2, 3)
            for across in range(-2, 3)
            if torch.equal(F.pad(image, (2, 2, 2, 2))[:, 2 - down : 18 - down, 2 - across : 18 - across], result)
        ]
        assert len(shifts) == 1
        seen.add(shifts[0])
    assert {down for down, _ in seen} == {across for _, across in seen} == {-2, -1, 0, 1, 2}


def test_colours_change_brightness_saturation_and_contrast_within_bounds():
    torch.manual_seed(0)
    grey = torch.full((200, 3, 4, 4), 0.25)
    shift = coloured(grey)[:, 0, 0, 0] - 0.25
    assert -0.5 <= shift.min() < -0.4
    assert 0.4 < shift.max() <= 0.5
    colours = torch.rand(200, 3, 4, 4)
    changed = coloured(colours)
    ratio = changed.mean(1).std((1, 2)) / colours.mean(1).std((1, 2))
    assert 0.5 <= ratio.min() < 0.6
    assert 1.4 < ratio.max() <= 1.5


def test_cutout_removes_a_square():
    torch.manual_seed(0)
    holes = cut_out(torch.ones(100, 3, 20, 20)) == 0
    sizes = holes[:, 0].flatten(1).sum(1)
    assert int(sizes.max()) == 16
    assert int(sizes.min()) >= 1
    assert torch.equal(holes[:, 0], holes[:, 2])


def test_the_blur_fades():
    options = Augmentation(probability=0.0, blur_until=10, blur_fade=3)
    assert [blur_strength(options, step) for step in (0, 9, 10, 11, 12, 13, 99)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert blur_strength(Augmentation(blur_until=10), 10) == 0.0
    assert blur_strength(Augmentation(), 0) == 0.0
    image = torch.randn(1, 1, 32, 32)
    spread = [blurred(image, strength).std() for strength in (0.0, 0.3, 1.0)]
    assert spread[0] > 2 * spread[1] > 4 * spread[2]


def test_in_float16_small_gradients_count_by_scaling():
    weight = torch.ones(4, requires_grad=True)
    half = weight.half()  # the gradient passes through float16, where 1e-8 is 0
    reference, adversarial = ((half.float() * factor).sum() for factor in (1e-8, 4e-8))
    assert float(adaptive_weight(reference, adversarial, weight, 1e4)) < 1e-6
    ratio = adaptive_weight(reference, adversarial, weight, 1e4, scale=2.0**16)
    torch.testing.assert_close(float(ratio), 2e-8 / (8e-8 + 1e-4), rtol=2e-3, atol=0)
    # Beyond what float16 can hold the guard holds.
    assert float(adaptive_weight(1e3 * reference, 1e9 * adversarial, weight, 1e4, scale=2.0**16)) == 0.0


def test_the_gradient_penalty_in_float16_by_scaling():
    images = torch.ones(2, 1, 2, 2, requires_grad=True)
    exact = gradient_penalty((images * 1e-8).sum((1, 2, 3)), images)
    logits = (images.half().float() * 1e-8).sum((1, 2, 3))
    assert float(gradient_penalty(logits, images)) == 0.0
    torch.testing.assert_close(gradient_penalty(logits, images, 2.0**16), exact, rtol=5e-3, atol=0)
