import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.losses.gram import GramOptions, gram
from smalti.core.losses.lpips import LPIPSOptions
from smalti.core.losses.perceptual import PerceptualOptions
from smalti.core.losses.pixel import CharbonnierOptions, L1Options, L2Options
from smalti.core.losses.proxy_codes import ProxyCodes, ProxyCodesOptions
from smalti.core.losses.terms import LossTerms
from smalti.core.losses.vgg import VGG16
from smalti.core.plugins import registry


def images(batch=2, channels=3, size=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(2, batch, channels, size, size, generator=generator, dtype=dtype) * 2 - 1


@pytest.mark.parametrize("options", [L1Options(), L2Options(), CharbonnierOptions(epsilon=0.1)])
def test_pixel_losses_have_their_gradients(options, output):
    first, second = images(1, 1, 3, torch.float64)
    first.requires_grad_()
    loss = options.build()
    assert torch.autograd.gradcheck(lambda made: loss(output(made), second, 0), (first,))


def test_charbonnier_is_between_quadratic_and_absolute(output):
    first, second = images()
    near = CharbonnierOptions(epsilon=1e-6).build()(output(first), second, 0)
    torch.testing.assert_close(near, L1Options().build()(output(first), second, 0), rtol=1e-4, atol=0)
    far = CharbonnierOptions(epsilon=1e3).build()(output(first.double()), second.double(), 0)
    expected = 1e3 + L2Options().build()(output(first.double()), second.double(), 0) / 2e3
    torch.testing.assert_close(far, expected, rtol=1e-9, atol=0)


def plain_lpips(tensors, first, second):
    """Written out layer by layer, in double precision."""
    shift, scale = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]]).double().view(2, 1, 3, 1, 1)
    total, layer = 0.0, 0
    x = [(first - shift) / scale, (second - shift) / scale]
    for tap, depth in enumerate((2, 2, 3, 3, 3)):
        if tap:
            x, layer = [F.max_pool2d(one, 2) for one in x], layer + 1
        for _ in range(depth):
            weight, bias = (tensors[f"net.slice1.{layer}.{part}"].double() for part in ("weight", "bias"))
            x, layer = [F.conv2d(one, weight, bias, padding=1).relu() for one in x], layer + 2
        unit = [one / (torch.linalg.vector_norm(one, dim=1, keepdim=True) + 1e-10) for one in x]
        weights = tensors[f"lin{tap}.model.1.weight"].double()
        total = total + (weights * (unit[0] - unit[1]) ** 2).sum(1).mean((1, 2))
    return total.mean()


def test_lpips_equals_its_plain_twin_in_double_precision(lpips_file, output):
    loss = LPIPSOptions(vgg=lpips_file, heads=lpips_file).build().double()
    first, second = images(2, 3, 32, torch.float64)
    first.requires_grad_()
    value = loss(output(first), second, 0)
    (gradient,) = torch.autograd.grad(value, first)
    expected = plain_lpips(load_file(lpips_file), first, second)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, first)[0], rtol=1e-5, atol=1e-10)


def test_lpips_is_a_distance_of_grey_images_too(lpips_file, output):
    loss = LPIPSOptions(vgg=lpips_file, heads=lpips_file).build()
    first, second = images(2, 1)
    assert loss(output(first), first, 0) == 0
    there, back = loss(output(first), second, 0), loss(output(second), first, 0)
    torch.testing.assert_close(there, back)
    torch.testing.assert_close(there, loss(output(first.expand(-1, 3, -1, -1)), second.expand(-1, 3, -1, -1), 0))
    assert there > 0


def test_networks_of_losses_are_neither_trained_nor_saved(lpips_file, output):
    loss = LPIPSOptions(vgg=lpips_file, heads=lpips_file).build().train()
    assert not loss.state_dict()
    assert not list(loss.parameters())
    assert not loss.distance.network.training
    moved = loss.to("meta")
    assert moved.distance.network.network.features[0].weight.device.type == "meta"
    assert moved.distance.network.network.shift.device.type == "meta"


def test_vgg_reads_torchvisions_names(lpips_file, tmp_path):
    tensors = {
        name.replace("net.slice1.", "features."): tensor
        for name, tensor in load_file(lpips_file).items()
        if name.startswith("net.")
    }
    torch.save({**tensors, "classifier.0.weight": torch.zeros(1)}, tmp_path / "vgg16.pth")
    of_torchvision = LPIPSOptions(vgg=tmp_path / "vgg16.pth", heads=lpips_file).build().distance
    of_lpips = LPIPSOptions(vgg=lpips_file, heads=lpips_file).build().distance
    assert torch.equal(of_torchvision(*images()), of_lpips(*images()))


def test_missing_weights_say_what_to_download_and_where_to_put_it(empty_cache, lpips_file, monkeypatch):
    monkeypatch.setattr("smalti.core.losses.lpips.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        LPIPSOptions(vgg=lpips_file).build()
    url = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"
    assert str(error.value) == (
        f"the weights of LPIPS are missing: download {url} to {empty_cache / 'vgg.pth'}, or give a file as heads"
    )
    with pytest.raises(UserError, match=r"^the weights of VGG16 are missing: .*vgg16-397923af.pth, or give .* as vgg$"):
        GramOptions().build()
    with pytest.raises(UserError, match=r"^the weights of resnet50 are missing: .*resnet50-0676ba61.pth to "):
        PerceptualOptions(network="resnet50").build()
    with pytest.raises(UserError, match=r"^vgg: /no/file does not exist; expected the weights of VGG16 there, from "):
        LPIPSOptions(vgg="/no/file", heads=lpips_file).build()


def test_weights_are_found_in_the_cache_and_in_the_package(empty_cache, lpips_file, tmp_path, monkeypatch):
    package = tmp_path / "lpips"
    heads = package / "weights" / "v0.1" / "vgg.pth"
    heads.parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    tensors = load_file(lpips_file)
    torch.save({name: tensor for name, tensor in tensors.items() if name.startswith("lin")}, heads)
    empty_cache.mkdir(parents=True)
    torch.save(tensors, empty_cache / "vgg16-397923af.pth")
    monkeypatch.syspath_prepend(tmp_path)
    found = LPIPSOptions().build().distance(*images())
    assert torch.equal(found, LPIPSOptions(vgg=lpips_file, heads=lpips_file).build().distance(*images()))


def test_weights_of_another_network_are_refused(vit_file, lpips_file, tmp_path):
    with pytest.raises(UserError, match=r"vit.safetensors does not hold the weights of VGG16: it lacks features.0.w"):
        GramOptions(vgg=vit_file).build()
    tensors = load_file(lpips_file)
    save_file({**tensors, "net.slice1.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "grey.safetensors")
    with pytest.raises(UserError, match=r"features.0.weight is \(64, 1, 3, 3\), should be \(64, 3, 3, 3\)$"):
        GramOptions(vgg=tmp_path / "grey.safetensors").build()


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_gram_matrices_are_mean_products(channels, height, width):
    features = torch.randn(2, channels, height, width, dtype=torch.float64)
    found = gram(features)
    for one in range(channels):
        for other in range(channels):
            torch.testing.assert_close(found[:, one, other], (features[:, one] * features[:, other]).mean((1, 2)))


def test_gram_sees_textures_and_not_places(lpips_file, output):
    torch.manual_seed(0)
    network = VGG16()
    features = network(torch.rand(1, 3, 32, 32))
    moved = [one.flip(2) for one in features]
    assert all(torch.allclose(gram(one), gram(other), atol=1e-5) for one, other in zip(features, moved, strict=True))
    loss = GramOptions(vgg=lpips_file).build()
    first, second = images()
    first.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output(first), second, 0), first)
    assert bool(gradient.any())
    assert loss(output(second), second, 0) == 0


def test_lpips_under_autocast_is_near_and_finite(lpips_file, output):
    loss = LPIPSOptions(vgg=lpips_file, heads=lpips_file).build()
    gram_loss = GramOptions(vgg=lpips_file).build()
    first, second = images()
    for each in (loss, gram_loss):
        exact = each(output(first), second, 0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = each(output(first), second, 0)
        torch.testing.assert_close(rough, exact, rtol=0.05, atol=0)
        assert rough.dtype == torch.float32


@pytest.mark.slow
def test_perceptual_compares_logits_without_a_clamp(tmp_path, output):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    state = models.resnet50(weights=None).state_dict()
    # As torchvision's own files are: of the first format, some without counters.
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "resnet50.pth", _use_new_zipfile_serialization=False)
    loss = PerceptualOptions(network="resnet50", weights=tmp_path / "resnet50.pth").build()
    first, second = images(1)
    outside = (first + 3).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(output(outside), second, 0), outside)
    assert bool(gradient.any())
    assert loss(output(second), second, 0) == 0
    assert loss.prepared(images(1, 1)[0]).shape == (1, 3, 224, 224)


def test_torchvision_is_asked_for_by_name(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").touch()
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(UserError, match=r"^the loss perceptual needs torchvision: pip install torchvision$"):
        PerceptualOptions(weights=tmp_path / "weights.pth").build()


class Codes:
    """A decoder that predicts so many codes."""

    def __init__(self, codes):
        self.proxy_codes = codes

    def code_logits(self, latent):
        raise AssertionError


def with_decoder(model, decoder):
    del model.decoder
    model.decoder = decoder
    return model


def test_proxy_codes_are_learned_from_logits_in_the_place_of_images(tokenizer, tmp_path, output):
    proxy = tokenizer()
    proxy.save_pretrained(tmp_path / "proxy")
    loss = ProxyCodesOptions(tokenizer=str(tmp_path / "proxy")).build()
    loss.attach(with_decoder(tokenizer(), Codes(16)))
    first, _ = images(2, 1, 8)
    logits = torch.randn(2, 16, 2, 2, requires_grad=True)
    value = loss(output(logits), first, 0)
    expected = F.cross_entropy(logits.flatten(2), proxy.encode(first)[..., 0])
    torch.testing.assert_close(value, expected)
    assert torch.autograd.grad(value, logits)[0].abs().sum() > 0
    assert not loss.state_dict()
    with pytest.raises(UserError, match=r"^proxy-codes: the decoder has 8 positions, but the proxy 4 tokens$"):
        loss(output(torch.randn(2, 16, 2, 4)), first, 0)


def test_proxy_codes_need_a_decoder_that_predicts_them_and_one_stream(tokenizer, monkeypatch):
    for decoder in (torch.nn.Identity(), Codes(None)):
        with pytest.raises(
            UserError, match=r"^the loss proxy-codes needs a decoder with a head of logits over codes: "
        ):
            ProxyCodes(tokenizer()).attach(with_decoder(tokenizer(), decoder))
    with pytest.raises(UserError, match=r"^proxy-codes: the decoder predicts 8 codes, but the proxy has 16$"):
        ProxyCodes(tokenizer()).attach(with_decoder(tokenizer(), Codes(8)))
    two = tokenizer()
    layout = two.layout().model_copy(update={"vocab": (4, 4)})
    monkeypatch.setattr(type(two), "layout", lambda self: layout)
    with pytest.raises(UserError, match=r"^proxy codes are those of one stream, but the tokenizer gives grid 2x2, 2 "):
        ProxyCodes(two)
    assert isinstance(two, Tokenizer)


def test_losses_of_codes_and_of_pixels_do_not_mix(tokenizer, tmp_path):
    tokenizer().save_pretrained(tmp_path)
    codes = ProxyCodesOptions(tokenizer=str(tmp_path))
    student = with_decoder(tokenizer(), Codes(16))
    assert LossTerms([codes], student).of_proxy
    with pytest.raises(UserError, match=r"^the loss proxy-codes is learned without pixels and goes without l2$"):
        LossTerms([codes, L2Options()], student)


def test_terms_are_weighted_and_named_apart(tokenizer, output):
    losses = (L2Options(weight=0.5), L1Options(), L2Options(weight=2.0))
    terms = LossTerms(losses, tokenizer())
    first, second = images(2, 1, 8)
    found = terms(output(first), second, 0)
    assert list(found) == ["l2", "l1", "l2_2"]
    torch.testing.assert_close(found["l2_2"], 4 * found["l2"])
    assert not terms.trainable


def test_every_loss_and_discriminator_is_registered():
    assert set(registry().names("loss")) == {
        *("l1", "l2", "charbonnier", "lpips", "perceptual", "gram", "alignment", "dependency", "proxy-codes"),
    }
    assert set(registry().names("discriminator")) == {"patchgan", "stylegan", "titok", "dino"}
    for kind in ("loss", "discriminator"):
        for name in registry().names(kind):
            assert re.fullmatch(r"[a-z0-9-]+", name)
            assert registry().options(kind, name).model_fields["name"].default == name
