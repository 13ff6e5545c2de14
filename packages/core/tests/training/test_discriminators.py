import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.func import functional_call

from smalti.core.discriminators.blur import Blur, gaussian_blur
from smalti.core.discriminators.dino import DINODiscriminatorOptions, LocalBatchNorm
from smalti.core.discriminators.patchgan import PatchGANOptions
from smalti.core.discriminators.stylegan import StyleGANOptions
from smalti.core.discriminators.titok import TiTokDiscriminatorOptions
from smalti.core.errors import UserError


@pytest.fixture(params=["patchgan", "blurred", "strided", "titok", "average", "dino"])
def discriminator(request, vit_file):
    torch.manual_seed(0)
    options = {
        "patchgan": PatchGANOptions(width=16, norm="group"),
        "blurred": StyleGANOptions(image_size=32, width_multiplier=1),
        "strided": StyleGANOptions(image_size=32, block="strided-skip"),
        "titok": TiTokDiscriminatorOptions(width=32),
        "average": TiTokDiscriminatorOptions(width=32, stages=2, pool="average"),
        "dino": DINODiscriminatorOptions(source=str(vit_file), image_size=32, depths=(1, 3)),
    }
    return options[request.param].build(3)


def test_all_weights_learn_and_images_get_gradients(discriminator):
    images = torch.rand(2, 3, 32, 32).requires_grad_()
    logits = discriminator(images)
    assert len(logits) == 2
    logits.square().sum().backward()
    assert bool(images.grad.any())
    assert all(bool(weight.grad.any()) for weight in discriminator.parameters() if weight.ndim > 1)


def test_frozen_weights_judge_the_same(discriminator):
    """What the generator's term does, also where weights are parametrised."""
    discriminator.eval()
    images = torch.rand(2, 3, 32, 32).requires_grad_()
    frozen = {name: weight.detach() for name, weight in discriminator.named_parameters()}
    logits = functional_call(discriminator, frozen, (images,))
    torch.testing.assert_close(logits, discriminator(images))
    logits.sum().backward()
    assert bool(images.grad.any())
    assert all(weight.grad is None for weight in discriminator.parameters())


def test_state_goes_through_a_checkpoint(discriminator):
    images = torch.rand(2, 3, 32, 32)
    discriminator(images)
    expected = discriminator.eval()(images)
    state = {name: tensor.clone() for name, tensor in discriminator.state_dict().items()}
    with torch.no_grad():
        for weight in discriminator.parameters():
            weight.normal_()
    discriminator.load_state_dict(state)
    torch.testing.assert_close(discriminator(images), expected)


def test_half_precision_is_finite(discriminator):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert bool(discriminator(torch.rand(2, 3, 32, 32)).isfinite().all())


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_patchgan_normalises_as_asked(norm):
    torch.manual_seed(0)
    module = PatchGANOptions(width=16, norm=norm).build(1)
    kinds = {"batch": nn.BatchNorm2d, "group": nn.GroupNorm, "none": nn.Identity}
    assert [type(module.blocks[index]) for index in (3, 6, 9)] == [kinds[norm]] * 3
    assert (module.blocks[2].bias is None) == (norm != "none")
    images = torch.rand(2, 1, 32, 32)
    alone = torch.cat([module(images[:1]), module(images[1:])])
    assert torch.allclose(module(images), alone, atol=1e-6) == (norm != "batch")


def test_patchgan_starts_as_asked():
    torch.manual_seed(0)
    normal, default = (PatchGANOptions(init=init).build(3) for init in ("normal", "default"))
    assert normal.blocks[8].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert normal.blocks[9].weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert bool((default.blocks[9].weight == 1).all())
    with pytest.raises(ValidationError, match="norm: group needs a width that is a multiple of 16, got 24"):
        PatchGANOptions(width=24, norm="group")


def test_patchgan_takes_images_of_three_patches_and_more():
    module = PatchGANOptions(width=16, layers=2).build(1)
    assert module(torch.rand(2, 1, 12, 13)).shape == (2, 1, 1, 1)
    with pytest.raises(UserError, match=r"^patchgan with layers: 2 takes images of 12x12 and more, got 12x11$"):
        module(torch.rand(2, 1, 12, 11))


def test_stylegan_is_for_one_size_and_has_the_published_widths():
    module = StyleGANOptions(image_size=256).build(3)
    assert [block.main[0].in_channels for block in module.blocks] == [128, 256, 512, 512, 512, 512]
    narrow = StyleGANOptions(image_size=256, width_multiplier=1, block="strided-skip").build(3)
    assert [block.main[0].in_channels for block in narrow.blocks] == [64, 128, 256, 512, 512, 512]
    with pytest.raises(UserError, match=r"^this stylegan discriminator is for images of 256x256, got 128x256$"):
        module(torch.rand(1, 3, 128, 256))
    with pytest.raises(ValidationError, match="image_size must be a power of 2, got 96"):
        StyleGANOptions(image_size=96)


@pytest.mark.parametrize("taps", [3, 4, 5])
def test_a_blur_keeps_what_is_constant_and_is_symmetric(taps):
    blur = Blur(taps, padding=0)
    torch.testing.assert_close(blur(torch.ones(1, 2, 9, 9)), torch.ones(1, 2, 10 - taps, 10 - taps))
    torch.testing.assert_close(blur.kernel, blur.kernel.flip(2, 3))
    assert not blur.state_dict()


def test_the_gaussian_blur_is_its_plain_sum():
    sigma, image = 1.1, torch.randn(1, 1, 11, 11)
    radius = 3
    weights = torch.tensor([2 ** -((k / sigma) ** 2) for k in range(-radius, radius + 1)])
    weights = weights / weights.sum()
    rows = torch.arange(5 - radius, 5 + radius + 1)
    expected = sum(
        weights[i] * weights[j] * image[0, 0, row, column]
        for i, row in enumerate(rows)
        for j, column in enumerate(rows)
    )
    torch.testing.assert_close(gaussian_blur(image, sigma)[0, 0, 5, 5], expected)
    assert gaussian_blur(image, 0.3) is image


def test_local_batch_norm_takes_groups_that_fit():
    torch.manual_seed(0)
    norm = LocalBatchNorm(3, 8)
    for batch, groups in ((1, 1), (8, 1), (16, 2), (9, 3), (11, 11)):
        x = torch.randn(batch, 3, 5)
        parts = x.view(groups, -1, 3, 5)
        mean = parts.mean((1, 3), keepdim=True)
        expected = (parts - mean) / ((parts - mean) ** 2).mean((1, 3), keepdim=True).add(1e-6).sqrt()
        torch.testing.assert_close(norm(x), expected.view_as(x))


def test_dino_is_not_in_its_checkpoint_and_sees_all_sizes(vit_file):
    torch.manual_seed(0)
    module = DINODiscriminatorOptions(source=str(vit_file), image_size=32, depths=(1, 3)).build(3)
    assert all(name.startswith("heads.") for name in module.state_dict())
    module.eval()
    exact, small, large = (module(torch.rand(2, 1, side, side)) for side in (32, 20, 50))
    assert exact.shape == small.shape == large.shape == (2, 3 * 16)
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(module(image), module(torch.nn.functional.avg_pool2d(image, 2)))


def test_dino_cuts_large_images_out_in_training_only(vit_file):
    module = DINODiscriminatorOptions(source=str(vit_file), image_size=32, depths=(3,)).build(3)
    image = torch.rand(2, 3, 64, 64)
    resized = torch.nn.functional.avg_pool2d(image, 2)
    torch.manual_seed(0)
    seen = [module._fitted(image) for _ in range(20)]
    cut = [one for one in seen if not torch.equal(one, resized)]
    assert 4 <= len(cut) <= 16
    windows = [image[:, :, top : top + 32, left : left + 32] for top in range(33) for left in range(33)]
    assert all(any(torch.equal(one, window) for window in windows) for one in cut)
    module.eval()
    assert torch.equal(module._fitted(image), torch.nn.functional.interpolate(image, (32, 32), mode="area"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"depths": (2, 4)}, r"^dino: depth 4 is beyond the 3 blocks of .*vit.safetensors$"),
        ({"kernel": 35}, r"^dino: a kernel of 35 is too long for 16 patches; give a larger image_size$"),
    ],
)
def test_what_dino_does_not_have(vit_file, options, sentence):
    with pytest.raises(UserError, match=sentence):
        DINODiscriminatorOptions(**{"source": str(vit_file), "image_size": 32, "depths": (3,), **options}).build(3)


def test_an_even_kernel_of_dino():
    with pytest.raises(ValidationError, match="kernel must be odd, got 8"):
        DINODiscriminatorOptions(kernel=8)


def test_missing_weights_of_dino_are_named():
    with pytest.raises(UserError, match=r"^/no/dino.pth does not exist; expected the weights of a pretrained ViT the"):
        DINODiscriminatorOptions(source="/no/dino.pth").build(3)
